#!/usr/bin/env bash
# in_venv.sh NAME SCRIPT PACKAGES GRAPHS: runs a peer in .venv-peers/NAME, made at the first time, with our ONNX Runtime.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../../../.venv-peers/$1
if [[ ! -e $venv/.made ]]; then
  python3 -m venv "$venv"
  version=$(sed -n 's/^onnxruntime==//p' "$here/../../../constraints.txt")
  # shellcheck disable=SC2086  # several packages
  "$venv/bin/pip" install --quiet --disable-pip-version-check $3 "onnxruntime==$version" >&2
  touch "$venv/.made"
fi
exec "$venv/bin/python" "$here/$2" "$4"

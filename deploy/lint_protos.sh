#!/usr/bin/env bash
# Lints the protos with buf. google/rpc/status.proto comes from googleapis-common-protos, laid beside them for the lint.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(dirname "${PYTHON:-.venv/bin/python}")
google=$("$bin/python" -c 'import google.rpc, pathlib; print(pathlib.Path(next(iter(google.rpc.__path__))))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r protos/. "$work"
mkdir -p "$work/google/rpc"
cp "$google/status.proto" "$work/google/rpc/"
"$bin/buf" lint "$work"

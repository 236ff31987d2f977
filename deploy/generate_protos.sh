#!/usr/bin/env bash
# Generates shared/gen from protos/: Python stubs, type stubs, and the descriptor set that the gateway transcodes JSON with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
google=$("$python" -c 'import google.rpc, pathlib; print(pathlib.Path(next(iter(google.rpc.__path__))).parents[1])')
export PATH="$(dirname "$(command -v "$python")"):$PATH"
rm -rf shared/gen && mkdir -p shared/gen
mapfile -t files < <(cd protos && find usagi inference -name '*.proto' | sort)
"$python" -m grpc_tools.protoc -Iprotos -I"$google" \
  --python_out=shared/gen --mypy_out=quiet:shared/gen --grpc_python_out=shared/gen --mypy_grpc_out=quiet:shared/gen \
  --include_imports --descriptor_set_out=shared/gen/usagi.binpb "${files[@]}"
find shared/gen -type d -name '[a-z]*' | while read -r folder; do
  [[ $folder == shared/gen ]] || printf '"""Generated from protos/ by `make protos`; never edited."""\n' >"$folder/__init__.py"
done

#!/bin/sh
# Makes /opt/venv with the packages of a requirements file and nothing else: no pip, no tests, no C sources.
#
#   install.sh REQUIREMENTS [CONSTRAINTS]
#   install.sh NAME.lock                     only files with the hashes that stand there
#
# EXTRA_INDEX_URL, if set, is a second package index (CPU builds of torch, a company's mirror).
set -eu
requirements=$1
constraints=${2:-/dev/null}
[ -e "$constraints" ] || constraints=/dev/null
case $requirements in *.lock) hashes=--require-hashes ;; *) hashes= ;; esac

python -m venv --without-pip /opt/venv
pip --python /opt/venv/bin/python install --no-compile --only-binary :all: ${hashes:+"$hashes"} \
  ${EXTRA_INDEX_URL:+--extra-index-url "$EXTRA_INDEX_URL"} \
  --constraint "$constraints" --requirement "$requirements"

cd /opt/venv/lib/python3*/site-packages
# What is never imported while serving. Training's image keeps ONNX Runtime whole: its quantiser lives there.
if [ ! -d torch ]; then
  rm -rf onnxruntime/quantization onnxruntime/transformers onnxruntime/tools onnxruntime/datasets
  rm -rf numpy/distutils numpy/f2py
  find . -type d -name tests -prune -exec rm -rf {} +
  find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) -delete
fi
rm -f /opt/venv/bin/*ctivate*
# Compiled ahead: the root file system is read-only at run time, and a start should not compile.
# `unchecked-hash` so that no copy of the files, whatever it does to their times, makes Python compile again.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . || true

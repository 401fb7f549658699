#!/usr/bin/env bash
# Runs the Python tests of the operations against a wheel file, and nothing else of this checkout.
#
#   tools/test_wheel.sh WHEEL [PYTHON [REQUIREMENT...]]
#       in a fresh virtual environment of PYTHON (default python3); REQUIREMENTs say which versions to test with, e.g.
#       'apache-tvm-ffi==0.1.0' 'torch==2.13.0'
#   tools/test_wheel.sh --selftest WHEEL [PYTHON [REQUIREMENT...]]
#       instead of the tests what a user would run first: punica_kernels.info and punica_kernels.selftest, in an
#       environment that has the wheel and what it asks for, and nothing more
#   tools/test_wheel.sh --offline WHEEL [PYTHON]
#       without installing anything: the wheel is unzipped onto the path of a PYTHON that has torch, apache-tvm-ffi and
#       pytest already
set -euo pipefail

mode=tests
case "${1:-}" in --offline | --selftest) mode=${1#--}; shift ;; esac
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
wheel=$(realpath "$1")
python=${2:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ $mode = offline ]; then
  "$python" -m zipfile -e "$wheel" "$work/wheel"
  export PYTHONPATH="$work/wheel${PYTHONPATH:+:$PYTHONPATH}"
else
  "$python" -m venv "$work/venv"
  python="$work/venv/bin/python"
  # The versions that the project is tested with, unless REQUIREMENTs name others.
  constraints=()
  if [ $# -lt 3 ]; then constraints=(-c "$root/requirements-dev.txt" -c "$root/requirements-build.in"); fi
  more=(numpy pytest hypothesis)
  if [ $mode = selftest ]; then more=(); fi
  "$python" -m pip install -q --disable-pip-version-check "${constraints[@]}" "$wheel" "${@:3}" "${more[@]}"
fi

export PYTHONDONTWRITEBYTECODE=1
if [ $mode = selftest ]; then
  unset PYTHONPATH
  cd "$work"
  "$python" -m pip list --disable-pip-version-check --format freeze | tr '\n' ' '
  echo
  "$python" -m punica_kernels.info
  "$python" -m punica_kernels.selftest
  exit
fi
cd "$root"
WORK="$work" "$python" - <<'PYTHON'
import os, platform, sys

import punica_kernels
import torch
import tvm_ffi

print("Python", platform.python_version(), "torch", torch.__version__, "tvm-ffi", tvm_ffi.__version__)
print("package", punica_kernels.__file__, "instruction set", punica_kernels.active_isa())
if not os.path.realpath(punica_kernels.__file__).startswith(os.path.realpath(os.environ["WORK"])):
    sys.exit("the tests would not run against the given wheel")
PYTHON
# The engine and the examples need more packages, and have their place in `make test`.
"$python" -m pytest tests/python -q -p no:cacheprovider --ignore=tests/python/engine \
  --ignore=tests/python/test_example_adapters.py

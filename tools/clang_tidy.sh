#!/usr/bin/env bash
# clang-tidy over the C++ sources, with the compile commands of build/release. Usage: tools/clang_tidy.sh [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."

# CUDA sources are nvcc's; clang would need a CUDA of a version that it knows. What Highway compiles once for every
# instruction set (*_kernels.cc and *-inl.h) takes the analyser minutes and follows Highway's idioms, not these checks.
mapfile -t files < <(find src bindings tests/cpp examples/cpp -name '*.cc' -not -name '*_kernels.cc')
.venv/bin/python .venv/bin/run-clang-tidy.py -quiet -j "${1:-2}" -p build/release \
  -clang-tidy-binary .venv/bin/clang-tidy "${files[@]}"

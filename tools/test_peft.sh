#!/usr/bin/env bash
# Runs PEFT's own tests of mixed batches with every model accelerated (punica_kernels.peft).
#
#   tools/test_peft.sh [PYTHON]     (default .venv/bin/python, with punica_kernels and peft installed)
#
# PEFT's tests are in its source distribution, of the installed version; they are unpacked into a temporary folder.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "${1:-$root/.venv/bin/python}")  # not where the link leads: that is no virtual environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

version=$("$python" -c 'import importlib.metadata as m; print(m.version("peft"))')
"$python" -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation --no-binary peft \
  -d "$work" "peft==$version"
tar -xzf "$work/peft-$version.tar.gz" -C "$work" --strip-components=1 --wildcards '*/tests/*'
touch "$work/tests/__init__.py"
cd "$work"
export PYTHONPATH="$root/tests/peft${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
"$python" -m pytest -p accelerated_suite -p no:cacheprovider -q -s -W ignore -c /dev/null --rootdir "$work" \
  tests/test_custom_models.py tests/test_decoder_models.py tests/test_encoder_decoder_models.py \
  -k "mixed_adapter_batches and not timing"

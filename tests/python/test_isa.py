"""PUNICA_ISA forces an instruction set: the results are right with each, and the kernels themselves say which ran."""

import json
import os
import pathlib
import re
import subprocess
import sys

import punica_kernels as pk
import pytest

SCRIPT = pathlib.Path(__file__).with_name("isa_script.py")


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PUNICA_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.fixture(scope="module")
def supported() -> list[str]:
    """The names that the refusal of an unknown one lists."""
    result = run_with("mmx", "-c", "import punica_kernels; punica_kernels.active_isa()")
    assert result.returncode != 0
    pattern = (
        r"RuntimeError: punica_kernels.active_isa: the environment variable PUNICA_ISA must be one of ([\w, ]+) "
        r"on this CPU, got 'mmx'"
    )
    message = re.search(pattern, result.stderr)
    assert message, result.stderr
    return message.group(1).split(", ")


ALL = ["baseline", "avx2", "avx512", "avx512_bf16", "neon"]


@pytest.mark.parametrize("isa", ALL)
def test_forced(isa, supported):
    if isa not in supported:
        result = run_with(isa, "-c", "import punica_kernels; punica_kernels.active_isa()")
        assert "PUNICA_ISA must be one of" in result.stderr
        return
    result = run_with(isa, str(SCRIPT))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["active"] == isa
    # avx512_bf16 has other instructions for bfloat16 products; what has none of those runs the avx512 code.
    allowed = {isa, "avx512"} if isa == "avx512_bf16" else {isa}
    for op, ran in report["ran"].items():
        assert set(ran) <= allowed, (op, ran)
    assert any(isa in ran for ran in report["ran"].values())


def test_supported_isas_are_those_of_the_message(supported):
    assert list(pk.supported_isas()) == supported


def test_default_is_the_best(supported):
    if "PUNICA_ISA" not in os.environ:
        assert pk.active_isa() == supported[-1]
    else:
        assert pk.active_isa() == os.environ["PUNICA_ISA"]


def test_an_unknown_name_stops_every_operation():
    code = (
        "import torch, punica_kernels as pk; x = torch.ones(2, 8)\n"
        "try: pk.rms_norm(x, x, torch.ones(8), 1e-5)\n"
        "except RuntimeError as error: print(error); assert (x == 1).all()"
    )
    result = run_with("no_such_set", "-c", code)
    assert "PUNICA_ISA must be one of" in result.stdout, result

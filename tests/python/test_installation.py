"""`python -m punica_kernels.selftest` and `python -m punica_kernels.info`."""

import json
import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import punica_kernels as pk
import pytest
import torch
from punica_kernels import info, selftest
from punica_kernels._dispatch import TENSORS


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"punica_kernels.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# ----------------------------------------------------------------------------------------------------------- selftest


@pytest.fixture
def only(monkeypatch):
    """Leaves these operations to the selftest, and rms_norm."""

    def leave(*ops):
        kept = {op: checks for op, checks in selftest.OPERATIONS.items() if op in (*ops, "rms_norm")}
        monkeypatch.setattr(selftest, "OPERATIONS", kept)

    return leave


def test_selftest_passes_and_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("selftest")
    assert result.returncode == 0, result.stdout + result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 30 * len(devices())  # of the CPU: the machine may be busy
    for op in selftest.OPERATIONS:
        assert len(re.findall(rf"^  {op} .* ok .* ok .* ok ", result.stdout, re.MULTILINE)) == len(devices()), op
    assert re.search(r"all right$", result.stdout.strip())
    for device in devices():
        assert re.search(rf"^{device}: ", result.stdout, re.MULTILINE)


def devices() -> list[str]:
    cuda = torch.cuda.device_count() if pk.has_cuda() and torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i}" for i in range(cuda))]


def test_selftest_covers_every_operation():
    assert set(selftest.OPERATIONS) == set(TENSORS) - {"update_lora_batch"}  # add_lora's check sorts a batch


def slightly_wrong(op):
    def wrapped(*arguments, **options):
        op(*arguments, **options)
        written = arguments[0]
        written.view(-1)[written.numel() // 2] += 0.25

    return wrapped


@pytest.mark.parametrize("op", [op for op in selftest.OPERATIONS if not op.endswith("_kv")])
def test_selftest_finds_one_wrong_element(op, only, monkeypatch, capsys):
    only(op, "dispatch_bgmv")
    monkeypatch.setattr(pk, op, slightly_wrong(getattr(pk, op)))
    assert selftest.main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert re.search(rf"^  {op} .*FAILED", output, re.MULTILINE)
    assert len(re.findall("FAILED   |FAILED$", output, re.MULTILINE)) >= 1
    assert f"cpu: {op}, float32" in output and "is right" in output
    assert all(f"cpu: {other}," not in output for other in selftest.OPERATIONS if other != op)


@pytest.mark.parametrize("op", ["init_kv", "append_kv"])
def test_selftest_finds_a_token_that_was_not_written(op, only, monkeypatch, capsys):
    only(op)
    monkeypatch.setattr(pk, op, lambda *arguments: None)
    assert selftest.main(["--device", "cpu"]) == 1
    assert f"cpu: {op}, float16, head_dim=64: " in capsys.readouterr().out


def test_selftest_finds_bits_that_change(only, monkeypatch, capsys):
    only("rms_norm")
    calls, rms_norm = [], pk.rms_norm

    def sometimes(output, *arguments, **options):
        rms_norm(output, *arguments, **options)
        calls.append(1)
        if len(calls) % 2 == 0:
            output[0, 0] = torch.nextafter(output[0, 0].float(), torch.tensor(9.0)).to(output.dtype) + 2**-9

    monkeypatch.setattr(pk, "rms_norm", sometimes)
    assert selftest.main(["--device", "cpu"]) == 1
    assert "two runs gave different bits" in capsys.readouterr().out


def test_selftest_goes_on_after_an_exception(only, monkeypatch, capsys):
    only("dispatch_bgmv")

    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(pk, "dispatch_bgmv", broken)
    assert selftest.main(["--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "no such luck" in output
    assert re.search(r"^  rms_norm .* ok .* ok .* ok ", output, re.MULTILINE)


@pytest.mark.skipif(len(devices()) > 1, reason="there is a CUDA device")
def test_selftest_of_a_device_that_is_not_there():
    result = run("selftest", "--device", "cuda")
    assert result.returncode == 2
    assert "no cuda device" in result.stderr


# --------------------------------------------------------------------------------------------------------------- info


def test_info():
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["version"] == pk.__version__ == metadata.version("punica-kernels")
    assert said["torch"] == torch.__version__
    assert said["backends"] == (["cpu", "cuda"] if pk.has_cuda() else ["cpu"])
    assert tuple(said["instruction_sets"]) == pk.supported_isas()
    assert said["library_bytes"] > 100_000
    assert [device["device"] for device in said["devices"]] == devices()
    assert said["devices"][0]["runs"] == pk.active_isa()
    for device in said["devices"][1:]:
        assert device["runs"] == pk.active_cuda_arch(device["device"])
    assert bool(said["gpu_code"]) is pk.has_cuda()


def test_info_as_text():
    text, said = run("info").stdout, info.collect()
    assert text.startswith(f"punica_kernels {pk.__version__}\n")
    for words in (said["instruction_sets"], said["gpu_code"], said["backends"]):
        assert ", ".join(words) in text
    assert f"code path {pk.active_isa()}" in text


@pytest.mark.skipif(not pk.has_cuda(), reason="built without CUDA")
def test_gpu_code_is_what_the_paths_need():
    code = info.gpu_code(info.library_path())
    assert {"sm_80", "compute_80"} <= set(code)
    for device in devices()[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        assert {f"sm_{major}{minor}", f"sm_{major}{minor}a", "compute_80"} & set(code)


@pytest.mark.skipif(not pk.has_cuda() or shutil.which("cuobjdump") is None, reason="no cuobjdump to compare with")
def test_gpu_code_is_what_cuobjdump_finds():
    found = set()
    for option, suffix in (("--list-elf", "cubin"), ("--list-ptx", "ptx")):
        output = subprocess.run(
            ["cuobjdump", option, str(info.library_path())], capture_output=True, text=True, check=True
        ).stdout
        archs = re.findall(rf"\.sm_(\w+)\.{suffix}", output)
        assert archs
        found |= {f"{'sm' if suffix == 'cubin' else 'compute'}_{arch}" for arch in archs}
    assert set(info.gpu_code(info.library_path())) == found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_gpu_code_of_another_library(tmp_path):
    source, library = tmp_path / "kernel.cu", tmp_path / "kernel.so"
    source.write_text('extern "C" __global__ void kernel(float* x) { x[threadIdx.x] *= 2; }\n')
    targets = [("compute_86", "sm_86"), ("compute_90a", "sm_90a"), ("compute_90", "compute_90")]
    options = [f"-gencode=arch={arch},code={code}" for arch, code in targets]
    command = ["nvcc", "-shared", "-Xcompiler=-fPIC", *options, "-o", library, source]
    subprocess.run(command, check=True, capture_output=True)
    assert info.gpu_code(library) == ["compute_90", "sm_86", "sm_90a"]
    assert info.gpu_code(Path(torch._C.__file__)) == []

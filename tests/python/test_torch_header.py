"""punica_kernels/torch.h: compiled against the installed core and torch's headers, and called.

Needs a C++ compiler, CMake and a build tree of the core: `make build` leaves build/release; PUNICA_BUILD names another.
The results are compared with the Python package's, bit by bit: the same core computes both.
"""

import ctypes
import math
import os
import pathlib
import shutil
import subprocess

import punica_kernels as pk
import pytest
import torch
from op_cases import int32, make_adapters, make_cache, randn
from torch import Tensor
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).parents[2]
BUILD = pathlib.Path(os.environ.get("PUNICA_BUILD", ROOT / "build" / "release"))
DTYPE = torch.bfloat16

pytestmark = [
    pytest.mark.skipif(not (BUILD / "libpunica.a").exists(), reason="no build tree of the core"),
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="no CMake or C++ compiler"),
]


def installed(folder: pathlib.Path) -> pathlib.Path:
    prefix = folder / "prefix"
    command = ["cmake", "--install", BUILD, "--prefix", prefix, "--component", "cpp"]
    subprocess.run(command, check=True, capture_output=True)
    return prefix


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch_header")
    prefix = installed(folder)
    assert (prefix / "include/punica_kernels/torch.h").exists()
    # torch's own folders, and not those of a CUDA toolkit: the header needs none.
    lib = pathlib.Path(torch.__file__).parent / "lib"
    include = [path for path in cpp_extension.include_paths() if "torch" in pathlib.Path(path).parts]
    options = {"CMAKE_PREFIX_PATH": prefix, "TORCH_INCLUDES": ";".join(include), "TORCH_LIBRARY_DIR": lib}
    source = pathlib.Path(__file__).with_name("torch_header")
    commands = (
        ["cmake", "-S", source, "-B", folder / "build", *(f"-D{name}={value}" for name, value in options.items())],
        ["cmake", "--build", folder / "build"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    library = next((folder / "build").glob("lib*.so"))
    # Symbols of the core must not be found in the package's library, nor the other way round.
    torch.ops.load_library(str(library))
    assert ctypes.CDLL(str(library))
    return torch.ops.punica_torch_header


def test_bgmv(ops, device):
    adapters = make_adapters(3, 24, 40, DTYPE, device)
    x, y = randn(5, 40, dtype=DTYPE, device=device), randn(5, 24, dtype=DTYPE, device=device, seed=1)
    indices = torch.tensor([2, -1, 0, 1, 2], device=device)
    expected = y.clone()
    pk.dispatch_bgmv(expected, x, adapters.w_ptr, indices, adapters.layer, 0.5)
    version = y._version
    ops.dispatch_bgmv(y, x, adapters.w_ptr, indices, adapters.layer, 0.5)
    assert torch.equal(y, expected)
    assert y._version == version + 1


@pytest.mark.parametrize("name", ["sgmv_shrink", "sgmv_cutlass"])
@pytest.mark.parametrize("with_tmp", [True, False])
def test_sgmv(ops, name, with_tmp, device):
    adapters = make_adapters(2, *((24, 40) if name == "sgmv_shrink" else (40, 24)), DTYPE, device)
    x, y = randn(9, 40, dtype=DTYPE, device=device), randn(9, 24, dtype=DTYPE, device=device, seed=1)
    start, end = int32([0, 5], device), int32([4, 9], device)
    bytes_ = ops.sgmv_tmp_size(2)
    assert bytes_ == pk.sgmv_cutlass_tmp_size(2)
    size = bytes_ if name == "sgmv_cutlass" else 8 << 20
    tmp = torch.empty(size, dtype=torch.uint8, device=device) if with_tmp else None
    expected = y.clone()
    arguments = (adapters.w_ptr, start, end, tmp, adapters.layer)
    getattr(pk, name)(expected, x, *arguments)
    getattr(ops, f"dispatch_{name}")(y, x, *arguments)
    assert torch.equal(y, expected)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", ["init_kv", "append_kv"])
def test_kv_writes(ops, name, device):
    lengths, new = [21, 5, 16], [20, 5, 1]
    caches = [make_cache(lengths, 2, 16, 64, DTYPE, device) for _ in range(2)]
    rows = sum(new) if name == "init_kv" else len(lengths)
    k, v = (randn(rows, 2, 64, dtype=DTYPE, device=device, seed=seed) for seed in (1, 2))
    last = (int32([0, 20, 25, 26], device),) if name == "init_kv" else ()
    before = caches[0].memory.clone()
    getattr(pk, name)(*caches[0].tables, k, v, *last, *caches[0].scalars)
    version = caches[1].kv_ptrs._version
    getattr(ops, name)(*caches[1].tables, k, v, *last, *caches[1].scalars)
    assert caches[1].kv_ptrs._version == version + 1
    assert same_bits(caches[0].memory, caches[1].memory)
    assert not same_bits(before, caches[1].memory)


@pytest.mark.parametrize("theta", [None, 1e4])
@pytest.mark.parametrize("with_tmp", [True, False])
def test_attention(ops, theta, with_tmp, device):
    cache = make_cache([700, 5, 16], 2, 16, 64, DTYPE, device)
    tmp = torch.empty(64 << 20, dtype=torch.uint8, device=device) if with_tmp else None
    indptr = int32([0, 7, 12, 14], device)
    for name, rows, queries in (("batch_decode", 3, ()), ("batch_prefill", 14, (indptr,))):
        q = randn(rows, 8, 64, dtype=DTYPE, device=device, seed=3)
        results = []
        for ours in (True, False):
            o, lse = torch.full_like(q, math.nan), torch.full((rows, 8), math.nan, device=device)
            arguments = (o, q, *queries, *cache.tables, tmp, *cache.scalars)
            if ours:
                getattr(ops, name)(*arguments, theta, lse)
            else:
                getattr(pk, name)(*arguments, rope_theta=theta, lse=lse)
            results.append((o, lse))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert not results[0][0].isnan().any()


def test_attention_as_the_document_calls_it(ops, device):
    cache = make_cache([700, 5, 16], 2, 16, 64, DTYPE, device)
    tmp = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    q = randn(3, 8, 64, dtype=DTYPE, device=device, seed=3)
    o, expected = torch.empty_like(q), torch.empty_like(q)
    ops.batch_decode_as_documented(o, q, *cache.tables, tmp, *cache.scalars)
    pk.batch_decode(expected, q, *cache.tables, tmp, *cache.scalars)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("with_residual", [True, False])
def test_rms_norm(ops, with_residual, device):
    x, weight = randn(6, 100, dtype=DTYPE, device=device), randn(100, dtype=DTYPE, device=device, seed=1)
    residuals = [randn(6, 100, dtype=DTYPE, device=device, seed=2) if with_residual else None for _ in range(2)]
    outputs = [torch.empty_like(x) for _ in range(2)]
    pk.rms_norm(outputs[0], x, weight, 1e-5, residual=residuals[0])
    ops.dispatch_rms_norm(outputs[1], x, weight, 1e-5, residuals[1])
    assert torch.equal(*outputs)
    if with_residual:
        assert torch.equal(*residuals)


def test_strided_rows(ops, device):
    wide, weight = randn(6, 120, dtype=DTYPE, device=device), torch.ones(50, dtype=DTYPE, device=device)
    output, expected = torch.zeros(6, 90, dtype=DTYPE, device=device), torch.empty(6, 50, dtype=DTYPE, device=device)
    ops.dispatch_rms_norm(output[:, 20:70], wide[:, 30:80], weight, 1e-5, None)
    pk.rms_norm(expected, wide[:, 30:80].contiguous(), weight, 1e-5)
    assert torch.equal(output[:, 20:70], expected)
    assert (output[:, :20] == 0).all() and (output[:, 70:] == 0).all()


def test_errors(ops, device):
    x, weight = randn(6, 100, dtype=DTYPE, device=device), torch.ones(100, dtype=DTYPE, device=device)
    output = torch.zeros_like(x)
    wrong = {
        r"punica_kernels.rms_norm: weight must have shape \[100\]": (output, x, weight[:99], 1e-5, None),
        "punica_kernels.rms_norm: input": (output, x.float(), weight, 1e-5, None),
        "punica_kernels.rms_norm: epsilon": (output, x, weight, -1.0, None),
        "punica_kernels.rms_norm: tensors must be strided": (output, x.to_sparse(), weight, 1e-5, None),
        "punica_kernels.rms_norm: a tensor requires grad": (output, x, weight.clone().requires_grad_(), 1e-5, None),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            ops.dispatch_rms_norm(*arguments)
    with pytest.raises(RuntimeError, match=r"punica_kernels\.rms_norm: weight is missing"):
        ops.rms_norm_of_nothing(output, x)
    with pytest.raises(RuntimeError, match=r"punica_kernels\.sgmv_tmp_size: num_problems must be at least 0, got -1"):
        ops.sgmv_tmp_size(-1)
    assert (output == 0).all()
    assert output._version == 0
    with torch.no_grad():
        ops.dispatch_rms_norm(output, x, weight.clone().requires_grad_(), 1e-5, None)
    assert (output != 0).any()


@pytest.mark.skipif(not torch.cuda.is_available() or not pk.has_cuda(), reason="needs a CUDA device")
def test_current_stream_and_graphs(ops):
    x, weight = randn(6, 4096, dtype=DTYPE, device="cuda"), torch.ones(4096, dtype=DTYPE, device="cuda")
    output, expected = torch.zeros_like(x), torch.empty_like(x)
    cache = make_cache([700, 5, 16], 2, 16, 64, DTYPE, "cuda")
    q = randn(3, 8, 64, dtype=DTYPE, device="cuda", seed=3)
    o, expected_o = torch.zeros_like(q), torch.empty_like(q)

    def run() -> None:
        ops.dispatch_rms_norm(output, x, weight, 1e-5, None)
        ops.batch_decode(o, q, *cache.tables, None, *cache.scalars, None, None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # work on another stream would end the capture with an error
        run()
    x.normal_(generator=torch.Generator("cuda").manual_seed(5))
    q.normal_(generator=torch.Generator("cuda").manual_seed(6))
    graph.replay()
    pk.rms_norm(expected, x, weight, 1e-5)
    pk.batch_decode(expected_o, q, *cache.tables, None, *cache.scalars)
    assert torch.equal(output, expected)
    assert torch.equal(o, expected_o)

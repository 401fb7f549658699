"""What is true on CUDA alone: streams, graphs, no synchronisation, no memory but torch's, checks on request, paths.

That results are right there is in the tests of each operation, which run on every device.
"""

import gc
import json
import os
import pathlib
import subprocess
import sys
import warnings

import punica_kernels as pk
import pytest
import torch
from conftest import DEVICES
from cuda_cases import OPS, Call, make, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, int32, make_adapters, make_cache, public, randn
from test_errors import VALID, contents_cases
from torch import Tensor

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a library built for it")
HERE = pathlib.Path(__file__).parent


@pytest.fixture
def checks():
    before = pk.set_checks(True)
    yield
    pk.set_checks(before)


# ------------------------------------------------------------------------------------------------- graphs and streams


def copy_arguments(to: Call, source: Call) -> None:
    for name, value in source.arguments.items():
        if isinstance(value, Tensor):
            to.arguments[name].copy_(value)
    torch.cuda.synchronize()


def written_by(static: Call, case: Call) -> list[Tensor]:
    """What a graph that was captured with `static` writes once it has the contents of `case`."""
    outputs = [tensor for tensor in static.written if any(tensor is value for value in static.arguments.values())]
    torch.cuda.synchronize()
    return [tensor.clone().view(torch.uint8) for tensor in (outputs or case.written)]


@pytest.mark.parametrize("op", OPS)
def test_graph_replays_with_other_contents(op):
    static = make(op, 0)
    static.result()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.run()
    results = []
    for seed in (0, 1, 2, 4):
        case = make(op, seed)
        expected = case.result()
        before = case.snapshot()
        copy_arguments(static, case)
        for _ in range(2):
            graph.replay()
            ours = written_by(static, case)
            assert same(ours, expected), f"seed {seed}"
            copy_arguments(static, case)
            case.restore(before)
        results.append(expected)
    assert not same(results[0], results[1])


@pytest.mark.parametrize("op", OPS)
def test_graph_of_several_calls(op):
    """Whatever one call leaves behind, the next one must not find: the graph is a chain of dependent launches."""
    cases = [make(op, seed) for seed in (0, 1, 2)]
    expected = [case.result() for case in cases]
    before = [case.snapshot() for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case in cases:
            case.run()
    for _ in range(3):
        for case, saved in zip(cases, before, strict=True):
            case.restore(saved)
        graph.replay()
        for case, result in zip(cases, expected, strict=True):
            assert same(case.snapshot(), result)


@pytest.mark.parametrize("op", OPS)
def test_other_stream(op):
    """The input is written late on the current stream; the default stream is idle all the while."""
    case = make(op, 1)
    name = next(name for name in ("x", "q", "k", "input", "indices") if name in case.arguments)
    late, expected = case.arguments[name].clone(), case.result()
    before = case.snapshot()
    case.arguments[name].zero_()
    assert not same(case.result(), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        case.arguments[name].copy_(late)
        case.run()
    stream.synchronize()
    assert same(case.snapshot(), expected)
    case.restore(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_other_device(op):
    """The tensors' device counts, not the current one, which stays what it was."""
    here, there = make(op, 1, "cuda:0"), make(op, 1, "cuda:1")
    for current, case in ((1, here), (0, there)):
        with torch.cuda.device(current):
            case.run()
            assert torch.cuda.current_device() == current
        torch.cuda.synchronize(1 - current)
    for a, b in zip(here.written, there.written, strict=True):
        assert torch.equal(a.view(torch.uint8).cpu(), b.view(torch.uint8).cpu())


@pytest.mark.parametrize("op", OPS)
def test_does_not_synchronise(op):
    """The call is back while the stream has not even begun with it."""
    case = make(op, 0)
    case.result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        done = torch.cuda.Event()
        done.record()
        case.run()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("op", OPS)
def test_allocates_from_torch_alone(op):
    cases = [make(op, seed) for seed in (0, 1, 2)]
    for case in cases:
        case.run()
    gc.collect()
    torch.cuda.synchronize()
    free, reserved, allocated = (
        torch.cuda.mem_get_info()[0],
        torch.cuda.memory_reserved(),
        torch.cuda.memory_allocated(),
    )
    for _ in range(20):
        for case in cases:
            case.run()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() == free + reserved
    assert torch.cuda.memory_allocated() == allocated


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("wrong", list(contents_cases()), ids=str)
def test_checks_of_contents(wrong, checks):
    """With checks on, CUDA refuses what the CPU refuses, in the same words, and writes nothing."""
    messages = []
    for device in ("cpu", "cuda"):
        arguments = VALID[wrong.op](device)
        arguments[wrong.argument] = wrong.change(arguments)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(RuntimeError) as caught:
            public(wrong.op)(**arguments)
        messages.append(str(caught.value))
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"punica_kernels.{wrong.op}: ")


@pytest.mark.parametrize("op", OPS)
def test_valid_calls_pass_the_checks(op, checks):
    case = make(op, 0)
    with_checks = case.result()
    pk.set_checks(False)
    assert same(with_checks, case.result())


# Every operation with one table that is wrong; not one of addresses, which kernels trust, nor one that makes a sequence
# reach the null addresses around those in use.
WRONG_TABLES = """
import json
import torch, punica_kernels as pk
from op_cases import public
from test_errors import VALID, contents_cases
said = {}
for wrong in contents_cases():
    if wrong.argument in ("kv_ptrs", "w_ptr", "a_ptr", "b_ptr", "kv_indptr") or wrong.op in said:
        continue
    arguments = VALID[wrong.op]("cuda")
    arguments[wrong.argument] = wrong.change(arguments)
    try:
        said[wrong.op] = public(wrong.op)(**arguments)
        torch.cuda.synchronize()
    except RuntimeError as error:
        said[wrong.op] = str(error)
print(json.dumps(said))
"""


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_environment_turns_checks_on(value):
    result = run_python("-c", WRONG_TABLES, PUNICA_CHECK=value)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert set(said) == set(OPS) - {"rms_norm"}
    for op, message in said.items():
        if value == "1":
            assert message is not None, op
            assert message.startswith(f"punica_kernels.{op}: ")
        else:
            assert message is None, op


# A process of its own: one warning is all that a process gets.
CAPTURE = """
import json, warnings
import torch, punica_kernels as pk
from cuda_cases import make
cases = [make("dispatch_bgmv", 0), make("batch_decode", 0)]
for case in cases:
    case.result()
pk.set_checks(True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for case in cases + cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.run()
        graph.replay()
    torch.cuda.synchronize()
print(json.dumps([str(w.message) for w in caught if "punica_kernels" in str(w.message)]))
"""


def run_python(*command: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


def test_capture_skips_the_checks_with_one_warning():
    result = run_python("-c", CAPTURE)
    assert result.returncode == 0, result.stderr
    lines = json.loads(result.stdout.splitlines()[-1])
    assert len(lines) == 1
    assert "not checked while a CUDA graph is captured" in lines[0]


def test_no_warning_without_checks():
    case = make("dispatch_bgmv", 0)
    case.result()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            case.run()
    assert not [w for w in caught if "punica_kernels" in str(w.message)]


def test_hostile_tables():
    """Garbage in every table, checks off: nothing beside the outputs changes. (Made for compute-sanitizer too.)"""
    result = run_python(str(HERE / "cuda_hostile.py"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "nothing beside the outputs was written"


# --------------------------------------------------------------------------------------------------------- code paths


def best_arch() -> str:
    return "sm_90" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_forced_arch(arch):
    """The results are right, and the kernels' own names say which path ran."""
    if arch == "sm_90" and best_arch() != arch:
        result = run_python("-c", "import punica_kernels; punica_kernels.active_cuda_arch()", PUNICA_CUDA_ARCH=arch)
        assert (
            "punica_kernels.active_cuda_arch: the environment variable PUNICA_CUDA_ARCH must be one of sm_80"
            in result.stderr
        )
        return
    result = run_python(str(HERE / "cuda_arch_script.py"), PUNICA_CUDA_ARCH=arch)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["active"] == arch
    assert set(report["last"]) == set(OPS)
    wanted = "Arch)0" if arch == "sm_80" else "Arch)1"
    for op in OPS:
        assert set(report["last"][op]) == {arch}, op
        names = report["kernels"][op]
        assert names, f"{op}: the profiler saw no kernel"
        assert all(wanted in name for name in names), (op, names)


def test_default_arch():
    if "PUNICA_CUDA_ARCH" not in os.environ:
        assert pk.active_cuda_arch() == best_arch()
    assert pk.active_cuda_arch("cuda:0") == pk.active_cuda_arch(0) == pk.active_cuda_arch(torch.device("cuda", 0))
    make("rms_norm", 0).run()
    assert pk.last_cuda_arch() == pk.active_cuda_arch()
    with pytest.raises(RuntimeError, match=r"active_cuda_arch: device must be a CUDA device, got cpu"):
        pk.active_cuda_arch("cpu")
    with pytest.raises(RuntimeError):
        pk.active_cuda_arch(1000)


def test_an_unknown_arch_stops_every_operation():
    code = (
        "import torch, punica_kernels as pk; x = torch.ones(2, 8, device='cuda')\n"
        "try: pk.rms_norm(x, x, torch.ones(8, device='cuda'), 1e-5)\n"
        "except RuntimeError as error: print(error); assert (x == 1).all()"
    )
    result = run_python("-c", code, PUNICA_CUDA_ARCH="sm_42")
    assert "PUNICA_CUDA_ARCH must be one of" in result.stdout, result
    assert "got sm_42" in result.stdout


# --------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("op", OPS)
def test_runs_repeat(op):
    for seed in (0, 1, 2):
        case = make(op, seed)
        first = case.result()
        for _ in range(5):
            assert same(case.result(), first)


# A batch is cut into tiles and goes to one kernel or another by its size: the rows at either side of every such border.
COUNTS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(512, 16), (16, 512), (96, 40), (33, 5)], ids=str)
def test_lora_rows_alone(shape, dtype):
    """A row's bits, alone and in batches of every size, at every position, for every op and both popularities."""
    d_in, d_out = shape
    most = max(COUNTS)
    x, y = randn(most, d_in, dtype=dtype, device="cuda", seed=1), randn(most, d_out, dtype=dtype, device="cuda", seed=2)
    for op in ("dispatch_bgmv", "sgmv_shrink", "sgmv_cutlass"):
        adapters = make_adapters(2, *((d_in, d_out) if op == "sgmv_cutlass" else (d_out, d_in)), dtype, "cuda")

        def run(rows, chosen, op=op, adapters=adapters):
            ours = y[rows].clone()
            if op == "dispatch_bgmv":
                index = torch.full((len(ours),), chosen, device="cuda")
                pk.dispatch_bgmv(ours, x[rows], adapters.w_ptr, index, 1, 0.5)
            else:
                bounds = int32([0], "cuda"), int32([len(ours)], "cuda")
                getattr(pk, op)(ours, x[rows], adapters.w_ptr[chosen : chosen + 1], *bounds, None, 1)
            return ours

        alone = torch.cat([run(slice(i, i + 1), 0) for i in range(most)])
        for count in COUNTS:
            assert torch.equal(run(slice(0, count), 0), alone[:count]), (op, count)
            assert torch.equal(run(slice(most - count, most), 0), alone[most - count :]), (op, count)
        # Every other row with another adapter, or in a segment of its own.
        mixed = y.clone()
        if op == "dispatch_bgmv":
            pk.dispatch_bgmv(mixed, x, adapters.w_ptr, torch.arange(most, device="cuda") % 2, 1, 0.5)
        else:
            start = torch.arange(most, dtype=torch.int32, device="cuda")
            getattr(pk, op)(mixed, x, adapters.w_ptr[start.long() % 2], start, start + 1, None, 1)
        assert torch.equal(mixed[::2], alone[::2]), op


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_lora_batch(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    d_in, d_out, rows = (data.draw(st.integers(1, n)) for n in (300, 300, 90))
    adapters = make_adapters(3, d_out, d_in, dtype, "cuda", seed=7)
    x = randn(rows, d_in, dtype=dtype, device="cuda", seed=1)
    y = randn(rows, d_out, dtype=dtype, device="cuda", seed=2)
    index = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=rows, max_size=rows)), device="cuda")
    ours, again = y.clone(), y.clone()
    pk.dispatch_bgmv(ours, x, adapters.w_ptr, index, 1, 0.7)
    pk.dispatch_bgmv(again, x, adapters.w_ptr, index, 1, 0.7)
    assert torch.equal(ours, again)
    for i in {0, rows // 2, rows - 1}:
        alone = y[i : i + 1].clone()
        pk.dispatch_bgmv(alone, x[i : i + 1], adapters.w_ptr, index[i : i + 1], 1, 0.7)
        assert torch.equal(alone[0], ours[i])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_attention_batch(data):
    """The bits of each sequence alone are its bits in the batch; those of a chunk are those of its queries together."""
    dtype = data.draw(st.sampled_from(DTYPES))
    page_size, head_dim = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.sampled_from([6, 64, 128]))
    lengths = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=6))
    q_lens = [data.draw(st.integers(0, min(length, 80))) for length in lengths]
    cache = make_cache(lengths, 2, page_size, head_dim, dtype, "cuda")
    total = sum(q_lens)
    q = randn(total, 8, head_dim, dtype=dtype, device="cuda", seed=3)

    def prefill(of: list[int], counts: list[int], queries: Tensor) -> Tensor:
        o = torch.zeros_like(queries)
        indptr = int32([sum(counts[:i]) for i in range(len(counts) + 1)], "cuda")
        parts = [cache.kv_ptrs[cache.kv_indptr[i] : cache.kv_indptr[i + 1]] for i in of]
        bounds = int32([sum(len(p) for p in parts[:i]) for i in range(len(parts) + 1)], "cuda")
        tables = (torch.cat(parts), bounds, cache.last_page_offset[of].clone())
        pk.batch_prefill(o, queries, indptr, *tables, None, *cache.scalars)
        return o

    together = prefill(list(range(len(lengths))), q_lens, q)
    begin = 0
    for i, q_len in enumerate(q_lens):
        mine = q[begin : begin + q_len]
        assert torch.equal(prefill([i], [q_len], mine), together[begin : begin + q_len])
        if q_len > 1:
            tail = data.draw(st.integers(1, q_len))
            assert torch.equal(prefill([i], [tail], mine[-tail:]), together[begin + q_len - tail : begin + q_len])
        begin += q_len
    o, q1 = (torch.zeros(len(lengths), 8, head_dim, dtype=dtype, device="cuda") for _ in range(2))
    q1.copy_(randn(*q1.shape, dtype=dtype, device="cuda", seed=4))
    pk.batch_decode(o, q1, *cache.tables, None, *cache.scalars)
    for i in range(len(lengths)):
        alone = torch.zeros_like(o[:1])
        tables = (cache.kv_ptrs, cache.kv_indptr[i : i + 2].clone(), cache.last_page_offset[i : i + 1].clone())
        pk.batch_decode(alone, q1[i : i + 1], *tables, None, *cache.scalars)
        assert torch.equal(alone[0], o[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [7, 64, 576, 4096, 4099, 29568])
def test_norm_rows_alone(columns, dtype):
    """Many rows or one, aligned or not."""
    x, weight = randn(129, columns, dtype=dtype, device="cuda"), randn(columns, dtype=dtype, device="cuda", seed=1)
    alone = torch.empty_like(x)
    for i in range(len(x)):
        pk.rms_norm(alone[i : i + 1], x[i : i + 1], weight, 1e-5)
    for count in COUNTS:
        ours = torch.empty_like(x[:count])
        pk.rms_norm(ours, x[:count], weight, 1e-5)
        assert torch.equal(ours, alone[:count])
    odd = torch.empty(129 * columns + 1, dtype=dtype, device="cuda")[1:].view(129, columns)
    pk.rms_norm(odd, x, weight, 1e-5)
    assert torch.equal(odd, alone)
    # So many that the kernel for large inputs runs.
    times = (80 << 20) // (2 * x.nbytes) + 1
    many = x.repeat(times, 1)
    pk.rms_norm(many, many, weight, 1e-5)
    assert torch.equal(many.view(times, *x.shape), alone.expand(times, -1, -1))

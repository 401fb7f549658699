"""The operations among torch's own: dispatcher, compiler, transforms, modes, autograd's rules, threads."""

import subprocess
import sys
import threading
import time

import punica_kernels as pk
import pytest
import torch
from op_cases import int32, make_adapters, make_cache, public, randn
from punica_kernels import _library
from test_errors import TENSORS, VALID, WRITTEN
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

OPS = list(VALID)


def overload(op):
    return getattr(torch.ops.punica_kernels, op).default


def split(op):
    """The valid call as the dispatcher takes it: positional arguments, and those that are keyword-only."""
    arguments = VALID[op]()
    keyword_only = {a.name for a in overload(op)._schema.arguments if a.kwarg_only}
    return (
        tuple(v for n, v in arguments.items() if n not in keyword_only),
        {n: v for n, v in arguments.items() if n in keyword_only},
    )


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    args, kwargs = split(op)
    torch.library.opcheck(overload(op), args, kwargs)


@pytest.mark.parametrize("op", OPS)
def test_schema_declares_what_is_written(op):
    declared = {a.name for a in overload(op)._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    expected = set(WRITTEN[op]) or {"kv_ptrs"}
    assert declared == expected
    assert len(overload(op)._schema.returns) == 0


@pytest.mark.parametrize("op", OPS)
def test_both_ways_agree(op):
    direct, through = VALID[op](), VALID[op]()
    public(op)(**direct)
    getattr(torch.ops.punica_kernels, op)(**through)
    for name in WRITTEN[op]:
        if direct[name] is not None:
            assert torch.equal(direct[name], through[name])
            assert not torch.equal(direct[name], VALID[op]()[name]) or name in ("tmp", "tmpbuf")


# ------------------------------------------------------------------------------------------------------ the direct way

KERNELS = {
    "batch_prefill": pk.attention._prefill, "batch_decode": pk.attention._decode, "init_kv": pk.kv_cache._init_kv,
    "append_kv": pk.kv_cache._append_kv, "dispatch_bgmv": pk.lora._bgmv, "sgmv_shrink": pk.lora._shrink,
    "sgmv_cutlass": pk.lora._cutlass, "add_lora": pk.lora._add_lora, "update_lora_batch": pk.lora_batch._update,
    "rms_norm": pk.norm._rms_norm,
}  # fmt: skip


class PassingMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_ordinary_calls_take_the_direct_way(op, monkeypatch):
    def long_way(*_):
        pytest.fail("the long way was taken")

    monkeypatch.setattr(KERNELS[op], "held", long_way)
    monkeypatch.setattr(KERNELS[op], "released", long_way)
    public(op)(**VALID[op]())
    with torch.inference_mode():
        public(op)(**VALID[op]())
    arguments = VALID[op]()
    with pytest.raises(pytest.fail.Exception), PassingMode():
        public(op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_direct_calls_keep_nothing(op):
    arguments = VALID[op]()
    objects = [*arguments.values(), *map(type, arguments.values()), None, True, False, RuntimeError]

    def counts():
        return [sys.getrefcount(value) for value in objects]

    public(op)(**arguments)
    before = counts()
    for _ in range(100):
        public(op)(**arguments)
    after = counts()
    # Others may make and free some meanwhile, but not one at every call.
    assert all(abs(b - a) < 50 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_refused_direct_calls_keep_nothing(op):
    arguments = VALID[op]()
    first = TENSORS[op][0]
    wrong = arguments | {first: arguments[first][None]}
    objects = [*wrong.values(), *map(type, wrong.values()), None, True, False, RuntimeError]
    direct, before = KERNELS[op].shortcut, None
    count = {
        "add_lora": 17,
        "update_lora_batch": 8,
        "init_kv": 11,
        "append_kv": 10,
        "dispatch_bgmv": 7,
        "rms_norm": 6,
        "batch_decode": 17,
        "batch_prefill": 18,
    }
    values = [*wrong.values(), *[0] * 18][: count.get(op, 8)]
    for _ in range(100):
        assert direct(*values) is False
        if before is None:
            before = [sys.getrefcount(value) for value in objects]
    after = [sys.getrefcount(value) for value in objects]
    assert all(abs(b - a) < 50 for a, b in zip(before, after, strict=True))
    assert direct() is False
    assert direct(*[None] * len(values)) is False
    assert direct(*["text"] * len(values)) is False


# ----------------------------------------------------------------------------------------------------------- compiling


def layer(x, weight, w_ptr, indices):
    normed = torch.empty_like(x)
    pk.rms_norm(normed, x, weight, 1e-5)
    y = normed * 2
    pk.dispatch_bgmv(y, normed, w_ptr, indices, 1, 0.5)
    return torch.relu(y) + x


def layer_arguments():
    adapters = make_adapters(3, 16, 16, torch.float32)
    indices = torch.tensor([0, 2, -1, 1])
    return adapters, (randn(4, 16, dtype=torch.float32), torch.ones(16), adapters.w_ptr, indices)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    _adapters, arguments = layer_arguments()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        compiled(*arguments), layer(*arguments), rtol=0, atol=0 if backend != "inductor" else 1e-6
    )
    with torch.no_grad():
        compiled(*arguments)


def test_compile_with_symbolic_sizes():
    torch._dynamo.reset()
    adapters, (x, weight, w_ptr, indices) = layer_arguments()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 3, 2):
        arguments = (x[:count].clone(), weight, w_ptr, indices[:count].clone())
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert len(adapters.weights) == 3


def writes_and_reads(kv_ptrs, kv_indptr, last_page_offset, k, v, q, scalars):
    tables = (kv_ptrs, kv_indptr, last_page_offset)
    results = [torch.empty_like(q) for _ in range(3)]
    pk.batch_decode(results[0], q, *tables, None, *scalars)
    pk.append_kv(*tables, k, v, *scalars)
    pk.batch_decode(results[1], q, *tables, None, *scalars)
    pk.init_kv(*tables, v, k, torch.arange(3, dtype=torch.int32), *scalars)
    pk.batch_prefill(results[2], q, torch.arange(3, dtype=torch.int32), *tables, None, *scalars)
    pk.append_kv(*tables, 2 * k, v, *scalars)  # nothing in the graph reads this one
    return results


def kv_arguments():
    cache = make_cache([9, 4], 2, 4, 8, torch.float32)
    return cache, *(randn(2, n, 8, dtype=torch.float32, seed=s) for n, s in ((2, 1), (2, 2), (4, 3)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_kv_writes_keep_their_order(backend):
    torch._dynamo.reset()
    cache, k, v, q = kv_arguments()
    expected = writes_and_reads(*cache.tables, k, v, q, cache.scalars)
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[1], expected[2])
    other, k, v, q = kv_arguments()
    results = torch.compile(writes_and_reads, fullgraph=True, backend=backend)(*other.tables, k, v, q, other.scalars)
    for ours, eager in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    for i in range(2):
        assert torch.equal(other.tokens(i), cache.tokens(i))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_kv_write_through_a_table_made_in_the_graph(backend):
    """Nothing in the graph reads the table afterwards, and still the write is no dead code."""
    torch._dynamo.reset()

    def write(kv_ptrs, kv_indptr, last_page_offset, k, v, scalars):
        pk.append_kv(kv_ptrs + 0, kv_indptr, last_page_offset, k, v, *scalars)
        return k + 1

    cache, k, v, _ = kv_arguments()
    torch.compile(write, fullgraph=True, backend=backend)(*cache.tables, k, v, cache.scalars)
    for i in range(2):
        assert torch.equal(cache.tokens(i)[:, :, -1], torch.stack((k[i], v[i])))


def test_early_reads_is_traced_away():
    torch._dynamo.reset()

    def inside(*arguments):
        with pk.early_reads():
            return layer(*arguments)

    _adapters, arguments = layer_arguments()
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(*arguments), layer(*arguments))
    assert not _library.function("early_reads")()


@pytest.mark.parametrize("op", OPS)
def test_make_fx(op):
    args, kwargs = split(op)
    graph = make_fx(lambda *a: overload(op)(*a, **kwargs))(*args)
    assert any(node.target is overload(op) for node in graph.graph.nodes)

    def function(*a):
        public(op)(*a, **kwargs)

    graph = make_fx(function)(*args)
    assert any(node.target is overload(op) for node in graph.graph.nodes)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op):
    """Nothing runs: a fake tensor has no memory. Outside of its mode too, where only its type tells."""
    real = VALID[op]()
    with FakeTensorMode() as mode:
        arguments = tree_map_only(Tensor, mode.from_tensor, real)
        assert public(op)(**arguments) is None
    assert public(op)(**arguments) is None


# ---------------------------------------------------------------------------------------------- modes and subclasses


@pytest.mark.parametrize("op", OPS)
def test_dispatch_mode_sees_the_op(op):
    seen = []

    class Recorder(PassingMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_dispatch__(function, types, args, kwargs)

    arguments = VALID[op]()
    with Recorder():
        public(op)(**arguments)
    assert overload(op) in seen


class Wrapper(Tensor):
    """Holds its data in another tensor: a direct call would find no memory in it."""

    @staticmethod
    def __new__(cls, data):
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data):
        self.data_inside = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda t: t.data_inside, (args, kwargs or {}))
        return function(*args, **kwargs)


class Named(Tensor):
    """A subclass with data of its own and nothing overridden."""


@pytest.mark.parametrize("op", OPS)
def test_subclasses(op):
    expected = VALID[op]()
    public(op)(**expected)
    for name in TENSORS[op]:
        for make in (Wrapper, lambda t: t.as_subclass(Named), torch.nn.Parameter):
            arguments = VALID[op]()
            plain = arguments[name]
            if plain is None or (make is torch.nn.Parameter and not plain.is_floating_point()):
                continue
            arguments[name] = make(plain)
            with torch.no_grad():
                public(op)(**arguments)
            arguments[name] = plain
            for written in WRITTEN[op]:
                if written not in ("tmp", "tmpbuf"):
                    assert torch.equal(arguments[written], expected[written])


# --------------------------------------------------------------------------------------------- transforms and autograd


def scaled(x, w_ptr):
    y = torch.zeros(4, 16)
    pk.dispatch_bgmv(y, x, w_ptr, torch.tensor([0, 2, -1, 1]), 1, 0.5)
    return y.sum()


def test_transforms_are_refused():
    adapters = make_adapters(3, 16, 8, torch.float32)
    x = randn(4, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"punica_kernels.dispatch_bgmv: torch.vmap is not supported"):
        torch.vmap(scaled, in_dims=(0, None))(torch.stack((x, x)), adapters.w_ptr)
    with pytest.raises(RuntimeError, match=r"punica_kernels.dispatch_bgmv: x requires grad.*no backward"):
        torch.func.grad(scaled)(x, adapters.w_ptr)
    with pytest.raises(RuntimeError, match=r"punica_kernels.dispatch_bgmv: x carries a tangent"):
        torch.func.jvp(lambda t: scaled(t, adapters.w_ptr), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=r"punica_kernels.dispatch_bgmv: x carries a tangent"):
            scaled(dual, adapters.w_ptr)
        scaled(x, adapters.w_ptr)
    scaled(x, adapters.w_ptr)


def test_compiling_with_a_tensor_that_requires_grad_is_refused():
    torch._dynamo.reset()
    adapters = make_adapters(3, 16, 8, torch.float32)
    x = randn(4, 8, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no backward"):
        compiled(x, adapters.w_ptr)
    with torch.no_grad():
        assert torch.equal(compiled(x, adapters.w_ptr), scaled(x.detach(), adapters.w_ptr))


@pytest.mark.parametrize("op", OPS)
def test_version_counter(op):
    for way in (public(op), getattr(torch.ops.punica_kernels, op)):
        arguments = VALID[op]()
        before = {n: v._version for n, v in arguments.items() if isinstance(v, Tensor)}
        way(**arguments)
        grown = {n for n, version in before.items() if arguments[n]._version > version}
        assert grown == {name for name in WRITTEN[op] or ["kv_ptrs"] if arguments[name] is not None}


def test_backward_notices_an_overwritten_input():
    """What the version counter is for."""
    x = torch.ones(2, 8, requires_grad=True)
    saved = x * 1
    loss = (saved * saved).sum()
    with torch.no_grad():
        pk.rms_norm(saved, saved.clone(), torch.ones(8), 1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op):
    with torch.inference_mode():
        arguments = VALID[op]()
        public(op)(**arguments)
        getattr(torch.ops.punica_kernels, op)(**arguments)
    public(op)(**arguments)  # inference tensors have no version counter, outside of the mode either
    with torch.inference_mode():
        public(op)(**VALID[op]())


# --------------------------------------------------------------------------------------------------- settings, threads


def test_early_reads_nests_and_is_restored():
    reads = _library.function("early_reads")
    assert not reads()
    with pk.early_reads():
        assert reads()
        with pk.early_reads():
            assert reads()
        assert reads()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(reads()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
    assert not reads()
    promise = pk.early_reads()
    with pytest.raises(ValueError, match="inside"), promise, promise:
        raise ValueError("inside")
    assert not reads()


def test_set_checks():
    before = pk.set_checks(True)
    try:
        assert pk.set_checks(False) is True
        assert pk.set_checks(True) is False
    finally:
        pk.set_checks(before)


def long_call():
    """A call that takes some 0.2 s at least, and its result."""
    adapters = make_adapters(1, 4096, 2048, torch.float32, layers=1, layer=0)
    x = randn(1024, 2048, dtype=torch.float32)
    y = torch.zeros(1024, 4096)
    return adapters, lambda: pk.sgmv_shrink(y, x, adapters.w_ptr, int32([0]), int32([1024]), None, 0)


def test_long_calls_release_the_gil(threads):
    threads(1)
    _adapters, call = long_call()
    call()
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.02)
    start = time.perf_counter()
    call()
    end = time.perf_counter()
    stop.set()
    thread.join()
    # Held throughout, the other thread would not have had one turn well inside of the call.
    inside = [t for t in ticks if start + 0.2 * (end - start) < t < end - 0.2 * (end - start)]
    assert len(inside) >= 3, f"{len(inside)} turns in {end - start:.3f} s"


def test_short_calls_hold_the_gil():
    for family in (pk.lora._bgmv, pk.lora._add_lora, pk.attention._decode, pk.kv_cache._append_kv, pk.norm._rms_norm):
        assert family.held.release_gil is False
        assert family.released.release_gil is True


def test_two_threads_at_once():
    adapters = make_adapters(3, 700, 300, torch.bfloat16)
    index = torch.arange(40) % 3
    inputs = [randn(40, 300, dtype=torch.bfloat16, seed=s) for s in range(4)]
    expected = []
    for x in inputs:
        expected.append(torch.zeros(40, 700, dtype=torch.bfloat16))
        pk.dispatch_bgmv(expected[-1], x, adapters.w_ptr, index, 1, 1.0)
    wrong = []

    def run(i):
        for _ in range(30):
            y = torch.zeros(40, 700, dtype=torch.bfloat16)
            pk.dispatch_bgmv(y, inputs[i], adapters.w_ptr, index, 1, 1.0)
            if not torch.equal(y, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Nothing in the children but our operation may use torch's threads: GNU OpenMP, which torch runs on, hangs in a fork.
FORK = """
import os, torch, punica_kernels as pk
torch.set_num_threads(4)
w, x = torch.randn(1, 3000, 500), torch.randn(64, 500)
table, start, end = torch.tensor([w.data_ptr()]), torch.zeros(1, dtype=torch.int32), torch.full((1,), 64).int()
outputs = [torch.zeros(64, 3000) for _ in range(5)]
def run(y):
    pk.sgmv_shrink(y, x, table, start, end, None, 0)
    return bytes(y.numpy())
parent = run(outputs[0])  # the threads exist now
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(run(y) == parent for y in outputs[1:4]) else 1)
    children.append(child)
assert run(outputs[4]) == parent
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
"""


def test_fork():
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert result.stdout == "done\n", result.stderr


def test_package_does_not_import_the_engine():
    code = (
        "import sys, punica_kernels; print([m for m in sys.modules if m.startswith(('transformers', 'peft', 'rich'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr

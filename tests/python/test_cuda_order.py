"""Programmatic dependent launch: a kernel may start while the one before it runs, and must read only afterwards.

A kernel that lets its successors start at once, and writes half a millisecond later, stands before the operation. That
the tests can fail is seen in `early_reads`, where the operation is allowed to be wrong about that, and is.
"""

import contextlib

import punica_kernels as pk
import pytest
import torch
from conftest import DEVICES
from cuda_cases import LENGTHS, NEW, OPS, delayed_write, make, same
from op_cases import randn

pytestmark = [
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device and a library built for it"),
    pytest.mark.skipif(
        "cuda" in DEVICES and torch.cuda.get_device_capability() < (9, 0),
        reason="programmatic dependent launch came with compute capability 9.0",
    ),
]


def promised(early):
    """The context of a call: the caller's promise, or nothing."""
    return pk.early_reads() if early else contextlib.nullcontext()


def results_before_and_after(case):
    """What it computes with the contents of case.late[0], and with those of case.late[1]."""
    target, source = case.late
    old = target.clone()
    before = case.result()
    target.copy_(source)
    after = case.result()
    target.copy_(old)
    torch.cuda.synchronize()
    assert not same(before, after)
    return before, after


@pytest.mark.parametrize("op", OPS)
def test_stream_order_holds_for_everything(op):
    for seed in (0, 1, 2):
        case = make(op, seed)
        _, after = results_before_and_after(case)
        delayed_write(*case.late)
        case.run()
        assert same(case.snapshot(), after)


# Of adapters or tables. The attention kernels wait before they read anything, promise or not, and rms_norm reads
# nothing that the promise is about.
@pytest.mark.parametrize("op", ["dispatch_bgmv", "sgmv_shrink", "sgmv_cutlass", "add_lora", "init_kv", "append_kv"])
def test_early_reads_reads_early(op):
    if pk.active_cuda_arch() != "sm_90":
        pytest.skip("the sm_80 path reads in stream order always")
    case = make(op, 0)
    _, after = results_before_and_after(case)
    delayed_write(*case.late, microseconds=20_000)  # more than the host takes for the call when it is busy
    with pk.early_reads():
        case.run()
    assert not same(case.snapshot(), after)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_inputs_are_read_in_order(op, early):
    """x, q, k, v and the tensor that is updated come from the kernel before, whatever was promised."""
    for name in ("x", "y", "q", "k", "v", "input", "residual"):
        case = make(op, 0)
        if name not in case.arguments:
            continue
        target = case.arguments[name]
        source = randn(*target.shape, dtype=target.dtype, device="cuda", seed=77)
        old = target.clone()
        target.copy_(source)
        case.run()
        expected = case.snapshot()
        case = make(op, 0)
        target = case.arguments[name]
        assert torch.equal(target, old)
        case.result()
        delayed_write(target, source)
        with promised(early):
            case.run()
        assert same(case.snapshot(), expected), name


@pytest.mark.parametrize("early", [False, True])
def test_newest_tokens_are_read_in_order(early):
    """They come from append_kv or init_kv just before, under the promise too."""
    for op in ("batch_decode", "batch_prefill"):
        case = make(op, 0)
        cache = case.kept[0]
        lengths, new = LENGTHS[0], [1] * 4 if op == "batch_decode" else NEW[0]
        changed = cache.memory.clone()
        for i, length in enumerate(lengths):
            for position in range(max(0, length - new[i]), length):
                page = cache.pages[i][position // 16]
                start = (page.data_ptr() - cache.memory.data_ptr()) // cache.memory.itemsize
                view = changed[start : start + page.numel()].view(page.shape)
                view[cache.layer, :, :, position % 16] *= -2
        old = cache.memory.clone()
        cache.memory.copy_(changed)
        expected = case.result()
        cache.memory.copy_(old)
        assert not same(case.result(), expected)
        delayed_write(cache.memory, changed)
        with promised(early):
            case.run()
        assert same(case.snapshot(), expected), op


def idle(op):
    """A call in which no row has anything to do."""
    case = make(op, 0)
    if op == "dispatch_bgmv":
        case.arguments["indices"].fill_(-1)
    elif op.startswith("sgmv"):
        case.arguments["s_end"].copy_(case.arguments["s_start"])
    elif op == "add_lora":
        case.arguments["segment_adapter"].fill_(-1)
    elif op == "update_lora_batch":
        case.arguments["indices"] = case.arguments["indices"][:0]
    else:
        case.arguments["kv_indptr"].zero_()
    return case


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("op", [op for op in OPS if op != "rms_norm"])
def test_chain_through_a_call_without_work(op, early):
    """writer -> a call that skips every row -> a reader of what was written: the middle one must not let it through."""
    middle, last = idle(op), make("rms_norm", 0)
    target = last.arguments["input"]
    source = randn(*target.shape, dtype=target.dtype, device="cuda", seed=9)
    old = target.clone()
    target.copy_(source)
    expected = last.result()
    target.copy_(old)
    middle.result()
    for _ in range(3):
        target.copy_(old)
        before = last.snapshot()
        delayed_write(target, source)
        with promised(early):
            middle.run()
            last.run()
        assert same(last.snapshot(), expected)
        last.restore(before)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_an_updated_batch_is_seen(early, between):
    """writer of indices -> update -> (another kernel ->) add_lora, which reads the batch early where it may."""
    case, norm = make("add_lora", 0), make("rms_norm", 0)
    indices, new = (torch.tensor([(i * k) % 3 for i in range(40)], device="cuda") for k in (1, 2))
    batch = pk.LoraBatch(indices, 3)
    old = indices.clone()
    case.arguments |= {name: getattr(batch, name) for name in ("order", "segment_adapter", "segment_start", "counts")}
    stale = case.result()
    batch.update(new)
    expected = case.result()
    assert not same(stale, expected)
    for _ in range(5):
        indices.copy_(old)
        batch.update(indices)
        before = case.snapshot()
        delayed_write(indices, new)
        with promised(early):
            batch.update(indices)
            if between:
                norm.run()
            case.run()
        assert same(case.snapshot(), expected)
        case.restore(before)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_calls_that_share_a_workspace(given, early):
    """One that the caller gives to all of them, or what the allocator gives to one after another: the same memory."""
    cases = [make(op, seed) for seed in (0, 1, 2) for op in ("batch_decode", "batch_prefill")]
    expected = [case.result() for case in cases]
    if given:
        garbage = torch.full((256 << 20,), 255, dtype=torch.uint8, device="cuda")
        for case in cases:
            case.arguments["tmpbuf"] = garbage[1:]  # of any alignment
    for _ in range(20):
        before = [case.snapshot() for case in cases]
        with promised(early):
            for case in cases:
                case.run()
        for case, result, saved in zip(cases, expected, before, strict=True):
            assert same(case.snapshot(), result)
            case.restore(saved)

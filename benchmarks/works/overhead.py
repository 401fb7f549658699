"""What a call costs that has next to nothing to compute, with and without a busy Python thread beside the caller."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import punica_kernels as pk
import torch
from torch import Tensor

DTYPE = torch.bfloat16
# Calls timed together while nothing else runs. Few: a device that takes longer for a call than the host (attention: 7
# us in a chain) falls behind, and once its queue is full the host waits, so that the device would be measured.
BLOCK = 50
SECONDS = 0.3  # of calls with a busy thread


def tiny_calls(device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """Each operation on one row, or on one sequence of one token; and torch's add_, as a measure of what is usual."""
    hidden, rank, heads, head_dim, page_size = 64, 8, 2, 64, 16

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=DTYPE, device=device)

    x, v, y = tensor(1, hidden), tensor(1, rank), tensor(1, hidden)
    a, b_transposed, weight = tensor(1, rank, hidden), tensor(1, rank, hidden), tensor(hidden)
    a_ptr, b_ptr = (torch.tensor([w.data_ptr()], device=device) for w in (a, b_transposed))
    indices = torch.tensor([0], device=device)
    start, end = (torch.tensor([i], dtype=torch.int32, device=device) for i in (0, 1))
    tmp = torch.empty(pk.sgmv_cutlass_tmp_size(1), dtype=torch.uint8, device=device)
    page = tensor(1, 2, heads, page_size, head_dim)
    q, o, k = tensor(1, heads, head_dim), tensor(1, heads, head_dim), tensor(1, heads, head_dim)
    indptr, last = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1], [1]))
    pages = torch.tensor([page.data_ptr()], device=device)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    b = tensor(1, hidden, rank)
    a_ptrs, b_ptrs = a_ptr[None], torch.tensor([[b.data_ptr()]], device=device)
    ranks, scales = torch.tensor([rank], dtype=torch.int32, device=device), torch.ones(1, device=device)
    batch = pk.LoraBatch(indices, 1)
    kept = (a, b, b_transposed, page)  # by the closures below: the kernels know only their addresses

    def bgmv(kept: object = kept) -> None:
        pk.dispatch_bgmv(v, x, a_ptr, indices, 0, 1.0)

    return {
        "dispatch_bgmv": bgmv,
        "sgmv_shrink": lambda: pk.sgmv_shrink(v, x, a_ptr, start, end, tmp, 0),
        "sgmv_cutlass": lambda: pk.sgmv_cutlass(y, v, b_ptr, start, end, tmp, 0),
        "add_lora": lambda: pk.add_lora(y, x, a_ptrs, b_ptrs, ranks, scales, batch, 0),
        "LoraBatch.update": lambda: batch.update(indices),
        "rms_norm": lambda: pk.rms_norm(y, x, weight, 1e-5),
        # Written out: a call with *arguments costs Python 0.4 us more.
        "append_kv": lambda: pk.append_kv(pages, indptr, last, k, k, 1, 0, heads, page_size),
        "init_kv": lambda: pk.init_kv(pages, indptr, last, k, k, indptr, 1, 0, heads, page_size),
        "batch_decode": lambda: pk.batch_decode(o, q, pages, indptr, last, workspace, 1, 0, heads, page_size),
        "batch_prefill": lambda: pk.batch_prefill(o, q, indptr, pages, indptr, last, workspace, 1, 0, heads, page_size),
        "torch add_": lambda: x.add_(y),
    }


@contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that computes in Python all the time: it holds the GIL until it is asked to let go."""
    stop = threading.Event()

    def spin() -> None:
        count = 0
        while not stop.is_set():
            for _ in range(1000):
                count += 1

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def alone(call: Callable[[], Any]) -> float:
    """Seconds a call, in one block."""
    start = time.perf_counter()
    for _ in range(BLOCK):
        call()
    return (time.perf_counter() - start) / BLOCK


def beside(call: Callable[[], Any]) -> float:
    """Mean seconds a call beside the busy thread. The mean, for most calls are fast and a few wait for milliseconds.

    The two threads take turns: at best a call costs twice what it costs alone.
    """
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        call()
        calls += 1
    return elapsed / calls

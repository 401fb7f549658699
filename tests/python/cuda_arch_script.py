"""Runs every operation on CUDA against the reference, and prints which code path each one says it ran, and the names of
its kernels as the profiler sees them.

A program of test_cuda.py, which sets PUNICA_CUDA_ARCH.
"""

import json
from collections.abc import Callable

import punica_kernels as pk
import torch
from op_cases import DTYPES, check_add_lora, check_attention, check_bgmv, check_sgmv, make_cache, randn
from test_kv_cache import check_init_kv
from test_norm import check as check_rms_norm
from torch.profiler import ProfilerActivity, profile

last: dict[str, list[str | None]] = {}
kernels: dict[str, set[str]] = {}


def run(op: str, body: Callable[[], None]) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        body()
        torch.cuda.synchronize()
    last.setdefault(op, []).append(pk.last_cuda_arch())
    kernels.setdefault(op, set()).update(
        event.name for event in profiler.events() if "punica::" in event.name and "(" in event.name
    )


def append_kv(dtype: torch.dtype) -> None:
    cache = make_cache([5], 2, 4, 8, dtype, "cuda")
    k = randn(1, 2, 8, dtype=dtype, device="cuda")
    pk.append_kv(*cache.tables, k, k, *cache.scalars)
    assert torch.equal(cache.tokens(0)[0, :, -1], k[0])


def update_lora_batch(rows: int) -> None:
    batch = pk.LoraBatch(torch.arange(rows, device="cuda") % 5, 5)
    expected = [t for i in range(5) for t in range(i, rows, 5)]
    assert batch.order.tolist() == expected


assert pk.last_cuda_arch() is None
for dtype in DTYPES:
    for shape in ((70, 16), (16, 70), (33, 5), (512, 16), (16, 512)):
        run("dispatch_bgmv", lambda s=shape, t=dtype: check_bgmv(*s, t, "cuda"))
        for name in ("sgmv_shrink", "sgmv_cutlass"):
            run(name, lambda s=shape, t=dtype, n=name: check_sgmv(n, *s, t, "cuda"))
    for rows in (1, 40, 600):
        run("add_lora", lambda t=dtype, n=rows: check_add_lora([16, 3, 40], 96, [0, 64], t, "cuda", [1, 0, 2, -1] * n))
        run("update_lora_batch", lambda n=rows: update_lora_batch(n))
    for head_dim in (64, 6, 128):
        for options in ({}, {"rope_theta": 1e4, "window_left": 9}):
            run(
                "batch_decode",
                lambda t=dtype, d=head_dim, o=options: check_attention(
                    [21, 3], None, t, "cuda", head_dim=d, decode=True, **o
                ),
            )
            run(
                "batch_prefill",
                lambda t=dtype, d=head_dim, o=options: check_attention([21, 3], [5, 3], t, "cuda", head_dim=d, **o),
            )
    for residual in (False, True):
        run("rms_norm", lambda t=dtype, r=residual: check_rms_norm(3, 100, t, "cuda", residual=r))
    run("init_kv", lambda t=dtype: check_init_kv([9, 4], [9, 2], t, "cuda"))
    run("append_kv", lambda t=dtype: append_kv(t))
print(
    json.dumps(
        {"active": pk.active_cuda_arch(), "last": last, "kernels": {op: sorted(names) for op, names in kernels.items()}}
    )
)

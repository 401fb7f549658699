"""Runs every operation against the reference in this process, and prints which instruction set each one ran with.

A program of test_isa.py, which sets PUNICA_ISA.
"""

import json

import punica_kernels as pk
import torch
from op_cases import DTYPES, check_add_lora, check_attention, check_bgmv, check_sgmv, make_cache, randn
from test_kv_cache import check_init_kv
from test_norm import check as check_rms_norm

ran: dict[str, list[str | None]] = {}


def record(op: str) -> None:
    ran.setdefault(op, []).append(pk.last_isa())


assert pk.last_isa() is None
for dtype in DTYPES:
    for shape in ((70, 16), (16, 70), (33, 5)):
        check_bgmv(*shape, dtype)
        record("dispatch_bgmv")
        for name in ("sgmv_shrink", "sgmv_cutlass"):
            check_sgmv(name, *shape, dtype)
            record(name)
    for ranks in ([16, 8, 4], [32, 5, 100]):
        check_add_lora(ranks, 70, [0, 40, 56], dtype, indices=[0, 2, 1, 1, 1, 1, 1, -1])
        record("add_lora")
    for head_dim in (64, 6):
        for options in ({}, {"rope_theta": 1e4, "window_left": 9}):
            check_attention([21, 3], None, dtype, head_dim=head_dim, decode=True, **options)
            record("batch_decode")
            check_attention([21, 3], [5, 3], dtype, head_dim=head_dim, **options)
            record("batch_prefill")
    check_rms_norm(3, 100, dtype)
    record("rms_norm")
    check_rms_norm(3, 100, dtype, residual=True)
    record("rms_norm")
    check_init_kv([9, 4], [9, 2], dtype)
    cache = make_cache([5], 2, 4, 8, dtype)
    k = randn(1, 2, 8, dtype=dtype)
    pk.append_kv(*cache.tables, k, k, *cache.scalars)
    assert torch.equal(cache.tokens(0)[0, :, -1], k[0])
print(json.dumps({"active": pk.active_isa(), "ran": ran}))

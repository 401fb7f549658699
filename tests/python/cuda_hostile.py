"""Garbage in every index table with checks off: nothing but the outputs may change.

A program of test_cuda.py, made for compute-sanitizer too: `compute-sanitizer python tests/python/cuda_hostile.py 20`
runs 20 rounds. Addresses stay good, for they are trusted. The number is of rounds an operation, default 60.
"""

import random
import sys

import punica_kernels as pk
import torch
from op_cases import DTYPES
from torch import Tensor

GUARD = 1 << 16  # bytes on both sides of what is watched
chance = random.Random(1)


def garbage(dtype: torch.dtype, count: int, limit: int) -> Tensor:
    """Mostly near the borders of [0, limit], sometimes anything."""
    bits = 31 if dtype == torch.int32 else 63
    values = []
    for _ in range(count):
        kind = chance.random()
        if kind < 0.5:
            values.append(chance.randint(0, limit))
        elif kind < 0.8:
            values.append(chance.choice([-1, 0, limit - 1, limit, limit + 1, limit + 2]))
        else:
            values.append(chance.choice([-(2**bits), 2**bits - 1, chance.randint(-(2**bits), 2**bits - 1)]))
    return torch.tensor(values, dtype=dtype, device="cuda")


class Guarded:
    """A tensor with bytes around it, and between its rows if it is strided, that nobody may write."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, gap: int = 0) -> None:
        row = 1
        for extent in shape[1:]:
            row *= extent
        item = dtype.itemsize
        inner = shape[0] * (row + gap) * item
        self.memory = torch.full((inner + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        wide = self.memory[GUARD : GUARD + inner].view(dtype).view(shape[0], row + gap)
        self.tensor = wide[:, :row].unflatten(1, shape[1:])
        self.tensor.copy_(torch.randn(shape, device="cuda"))
        marks = torch.zeros_like(self.memory)
        marks[GUARD : GUARD + inner].view(shape[0], -1)[:, : row * item] = 1
        self.outside = marks == 0

    def check(self, what: str) -> None:
        if not bool((self.memory[self.outside] == 0xA5).all()):
            sys.exit(f"{what}: wrote outside of its output")


def lora(dtype: torch.dtype) -> None:
    rows, d_in, d_out = chance.choice([(1, 64, 16), (33, 16, 200), (130, 96, 33), (300, 128, 128)])
    weights = [torch.randn(2, d_out * d_in, device="cuda").to(dtype) for _ in range(3)]
    table = torch.tensor([w.data_ptr() for w in weights], device="cuda")
    x = Guarded((rows, d_in), dtype, chance.choice([0, 3, 8])).tensor
    y = Guarded((rows, d_out), dtype, chance.choice([0, 5, 8]))
    pk.dispatch_bgmv(y.tensor, x, table, garbage(torch.int64, rows, 3), 1, 0.5)
    y.check("dispatch_bgmv")
    count = chance.choice([1, 7, 40])
    table = table[torch.randint(0, 3, (count,), device="cuda")]
    for op in (pk.sgmv_shrink, pk.sgmv_cutlass):
        y = Guarded((rows, d_out), dtype, chance.choice([0, 5, 8]))
        op(y.tensor, x, table, garbage(torch.int32, count, rows), garbage(torch.int32, count, rows), None, 1)
        y.check(op.__name__)


def add_lora(dtype: torch.dtype) -> None:
    rows, h_in, h_out = chance.choice([(1, 64, 16), (33, 16, 200), (130, 96, 33), (700, 128, 128)])
    rank, adapters, slices, segments = chance.choice([4, 16, 64]), 3, chance.choice([1, 2]), chance.choice([1, 7, 40])
    weights = [torch.randn(2, rank * max(h_in, h_out), device="cuda").to(dtype) for _ in range(2 * adapters * slices)]
    addresses = torch.tensor([w.data_ptr() for w in weights], device="cuda").view(2, slices, adapters)
    x = Guarded((rows, h_in), dtype, chance.choice([0, 3, 8])).tensor
    y = Guarded((rows, slices * h_out), dtype, chance.choice([0, 5, 8]))
    ranks = garbage(torch.int32, slices * adapters, rank).view(slices, adapters)
    capacity = rows + chance.choice([0, 9])
    batch = pk.LoraBatch.of(
        garbage(torch.int32, capacity, rows), garbage(torch.int32, segments, adapters),
        garbage(torch.int32, segments + 1, capacity), chance.choice([None, garbage(torch.int32, 2, segments)]),
    )  # fmt: skip
    tables = (addresses[0].contiguous(), addresses[1].contiguous(), ranks, torch.ones(adapters, device="cuda"))
    offsets = [h_out * s for s in range(slices + 1)]
    pk.add_lora(y.tensor, x, *tables, batch, 1, offsets, max_rank=rank)
    y.check("add_lora")
    held = [Guarded((1, n), torch.int32) for n in (capacity, capacity, min(capacity, 4), min(capacity, 4) + 1, 2)]
    indices = garbage(chance.choice([torch.int32, torch.int64]), rows, 3)
    torch.ops.punica_kernels.update_lora_batch(indices, 3, *(t.tensor[0] for t in held))
    for guarded in held:
        guarded.check("update_lora_batch")


def attention(dtype: torch.dtype) -> None:
    page_size, head_dim, batch = chance.choice([1, 3, 16, 64]), chance.choice([6, 64, 128, 256]), chance.choice([1, 9])
    layers, heads, group, pages = 2, 2, chance.choice([1, 4]), 12
    page = layers * 2 * heads * page_size * head_dim
    pitch = -(-page // 8) * 8
    cache = Guarded((pages, pitch), dtype)
    item = dtype.itemsize
    kv_ptrs = cache.tensor.data_ptr() + pitch * item * torch.arange(pages, device="cuda")
    scalars = (layers, 1, heads, page_size)

    def tables() -> tuple[Tensor, Tensor, Tensor]:
        return kv_ptrs, garbage(torch.int32, batch + 1, pages), garbage(torch.int32, batch, page_size)

    options = {"rope_theta": 1e4} if chance.random() < 0.3 else {}
    for rows, queries in ((batch, ()), (50, (garbage(torch.int32, batch + 1, 50),))):
        q = Guarded((rows, heads * group, head_dim), dtype, chance.choice([0, 8, 3])).tensor
        o = Guarded((rows, heads * group, head_dim), dtype, chance.choice([0, 8, 3]))
        lse = Guarded((rows, heads * group), torch.float32)
        op = pk.batch_prefill if queries else pk.batch_decode
        before = cache.memory.clone()
        op(o.tensor, q, *queries, *tables(), None, *scalars, lse=lse.tensor, **options)
        o.check(op.__name__)
        lse.check(op.__name__)
        if not torch.equal(before, cache.memory):
            sys.exit(f"{op.__name__}: wrote into the cache")
    layer = cache.tensor[:, : layers * page // layers].view(pages, layers, -1)
    for rows, bounds in ((batch, ()), (50, (garbage(torch.int32, batch + 1, 50),))):
        k = Guarded((rows, heads, head_dim), dtype, chance.choice([0, 8, 3])).tensor
        op = pk.init_kv if bounds else pk.append_kv
        other = layer[:, 0].clone()
        op(*tables(), k, k, *bounds, *scalars)
        cache.check(op.__name__)
        if not torch.equal(other.view(torch.uint8), layer[:, 0].contiguous().view(torch.uint8)):
            sys.exit(f"{op.__name__}: wrote into another layer")


def main() -> None:
    pk.set_checks(False)
    torch.manual_seed(1)
    for turn in range(int(sys.argv[1]) if len(sys.argv) > 1 else 60):
        dtype = DTYPES[turn % len(DTYPES)]
        lora(dtype)
        add_lora(dtype)
        attention(dtype)
    torch.cuda.synchronize()
    print("nothing beside the outputs was written")


main()

"""What the CUDA benchmark measures: attention over the paged cache and writes to it, beside torch's attention.

Pages of 16 tokens lie scattered over a pool; the KV caches of the calls of a graph rotate. Decode is a matter of
bytes: its floor is a kernel that only reads those of the keys and values. Prefill is a matter of tensor cores: its
floor is the time of as many operations at the rate of an 8192^3 matrix product measured in the same run, and torch's
attention (cuDNN, FlashAttention-2) has its keys and values in contiguous tensors. FlashInfer, where its modules are
given (cuda_flashinfer.py), reads the same pages.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import punica_kernels as pk
import torch
import torch.nn.functional as F
from cuda_flashinfer import CUDA_CORES, FA3, PLAN, TENSOR_CORES, Flashinfer, compare
from cuda_harness import FloorLibrary, calls_for, early, time_graph
from cuda_works import ITEM, Row, measured, random
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = 16
# More than four times the second-level cache, together.
CACHE_BYTES = 512 << 20


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Caches:
    """`copies` KV caches of the same sequences, each with its tables, on pages in random order."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, copies: int, page_size: int = PAGE):
        pages = [-(-length // page_size) for length in lengths]
        shape = (1, 2, kv_heads, page_size, head_dim)
        self.pool = random(copies * sum(pages), *shape, scale=0.5)
        step = self.pool[0].numel() * ITEM
        order = torch.randperm(copies * sum(pages)).view(copies, sum(pages))
        self.indices, self.kv_heads, self.page_size = order.int().cuda(), kv_heads, page_size
        self.kv_ptrs = (self.pool.data_ptr() + order * step).cuda()
        self.kv_indptr = int32([sum(pages[:i]) for i in range(len(pages) + 1)])
        self.last = int32([length - (n - 1) * page_size for length, n in zip(lengths, pages, strict=True)])
        self.scalars = (1, 0, kv_heads, page_size)
        self.bytes = 2 * sum(lengths) * kv_heads * head_dim * ITEM
        self.copies = copies

    def tables(self, copy: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.kv_ptrs[copy % self.copies], self.kv_indptr, self.last


def copies_for(lengths: list[int], kv_heads: int, head_dim: int) -> int:
    return max(2, -(-CACHE_BYTES // (2 * sum(lengths) * kv_heads * head_dim * ITEM)))


def zipf_lengths() -> list[int]:
    """1 to 32768 tokens, ever shorter: 32768 / rank, 256 MiB of keys and values and more at 8 heads of 128."""
    return [max(1, 32768 // rank) for rank in range(1, 65)]


def by_flashinfer(
    floors: FloorLibrary, flashinfer: Flashinfer, way: str, ours: Callable[[int], None], o: Tensor, q: Tensor,
    qo_indptr: Tensor, caches: Caches, calls: int,
) -> dict[str, float]:  # fmt: skip
    """Its time a call and that of its plan, after its result has been compared with ours."""
    if flashinfer.module(way, q.shape[-1]) is None:
        return {}
    heads = (q.shape[1], caches.kv_heads)
    try:
        call, plan = flashinfer.attention(
            way, o, q, qo_indptr, caches.pool, caches.indices, caches.kv_indptr, caches.last, heads, caches.page_size
        )
        call(1)
    except RuntimeError as error:
        print(f"{way} is not measured: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    theirs = o.clone()
    ours(1)
    compare(way, o, theirs)

    def run() -> None:
        for i in range(calls):
            call(i % caches.copies)

    return {way: time_graph(floors, run, calls), f"{way}: {PLAN}": plan}


def decode_rows(floors: FloorLibrary) -> Iterator[Row]:
    cases = [  # name, lengths, heads, KV heads, goal in us or share of the streaming read
        ("B=1, ctx 4096, 32/8", [4096], 32, 8, 8.0),
        ("B=1, ctx 32768, 32/8", [32768], 32, 8, 36.0),
        ("B=32, ctx 1024, 32/8", [1024] * 32, 32, 8, 35.0),
        ("B=64, ctx 2048, 32/8", [2048] * 64, 32, 8, 0.92),
        ("B=128, ctx 2048, 32/8", [2048] * 128, 32, 8, 0.94),
        ("B=256, ctx 1024, 64/8", [1024] * 256, 64, 8, 0.92),
        ("Zipf lengths, B=64, 32/8", zipf_lengths(), 32, 8, 0.85),
    ]
    flashinfer = Flashinfer()
    for name, lengths, heads, kv_heads, goal in cases:
        caches = Caches(lengths, kv_heads, 128, copies_for(lengths, kv_heads, 128))
        q = random(len(lengths), heads, 128)
        o = torch.empty_like(q)
        calls = max(16, caches.copies)

        def call(i: int, caches: Caches = caches, q: Tensor = q, o: Tensor = o) -> None:
            pk.batch_decode(o, q, *caches.tables(i), None, *caches.scalars)

        def run(call: Callable[[int], None] = call, calls: int = calls) -> None:
            for i in range(calls):
                call(i)

        floor = floors.floor(((caches.bytes, 0),), early=False)
        allowed = goal if goal > 1 else floor / goal
        rivals = {"ours, early_reads": time_graph(floors, early(run), calls)}
        each = int32(list(range(len(lengths) + 1)))
        for way in (CUDA_CORES, TENSOR_CORES):
            rivals |= by_flashinfer(floors, flashinfer, way, call, o, q, each, caches, calls)
        row = measured(floors, "Decode attention", name, run, calls, floor, allowed, rivals, bytes=caches.bytes)
        row.goal = row.given_goal = allowed
        yield row
        del caches


@functools.cache
def matmul_rate(floors: FloorLibrary) -> float:
    """FLOP per us of torch's 8192^3 product, repeated as long as a long prefill takes."""
    a, b = random(8192, 8192), random(8192, 8192)
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(4):
            torch.mm(a, b, out=out)

    return 2 * 8192.0**3 / time_graph(floors, run, 4)


def contiguous_attention(floors: FloorLibrary, backend: SDPBackend, batch: int, length: int, head_dim: int) -> float:
    q = random(batch, 32, length, head_dim)
    k, v = random(batch, 8, length, head_dim), random(batch, 8, length, head_dim)

    def run() -> None:
        with sdpa_kernel(backend):
            for _ in range(4):
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return time_graph(floors, run, 4)


class Prefill:
    """Four calls, on two caches in turn."""

    def __init__(self, length: int, q_len: int, batch: int, head_dim: int):
        self.caches = Caches([length] * batch, 8, head_dim, 2)
        self.q = random(batch * q_len, 32, head_dim)
        self.o = torch.empty_like(self.q)
        self.indptr = int32([i * q_len for i in range(batch + 1)])
        seen = q_len * (length - q_len) + q_len * (q_len + 1) // 2
        self.flop, self.bytes = 4 * batch * 32 * head_dim * seen, self.caches.bytes

    def __call__(self, i: int) -> None:
        pk.batch_prefill(self.o, self.q, self.indptr, *self.caches.tables(i), None, *self.caches.scalars)

    def run(self) -> None:
        for i in range(4):
            self(i)


def prefill_rows(floors: FloorLibrary) -> Iterator[Row]:
    cases = [  # batch, length, D, goal: times cuDNN's rate
        (16, 1024, 128, 1.0), (4, 4096, 128, 1.05), (1, 16384, 128, 1.08),
        (16, 1024, 64, 1.0), (4, 4096, 64, 1.0), (1, 16384, 64, 1.0),
    ]  # fmt: skip
    flashinfer = Flashinfer()
    rate = matmul_rate(floors)
    long_rate = 0.0
    for batch, length, head_dim, factor in cases:
        work = Prefill(length, length, batch, head_dim)
        flop = work.flop
        rivals = {
            "torch: cuDNN, contiguous": contiguous_attention(
                floors, SDPBackend.CUDNN_ATTENTION, batch, length, head_dim
            ),
            "torch: FlashAttention-2, contiguous": contiguous_attention(
                floors, SDPBackend.FLASH_ATTENTION, batch, length, head_dim
            ),
        }
        rivals |= by_flashinfer(floors, flashinfer, FA3, work, work.o, work.q, work.indptr, work.caches, 4)
        goal = rivals["torch: cuDNN, contiguous"] / factor
        row = measured(floors, "Prefill attention", f"{batch} x {length}, D={head_dim}", work.run, 4, flop / rate, goal,
                       rivals, flop=flop)  # fmt: skip
        row.goal = row.given_goal = goal
        if (length, head_dim) == (16384, 128):
            long_rate = flop / row.ours
        yield row
    for q_len, goal in ((512, 0.0), (4, 45.0), (16, 45.0)):
        work = Prefill(32768, q_len, 1, 128)
        flop, nbytes = work.flop, work.bytes
        few = q_len < 128
        floor = floors.floor(((nbytes, 0),), early=False) if few else flop / rate
        allowed = goal or flop / (0.9 * long_rate)
        name = f"{q_len} queries, 32768 keys, D=128"
        row = measured(floors, "Prefill attention", name, work.run, 4, floor, allowed, {},
                       flop=flop, bytes=nbytes if few else 0)  # fmt: skip
        row.goal = row.given_goal = allowed
        yield row


def write_rows(floors: FloorLibrary) -> Iterator[Row]:
    """Bytes are those of the keys and values; a copy reads and writes them."""
    for name, batch, new, goal in (("init_kv 16 x 1024", 16, 1024, None), ("append_kv B=256", 256, 1, 2.0)):
        lengths = [max(new, 64)] * batch
        caches = Caches(lengths, 8, 128, 8 if new > 1 else 16)
        indptr = int32([i * new for i in range(batch + 1)])
        nbytes = 2 * batch * new * 8 * 128 * ITEM
        # append_kv: as many calls as its floor, each with its own rows. A graph starts as long as four of them take.
        calls, sets = (16, 1) if new > 1 else (calls_for(2 * nbytes), calls_for(2 * nbytes))
        k, v = random(sets, batch * new, 8, 128), random(sets, batch * new, 8, 128)

        def run(caches: Caches = caches, k: Tensor = k, v: Tensor = v, indptr: Tensor = indptr, new: int = new,
                calls: int = calls) -> None:  # fmt: skip
            for i in range(calls):
                rows = k[i % len(k)], v[i % len(v)]
                if new > 1:
                    pk.init_kv(*caches.tables(i), *rows, indptr, *caches.scalars)
                else:
                    pk.append_kv(*caches.tables(i), *rows, *caches.scalars)

        floor = floors.copy_floor(nbytes)
        allowed = goal or floor / 0.85
        row = measured(floors, "KV writes", name, run, calls, floor, allowed, {}, bytes=2 * nbytes)
        row.goal = row.given_goal = allowed
        yield row
        if goal is not None:
            row = measured(floors, "KV writes", f"{name}, chained", early(run), calls, floor, 1.2, {}, bytes=2 * nbytes)
            row.goal = row.given_goal = 1.2
            yield row

"""batch_decode and batch_prefill over scattered pages, beside torch's scaled_dot_product_attention."""

from collections.abc import Iterator

import punica_kernels as pk
import torch
import torch.nn.functional as F
from harness import Work, check_close
from torch import Tensor

DTYPE = torch.bfloat16
RTOL = 1.6e-2
RTOL_RIVAL = 4 * RTOL


class Cache:
    """A pool of pages in random order. The layers are the sets that the benchmark rotates, as a model does."""

    def __init__(self, batch: int, context: int, num_kv_heads: int, head_dim: int, page_size: int, rotation: int):
        self.batch, self.context, self.num_kv_heads = batch, context, num_kv_heads
        self.head_dim, self.page_size = head_dim, page_size
        self.pages_each = -(-context // page_size)
        num_pages = batch * self.pages_each
        layer_bytes = num_pages * 2 * num_kv_heads * page_size * head_dim * DTYPE.itemsize
        self.num_layers = max(2, -(-rotation // layer_bytes))
        self.pool = torch.empty(num_pages, self.num_layers, 2, num_kv_heads, page_size, head_dim, dtype=DTYPE)
        for page in self.pool:
            page.normal_()
        self.order = torch.randperm(num_pages)
        self.kv_ptrs = self.pool.data_ptr() + self.order * self.pool[0].nbytes
        self.kv_indptr = torch.arange(0, num_pages + 1, self.pages_each, dtype=torch.int32)
        last = context - (self.pages_each - 1) * page_size
        self.last_page_offset = torch.full((batch,), last, dtype=torch.int32)

    def table(self, layer: int) -> tuple:
        """The arguments of our calls from kv_ptrs on, less tmpbuf, in two parts."""
        return (self.kv_ptrs, self.kv_indptr, self.last_page_offset), (
            *(self.num_layers, layer, self.num_kv_heads, self.page_size),
        )

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V as torch wants them, [B, N, context, D] each, copied out of the pages."""
        pages = self.pool[:, layer].index_select(0, self.order)
        pages = pages.view(self.batch, self.pages_each, 2, self.num_kv_heads, self.page_size, self.head_dim)
        kv = pages.permute(2, 0, 3, 1, 4, 5).reshape(2, self.batch, self.num_kv_heads, -1, self.head_dim)
        return kv[0, :, :, : self.context], kv[1, :, :, : self.context]


def decode(batch: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, rotation: int) -> Work:
    name = f"decode, {batch} x {context} tokens, {num_heads}/{num_kv_heads} heads of {head_dim}"
    cache = Cache(batch, context, num_kv_heads, head_dim, 16, rotation)
    q = torch.randn(batch, num_heads, head_dim).to(DTYPE)
    o = torch.empty_like(q)
    contiguous = [tuple(t.contiguous() for t in cache.gather(layer)) for layer in range(cache.num_layers)]
    grouped = q.view(batch, num_kv_heads, -1, head_dim)

    def ours(i: int) -> Tensor:
        table, sizes = cache.table(i)
        pk.batch_decode(o, q, *table, None, *sizes)
        return o

    # With one query a head there is nothing to mask, so the heads of a group may stand as queries of one KV head:
    # faster than enable_gqa, which copies K and V once for every head.
    def sdpa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(grouped, *contiguous[i]).view_as(q)

    def sdpa_gqa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(q.unsqueeze(2), *contiguous[i], enable_gqa=True).view_as(q)

    def gather_sdpa(i: int) -> Tensor:
        return F.scaled_dot_product_attention(grouped, *cache.gather(i)).reshape(q.shape)

    rivals = {
        "torch SDPA, contiguous K/V": sdpa,
        "torch SDPA with enable_gqa": sdpa_gqa,
        "torch SDPA, gathered from pages": gather_sdpa,
    }

    def check() -> None:
        i = cache.num_layers - 1
        exact = torch.empty(q.shape, dtype=torch.float64)
        table, sizes = cache.table(i)
        pk.reference.batch_decode(exact, q, *table, None, *sizes)
        for label, variant in {"ours": ours, **rivals}.items():
            check_close(f"{name}, {label}", variant(i), exact, RTOL if variant is ours else RTOL_RIVAL)

    return Work(
        name=name,
        ours=ours,
        rivals=rivals,
        num_sets=cache.num_layers,
        bytes=(batch * context * num_kv_heads + batch * num_heads) * 2 * head_dim * DTYPE.itemsize,
        flop=4 * batch * context * num_heads * head_dim,
        goal=0.7,
        check=check,
    )


def prefill(batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, rotation: int) -> Work:
    name = f"prefill, {batch} x {length} tokens, {num_heads}/{num_kv_heads} heads of {head_dim}"
    cache = Cache(batch, length, num_kv_heads, head_dim, 16, rotation)
    q = torch.randn(batch * length, num_heads, head_dim).to(DTYPE)
    o = torch.empty_like(q)
    qo_indptr = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    contiguous = [tuple(t.contiguous() for t in cache.gather(layer)) for layer in range(cache.num_layers)]
    heads_first = q.view(batch, length, num_heads, head_dim).transpose(1, 2).contiguous()

    def ours(i: int) -> Tensor:
        table, sizes = cache.table(i)
        pk.batch_prefill(o, q, qo_indptr, *table, None, *sizes)
        return o

    def sdpa(i: int) -> Tensor:
        out = F.scaled_dot_product_attention(heads_first, *contiguous[i], is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)

    rivals = {"torch SDPA, contiguous K/V": sdpa}

    def check() -> None:
        exact = torch.empty(q.shape, dtype=torch.float64)
        table, sizes = cache.table(0)
        pk.reference.batch_prefill(exact, q, qo_indptr, *table, None, *sizes)
        for label, variant in {"ours": ours, **rivals}.items():
            check_close(f"{name}, {label}", variant(0), exact, RTOL if variant is ours else RTOL_RIVAL)

    pairs = batch * length * (length + 1) // 2
    return Work(
        name=name,
        ours=ours,
        rivals=rivals,
        num_sets=cache.num_layers,
        bytes=(batch * length * (num_kv_heads + num_heads)) * 2 * head_dim * DTYPE.itemsize,
        flop=4 * pairs * num_heads * head_dim,
        check=check,
    )


def works(rotation: int) -> Iterator[Work]:
    for batch, context in ((1, 4096), (8, 1024), (32, 512), (16, 2048)):
        yield decode(batch, context, 32, 8, 128, rotation)
    for batch, context in ((8, 1024), (32, 1024)):
        yield decode(batch, context, 9, 3, 64, rotation)
    yield prefill(4, 512, 32, 8, 128, rotation)
    yield prefill(4, 512, 9, 3, 64, rotation)

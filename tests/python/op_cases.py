"""Inputs for the operations, awkward on purpose, and the comparison with the reference.

What does not belong to a call is NaN: other layers, the unused rest of a page, the columns between strided rows. So a
kernel that touches it fails every comparison.
"""

import dataclasses
import math

import punica_kernels as pk
import torch
from punica_kernels import reference
from tolerances import assert_close, assert_close_lse, score_error, weight_rounding
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(device)


def int32(values, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def strided(tensor: Tensor) -> Tensor:
    """The same values as a column slice of a wider tensor, with NaN (or a value that shows) beside them."""
    row = math.prod(tensor.shape[1:])
    wide = torch.full((len(tensor), row + 5), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[:, 3 : 3 + row].unflatten(1, tensor.shape[1:]) if tensor.dim() > 2 else wide[:, 3 : 3 + row]
    view.copy_(tensor)
    return view


def beside(view: Tensor) -> Tensor:
    """What lies between the rows of a strided() tensor."""
    row = math.prod(view.shape[1:])
    wide = view.as_strided((len(view), row + 5), (row + 5, 1), view.storage_offset() - 3)
    return torch.cat((wide[:, :3], wide[:, 3 + row :]), dim=1)


# The operations by name, as functions of what torch's dispatcher takes.


def add_lora(
    y, x, a_ptr, b_ptr, ranks, scales, order, segment_adapter, segment_start, counts, layer_idx, slice_offsets=None, *,
    a_layer_stride=None, b_layer_stride=None, b_row_stride=None, max_rank=512,
):  # fmt: skip
    batch = pk.LoraBatch.of(order, segment_adapter, segment_start, counts)
    return pk.add_lora(
        y, x, a_ptr, b_ptr, ranks, scales, batch, layer_idx, slice_offsets, a_layer_stride=a_layer_stride,
        b_layer_stride=b_layer_stride, b_row_stride=b_row_stride, max_rank=max_rank,
    )  # fmt: skip


def public(op: str):
    """The package's function, which takes the tensors of a LoraBatch one by one here."""
    if op == "add_lora":
        return add_lora
    return pk.lora_batch._update_lora_batch if op == "update_lora_batch" else getattr(pk, op)


# --------------------------------------------------------------------------------------------------------------- lora


@dataclasses.dataclass
class Adapters:
    weights: list[Tensor]  # [L, rows, columns] each; layers other than `layer` are NaN
    w_ptr: Tensor
    layer: int


def make_adapters(count: int, rows: int, columns: int, dtype, device="cpu", layers=2, layer=1, seed=0) -> Adapters:
    weights = []
    for i in range(count):
        weight = torch.full((layers, rows, columns), math.nan, dtype=dtype, device=device)
        weight[layer] = randn(rows, columns, dtype=dtype, device=device, seed=1000 * seed + i)
        weights.append(weight)
    return Adapters(weights, torch.tensor([w.data_ptr() for w in weights], dtype=torch.int64, device=device), layer)


def magnitude(adapters: Adapters) -> Adapters:
    weights = [w.abs() for w in adapters.weights]
    w_ptr = torch.tensor([w.data_ptr() for w in weights], dtype=torch.int64, device=adapters.w_ptr.device)
    return Adapters(weights, w_ptr, adapters.layer)


def check_bgmv(h_in, h_out, dtype, device="cpu", indices=(2, 0, -1, 1, 2, 2, 0, -7, 1), scale=0.5, rows=None):
    """rows: how to lay out y and x, a function of a contiguous tensor."""
    rows = rows or (lambda t: t)
    batch = len(indices)
    adapters = make_adapters(3, h_out, h_in, dtype, device, seed=h_in)
    y0 = randn(batch, h_out, dtype=dtype, device=device, seed=1)
    y, x = rows(y0), rows(randn(batch, h_in, dtype=dtype, device=device, seed=2))
    index = torch.tensor(indices, dtype=torch.int64, device=device)
    exact = y0.double()
    reference.dispatch_bgmv(exact, x, adapters.w_ptr, index, adapters.layer, scale)
    terms, absolute = y0.double().abs(), magnitude(adapters)
    reference.dispatch_bgmv(terms, x.abs(), absolute.w_ptr, index, adapters.layer, abs(scale))
    pk.dispatch_bgmv(y, x, adapters.w_ptr, index, adapters.layer, scale)
    assert_close(y, exact, terms=terms)
    skipped = index < 0
    assert torch.equal(y[skipped], y0[skipped])
    return y


def check_sgmv(
    name, d_in, d_out, dtype, device="cpu", segments=((0, 1), (1, 1), (2, 20), (20, 23)), total=24, rows=None
):
    """segments: (start, end) each; segment i uses adapter i % 3, so that addresses repeat."""
    rows = rows or (lambda t: t)
    shape = (d_out, d_in) if name == "sgmv_shrink" else (d_in, d_out)
    adapters = make_adapters(3, *shape, dtype, device, seed=d_in)
    y0 = randn(total, d_out, dtype=dtype, device=device, seed=1)
    y, x = rows(y0), rows(randn(total, d_in, dtype=dtype, device=device, seed=2))
    chosen = torch.arange(len(segments), device=device) % 3
    start, end = (int32([s[i] for s in segments], device) for i in (0, 1))
    exact = y0.double()
    getattr(reference, name)(exact, x, adapters.w_ptr[chosen], start, end, None, adapters.layer)
    terms, absolute = y0.double().abs(), magnitude(adapters)
    getattr(reference, name)(terms, x.abs(), absolute.w_ptr[chosen], start, end, None, adapters.layer)
    size = pk.sgmv_cutlass_tmp_size(len(segments))
    tmp = torch.empty(size, dtype=torch.uint8, device=device) if len(segments) % 2 else None
    getattr(pk, name)(y, x, adapters.w_ptr[chosen], start, end, tmp, adapters.layer)
    assert_close(y, exact, terms=terms)
    covered = torch.zeros(total, dtype=torch.bool)
    for s, e in segments:
        covered[s:e] = True
    assert torch.equal(y.cpu()[~covered], y0.cpu()[~covered])
    return y


@dataclasses.dataclass
class LoraTables:
    """Adapters of one projection; a[s][i] is [L, r, h_in], b[s][i] is [L, h_out of slice s, r], None where left out."""

    a: list[list[Tensor | None]]
    b: list[list[Tensor | None]]
    a_ptr: Tensor
    b_ptr: Tensor
    ranks: Tensor
    scales: Tensor
    offsets: list[int]
    layer: int
    options: dict

    @property
    def tables(self):
        return self.a_ptr, self.b_ptr, self.ranks, self.scales


def make_lora(
    ranks, h_in, offsets, dtype, device="cpu", *, scales=None, layers=2, layer=1, padded=None, seed=0, std=1.0,
) -> LoraTables:  # fmt: skip
    """ranks: a list by adapter, or one such list a slice; rank 0 has an address that is never to be read.

    padded: rows of B that far apart, and layers of A that many rows; what pads is NaN, as are the other layers.
    """
    slices = len(offsets) - 1
    table = ranks if ranks and isinstance(ranks[0], (list, tuple)) else [ranks] * slices
    rank_tensor = int32(ranks, device)
    if scales is None:
        scales = torch.rand(rank_tensor.shape, generator=generator(seed + 99)) * 2 - 1
    a, b, options = [], [], {}
    for s in range(slices):
        a.append([])
        b.append([])
        h_out = offsets[s + 1] - offsets[s]
        for i, r in enumerate(table[s]):
            width = padded or r
            memory = torch.full((layers, max(width, 1), h_in), math.nan, dtype=dtype, device=device)
            memory[layer, :r] = std * randn(r, h_in, dtype=dtype, device=device, seed=1000 * seed + 10 * i + s)
            a[s].append(memory)
            memory = torch.full((layers, h_out, max(width, 1)), math.nan, dtype=dtype, device=device)
            memory[layer, :, :r] = randn(h_out, r, dtype=dtype, device=device, seed=1000 * seed + 10 * i + s + 5)
            b[s].append(memory)
    if padded:
        options = {"a_layer_stride": padded * h_in, "b_row_stride": padded}

    def addresses(side):
        # An adapter that has nothing to do has an address that nothing could be read from.
        rows = [[t.data_ptr() if r else 4 for t, r in zip(side[s], table[s], strict=True)] for s in range(slices)]
        return torch.tensor(rows, dtype=torch.int64, device=device)

    return LoraTables(
        a, b, addresses(a), addresses(b), rank_tensor, torch.as_tensor(scales, dtype=torch.float32).to(device),
        list(offsets), layer, options,
    )  # fmt: skip


def add_lora_terms(y0: Tensor, x: Tensor, lora: LoraTables, indices) -> tuple[Tensor, Tensor]:
    """The exact result in float64, by plain products and not by the library's reference, and the sums of |terms|."""
    exact, terms = y0.double(), y0.double().abs()
    slices = len(lora.offsets) - 1
    ranks, scales = (t.expand(slices, t.shape[-1]).tolist() for t in (lora.ranks, lora.scales))
    for t, i in enumerate(indices):
        for s in range(slices):
            if not 0 <= i < len(ranks[s]) or ranks[s][i] == 0 or 0 in (lora.a_ptr[s, i], lora.b_ptr[s, i]):
                continue
            r, columns = ranks[s][i], slice(lora.offsets[s], lora.offsets[s + 1])
            a, b = lora.a[s][i][lora.layer, :r].double(), lora.b[s][i][lora.layer, :, :r].double()
            exact[t, columns] += scales[s][i] * (b @ (a @ x[t].double()))
            # What float32 loses in v is a part of the sum of |terms| of v.
            terms[t, columns] += abs(scales[s][i]) * (b.abs() @ (a.abs() @ x[t].double().abs()))
    return exact, terms


def check_add_lora(
    ranks, h_in, offsets, dtype, device="cpu", indices=(2, 0, -1, 1, 2, 2, 0, -7, 1), *, width=None, rows=None,
    capacity=None, lora=None, **options,
):  # fmt: skip
    rows = rows or (lambda t: t)
    lora = lora or make_lora(ranks, h_in, offsets, dtype, device, seed=h_in, **options)
    width = lora.offsets[-1] if width is None else width
    y0 = randn(len(indices), width, dtype=dtype, device=device, seed=1)
    y, x = rows(y0), rows(randn(len(indices), h_in, dtype=dtype, device=device, seed=2))
    batch = pk.LoraBatch(
        torch.tensor(indices, dtype=torch.int64, device=device), lora.a_ptr.shape[1], capacity=capacity
    )
    exact, terms = add_lora_terms(y0, x, lora, indices)
    reference_y = y0.double()
    arguments = (x, *lora.tables, batch, lora.layer, lora.offsets)
    reference.add_lora(reference_y, *arguments, **lora.options)
    torch.testing.assert_close(reference_y, exact, rtol=1e-12, atol=1e-9)
    pk.add_lora(y, *arguments, **lora.options)
    assert_close(y, exact, terms=terms)
    untouched = torch.tensor([not 0 <= i < lora.a_ptr.shape[1] for i in indices], dtype=torch.bool, device=device)
    assert torch.equal(y[untouched], y0[untouched])
    assert torch.equal(y[:, : lora.offsets[0]], y0[:, : lora.offsets[0]])
    assert torch.equal(y[:, lora.offsets[-1] :], y0[:, lora.offsets[-1] :])
    return y


# ---------------------------------------------------------------------------------------------------------- the cache


@dataclasses.dataclass
class Cache:
    memory: Tensor  # every page, and NaN between them
    pages: list[list[Tensor]]  # for each sequence, [L, 2, N, P, D]
    lengths: list[int]
    kv_ptrs: Tensor
    kv_indptr: Tensor
    last_page_offset: Tensor
    num_layers: int
    layer: int
    num_kv_heads: int
    page_size: int

    @property
    def tables(self):
        return self.kv_ptrs, self.kv_indptr, self.last_page_offset

    @property
    def scalars(self):
        return self.num_layers, self.layer, self.num_kv_heads, self.page_size

    def tokens(self, i: int) -> Tensor:
        """[2, N, kv_len, D] of this layer: a copy."""
        if self.lengths[i] == 0:
            return self.memory.new_zeros(2, self.num_kv_heads, 0, 1)
        return torch.cat([page[self.layer] for page in self.pages[i]], dim=2)[:, :, : self.lengths[i]]

    def set_tokens(self, i: int, tokens: Tensor) -> None:
        for n, page in enumerate(self.pages[i]):
            chunk = tokens[:, :, n * self.page_size : (n + 1) * self.page_size]
            page[self.layer, :, :, : chunk.shape[2]] = chunk

    def snapshot(self) -> Tensor:
        """Every bit of the memory."""
        return self.memory.view(torch.uint8).clone()


def make_cache(
    lengths, num_kv_heads, page_size, head_dim, dtype, device="cpu", layers=2, layer=1, seed=0, spare=1
) -> Cache:
    """Pages in shuffled order, 16-byte aligned and no better, everything but this layer's tokens NaN.

    spare: entries of kv_ptrs before and behind those in use, all null.
    """
    counts = [-(-length // page_size) for length in lengths]
    elements = layers * 2 * num_kv_heads * page_size * head_dim
    align = 16 // dtype.itemsize
    pitch = -(-elements // align) * align + align
    memory = torch.full((sum(counts) * pitch + 2 * align,), math.nan, dtype=dtype, device=device)
    first = -(memory.data_ptr() // dtype.itemsize) % align
    first += align if (memory.data_ptr() + first * dtype.itemsize) % 32 == 0 else 0
    order = torch.randperm(sum(counts), generator=generator(seed)).tolist()
    views = [
        memory[first + j * pitch : first + j * pitch + elements].view(layers, 2, num_kv_heads, page_size, head_dim)
        for j in order
    ]
    pages = [[views.pop() for _ in range(count)] for count in counts]
    addresses = [page.data_ptr() for sequence in pages for page in sequence]
    indptr = [spare]
    for count in counts:
        indptr.append(indptr[-1] + count)
    # What stands there for a sequence without pages does not matter.
    last = [(length - 1) % page_size + 1 if length else -9 for length in lengths]
    cache = Cache(
        memory, pages, list(lengths),
        torch.tensor([0] * spare + addresses + [0] * spare, dtype=torch.int64, device=device),
        int32(indptr, device), int32(last, device), layers, layer, num_kv_heads, page_size,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        cache.set_tokens(i, randn(2, num_kv_heads, length, head_dim, dtype=dtype, device=device, seed=seed + 7 * i + 1))
    return cache


def with_absolute_values(cache: Cache) -> Cache:
    """The same tokens in memory of their own, with |v| for v."""
    memory = cache.memory.clone()
    shift = memory.data_ptr() - cache.memory.data_ptr()
    views = [[memory.as_strided(p.shape, p.stride(), p.storage_offset()) for p in pages] for pages in cache.pages]
    ptrs = torch.where(cache.kv_ptrs == 0, 0, cache.kv_ptrs + shift)
    other = dataclasses.replace(cache, memory=memory, pages=views, kv_ptrs=ptrs)
    for pages in views:
        for page in pages:
            page[cache.layer, 1].abs_()
    return other


# ---------------------------------------------------------------------------------------------------------- attention


def check_attention(
    lengths, q_lens, dtype, device="cpu", *, num_kv_heads=2, group=2, page_size=4, head_dim=64, decode=False, rows=None,
    cache=None, q=None, **options,
):  # fmt: skip
    """Prefill (or decode, where q_lens is None) against the reference; returns o and lse."""
    rows = rows or (lambda t: t)
    cache = cache or make_cache(lengths, num_kv_heads, page_size, head_dim, dtype, device)
    q_lens = [1] * len(lengths) if decode else q_lens
    total, heads = sum(q_lens), cache.num_kv_heads * group
    if q is None:
        q = rows(randn(total, heads, head_dim, dtype=dtype, device=device, seed=5))
    o = rows(torch.full((total, heads, head_dim), math.nan, dtype=dtype, device=device))
    lse = torch.full((total, heads), math.nan, device=device)
    indptr = [0]
    for q_len in q_lens:
        indptr.append(indptr[-1] + q_len)
    queries = () if decode else (int32(indptr, device),)
    name = "batch_decode" if decode else "batch_prefill"

    exact, exact_lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    exact, exact_lse = exact.to(device), exact_lse.to(device)
    spread = torch.zeros_like(exact)  # sum_j p_j |v_j|
    run = getattr(reference, name)
    run(exact, q, *queries, *cache.tables, None, *cache.scalars, lse=exact_lse, **options)
    absolute = with_absolute_values(cache)
    run(spread, q, *queries, *absolute.tables, None, *cache.scalars, **options)

    getattr(pk, name)(o, q, *queries, *cache.tables, None, *cache.scalars, lse=lse, **options)
    if total == 0:
        return o, lse
    keys = [cache.tokens(i)[0].flatten(0, 1) for i, n in enumerate(lengths) if n]
    if keys:
        scale = options.get("sm_scale")
        e = score_error(
            q, torch.cat(keys), head_dim**-0.5 if scale is None else scale, options.get("logits_soft_cap", 0.0),
            options.get("rope_theta") is not None,
        )  # fmt: skip
    else:
        e = torch.zeros_like(exact_lse)
    assert_close(o, exact, terms=spread, extra=(torch.expm1(2 * e)[:, :, None] + weight_rounding(q)) * spread)
    assert_close_lse(lse, exact_lse, e)
    return o, lse

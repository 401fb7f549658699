"""The operations in plain PyTorch: the definition that tests compare with, the place to read what an op means.

Same names, arguments and in-place behaviour as the package itself. Everything is computed in float64 from the given
(already rounded) inputs and rounded once, when it is stored. An output (`o`, `y`, `output`) may also be a float64
tensor: it then receives the unrounded result, which is what a tolerance is measured against. Nothing here is fast, and
arguments are not checked; index values that point outside their table are skipped or clamped, as on CUDA.

Words: L layers, N KV heads, H query heads, P tokens a page, D head dim, B sequences. Row: one token.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lora_batch import LoraBatch


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor over memory that somebody else owns: no copy, no ownership; writes go to that memory."""
    device = torch.device(device)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=dtype).view(shape)

    class Memory:  # bytes, because the interface has no code for bfloat16
        __cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    return torch.as_tensor(Memory(), device=device).view(dtype).view(shape)


def _ranges(indptr: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """The ranges [indptr[i], indptr[i+1]) clamped to [0, limit]; one that runs backwards is empty."""
    ends = [min(max(int(end), 0), limit) for end in indptr.tolist()]
    return ((start, max(start, end)) for start, end in zip(ends, ends[1:], strict=False))


class _Sequence:
    """The pages of one sequence at one layer."""

    def __init__(self, pages: list[Tensor], last_page_offset: int, page_size: int):
        valid = len(pages) > 0 and 1 <= last_page_offset <= page_size
        self.pages, self.page_size = pages, page_size
        self.kv_len = (len(pages) - 1) * page_size + last_page_offset if valid else 0

    def write(self, first: int, k: Tensor, v: Tensor) -> None:
        """Token j of k, v ([len, N, D]) becomes position first + j; what would come before position 0 is dropped."""
        for j in range(max(0, -first), len(k)):
            page, slot = divmod(first + j, self.page_size)
            self.pages[page][0, :, slot] = k[j]
            self.pages[page][1, :, slot] = v[j]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [kv_len, N, D] in float64."""
        kv = torch.cat(self.pages, dim=2)[:, :, : self.kv_len].double().transpose(1, 2)
        return kv[0], kv[1]


def _sequences(
    kv_ptrs: Tensor,
    kv_indptr: Tensor,
    last_page_offset: Tensor,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Iterator[_Sequence]:
    """One _Sequence a batch entry. A page is one block [L, 2, N, P, D]; only the bytes of this layer are looked at."""
    shape = (2, num_kv_heads, page_size, head_dim)
    layer_offset = layer_idx * math.prod(shape) * dtype.itemsize
    pointers, offsets = kv_ptrs.tolist(), last_page_offset.tolist()
    for (start, end), offset in zip(_ranges(kv_indptr, len(pointers)), offsets, strict=True):
        pages = [tensor_at(p + layer_offset, shape, dtype, kv_ptrs.device) for p in pointers[start:end]]
        yield _Sequence(pages, offset, page_size)


def rotate(x: Tensor, positions: Tensor, theta: float, scale: float = 1.0) -> Tensor:
    """Rotary embedding in Llama's layout (element d pairs with d + D/2). x [len, heads, D] float64; positions [len]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = (positions.double() / scale)[:, None, None] * frequency
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()), dim=-1)


# ---------------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def batch_prefill(
    o: Tensor,
    q: Tensor,
    qo_indptr: Tensor,
    kv_ptrs: Tensor,
    kv_indptr: Tensor,
    last_page_offset: Tensor,
    tmpbuf: Tensor | None,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    sm_scale: float | None = None,
    rope_theta: float | None = None,
    rope_scale: float = 1.0,
    lse: Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> None:
    """Causal attention of queries [qo_indptr[i], qo_indptr[i+1]) over the pages of sequence i, aligned at the end.

    o, q [rows, H, D]. Query j of q_len stands at position p = kv_len - q_len + j and sees the keys
    max(0, p - window_left) .. p; where there are none, o is 0 and lse is -inf. lse [rows, H]: log2(sum(exp(score))).
    """
    head_dim = q.shape[2]
    group_size = q.shape[1] // num_kv_heads
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    sequences = _sequences(
        kv_ptrs, kv_indptr, last_page_offset, layer_idx, num_kv_heads, page_size, head_dim, q.dtype
    )  # fmt: skip
    for (start, end), sequence in zip(_ranges(qo_indptr, len(q)), sequences, strict=True):
        o[start:end] = 0
        if lse is not None:
            lse[start:end] = -math.inf
        if start == end or sequence.kv_len == 0:
            continue
        keys, values = sequence.read()
        queries = q[start:end].double()
        positions = torch.arange(end - start, device=q.device) + sequence.kv_len - (end - start)
        if rope_theta is not None:
            queries = rotate(queries, positions, rope_theta, rope_scale)
            keys = rotate(keys, torch.arange(sequence.kv_len, device=q.device), rope_theta, rope_scale)
        keys = keys.repeat_interleave(group_size, dim=1)  # query head h reads KV head h // group_size
        values = values.repeat_interleave(group_size, dim=1)
        for row, position in enumerate(positions.tolist()):
            if position < 0:
                continue
            seen = slice(0 if window_left < 0 else max(0, position - window_left), position + 1)
            score = sm_scale * torch.einsum("hd,khd->hk", queries[row], keys[seen])
            if logits_soft_cap > 0:
                score = logits_soft_cap * torch.tanh(score / logits_soft_cap)
            o[start + row] = torch.einsum("hk,khd->hd", score.softmax(dim=1), values[seen]).to(o.dtype)
            if lse is not None:
                lse[start + row] = (score.logsumexp(dim=1) / math.log(2)).to(lse.dtype)


def batch_decode(
    o: Tensor,
    q: Tensor,
    kv_ptrs: Tensor,
    kv_indptr: Tensor,
    last_page_offset: Tensor,
    tmpbuf: Tensor | None,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
    *,
    sm_scale: float | None = None,
    rope_theta: float | None = None,
    rope_scale: float = 1.0,
    lse: Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> None:
    """batch_prefill with one query a sequence, its newest token. o, q [B, H, D]."""
    qo_indptr = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    batch_prefill(
        o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads, page_size,
        sm_scale=sm_scale, rope_theta=rope_theta, rope_scale=rope_scale, lse=lse,
        window_left=window_left, logits_soft_cap=logits_soft_cap,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- kv_cache


@torch.no_grad()
def init_kv(
    kv_ptrs: Tensor,
    kv_indptr: Tensor,
    last_page_offset: Tensor,
    k: Tensor,
    v: Tensor,
    seqlen_indptr: Tensor,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Rows [seqlen_indptr[i], seqlen_indptr[i+1]) of k, v ([rows, N, D]) become the last positions of sequence i."""
    sequences = _sequences(
        kv_ptrs, kv_indptr, last_page_offset, layer_idx, num_kv_heads, page_size, k.shape[2], k.dtype
    )  # fmt: skip
    for (start, end), sequence in zip(_ranges(seqlen_indptr, len(k)), sequences, strict=True):
        if sequence.kv_len > 0:
            sequence.write(sequence.kv_len - (end - start), k[start:end], v[start:end])


def append_kv(
    kv_ptrs: Tensor,
    kv_indptr: Tensor,
    last_page_offset: Tensor,
    k: Tensor,
    v: Tensor,
    num_layers: int,
    layer_idx: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Row i of k, v ([B, N, D]) becomes position kv_len - 1 of sequence i: the slot is already counted in the table."""
    seqlen_indptr = torch.arange(len(k) + 1, dtype=torch.int32, device=k.device)
    init_kv(
        kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, num_layers, layer_idx, num_kv_heads, page_size
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- lora


def _weight(address: int, layer_idx: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """W[layer_idx] of an adapter [L, rows, columns] at `address`, in float64."""
    offset = layer_idx * rows * columns * like.dtype.itemsize
    return tensor_at(address + offset, (rows, columns), like.dtype, like.device).double()


@torch.no_grad()
def dispatch_bgmv(y: Tensor, x: Tensor, w_ptr: Tensor, indices: Tensor, layer_idx: int, scale: float) -> None:
    """y[b] += scale * W[indices[b]][layer_idx] @ x[b]; W [L, h_out, h_in], y [B, h_out], x [B, h_in].

    A row whose index is negative is skipped: y stays as it is.
    """
    pointers = w_ptr.tolist()
    for b, index in enumerate(indices.tolist()):
        if 0 <= index < len(pointers):
            weight = _weight(pointers[index], layer_idx, y.shape[1], x.shape[1], x)
            y[b] = (y[b].double() + scale * (weight @ x[b].double())).to(y.dtype)


def _segments(w_ptr: Tensor, s_start: Tensor, s_end: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    for address, start, end in zip(w_ptr.tolist(), s_start.tolist(), s_end.tolist(), strict=True):
        start, end = min(max(start, 0), rows), min(max(end, 0), rows)
        if start < end:
            yield address, slice(start, end)


@torch.no_grad()
def sgmv_cutlass(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    """y[s:e] += x[s:e] @ W[i][layer_idx] for each segment i = [s, e); W [L, d_in, d_out]."""
    for address, rows in _segments(w_ptr, s_start, s_end, len(x)):
        weight = _weight(address, layer_idx, x.shape[1], y.shape[1], x)
        y[rows] = (y[rows].double() + x[rows].double() @ weight).to(y.dtype)


def sgmv_cutlass_tmp_size(num_segments: int) -> int:
    """Bytes of `tmp` that sgmv_cutlass needs: here none."""
    return 0


@torch.no_grad()
def sgmv_shrink(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    """y[s:e] += x[s:e] @ W[i][layer_idx].T for each segment i = [s, e); W [L, d_out, d_in]."""
    for address, rows in _segments(w_ptr, s_start, s_end, len(x)):
        weight = _weight(address, layer_idx, y.shape[1], x.shape[1], x)
        y[rows] = (y[rows].double() + x[rows].double() @ weight.T).to(y.dtype)


def segments_of(batch: "LoraBatch", rows: int, num_adapters: int) -> Iterator[tuple[int, Tensor]]:
    """(adapter, int64 row numbers) of every run of rows with one adapter."""
    order = batch.order.tolist()
    ends = [min(max(int(end), 0), len(order)) for end in batch.segment_start.tolist()]
    for adapter, start, end in zip(batch.segment_adapter.tolist(), ends, ends[1:], strict=False):
        chosen = [row for row in order[start:end] if 0 <= row < rows]
        if 0 <= adapter < num_adapters and chosen:
            yield adapter, torch.tensor(chosen, device=batch.order.device)


@torch.no_grad()
def add_lora(
    y: Tensor,
    x: Tensor,
    a_ptr: Tensor,
    b_ptr: Tensor,
    ranks: Tensor,
    scales: Tensor,
    batch: "LoraBatch",
    layer_idx: int,
    slice_offsets: Sequence[int] | None = None,
    *,
    a_layer_stride: int | None = None,
    b_layer_stride: int | None = None,
    b_row_stride: int | None = None,
    max_rank: int = 512,
) -> None:
    """y[t, slice s] += scale * B (A x[t]) for each row t with an adapter; A [L, r, h_in], B [L, h_out of s, r].

    A rank of 0, or above max_rank, and an address of 0 add nothing.
    """
    slices, num_adapters = a_ptr.shape
    offsets = [0, y.shape[1]] if slice_offsets is None else list(slice_offsets)
    addresses = (a_ptr.tolist(), b_ptr.tolist())
    all_ranks, all_scales = (t.expand(slices, num_adapters).tolist() for t in (ranks, scales))
    for adapter, rows in segments_of(batch, len(y), num_adapters):
        for s in range(slices):
            rank, h_in, h_out = all_ranks[s][adapter], x.shape[1], offsets[s + 1] - offsets[s]
            a_address, b_address = (table[s][adapter] for table in addresses)
            if a_address == 0 or b_address == 0 or not 0 < rank <= max_rank or h_in == 0 or h_out == 0:
                continue
            row = rank if b_row_stride is None else b_row_stride
            a_layer = rank * h_in if a_layer_stride is None else a_layer_stride
            b_layer = h_out * row if b_layer_stride is None else b_layer_stride
            item = x.dtype.itemsize
            a = tensor_at(a_address + layer_idx * a_layer * item, (rank, h_in), x.dtype, x.device)
            b = tensor_at(b_address + layer_idx * b_layer * item, ((h_out - 1) * row + rank,), x.dtype, x.device)
            b = b.as_strided((h_out, rank), (row, 1))
            v = x[rows].double() @ a.double().T
            columns = slice(offsets[s], offsets[s + 1])
            y[rows, columns] = (y[rows, columns].double() + all_scales[s][adapter] * (v @ b.double().T)).to(y.dtype)


# --------------------------------------------------------------------------------------------------------------- norm


@torch.no_grad()
def rms_norm(output: Tensor, input: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None) -> None:
    """output = z * rsqrt(mean(z^2) + epsilon) * weight, row by row; z is input, or residual after residual += input."""
    z = input.double()
    if residual is not None:
        residual.copy_(residual.double() + z)  # rounds to the residual's type, and that is what is normalised
        z = residual.double()
    output.copy_(z * torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + epsilon) * weight.double())

"""The calls of vLLM's LoRA layers as torch operations, `torch.ops.punica_kernels_vllm.*`, over `add_lora`.

The address tables of a layer are found when the operation runs, by the addresses of its weights. So compiled code
holds nothing but tensors, and vLLM's layers stay alike for its compiler. Nothing in here waits for the device. Memory
is taken from torch's allocator, as vLLM's own operations take it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import is_intercepted
from ..lora import add_lora
from ..lora_batch import LoraBatch
from . import tables as _tables

MAX_SLICES = 16  # of one call of add_lora

# order, segment_adapter, segment_start and counts of a LoraBatch, and two tensors of one element on the host, so that
# compiled code asks for them each time. nobody: no row has an adapter. Then nothing is launched, and nothing captured:
# vLLM captures steps without adapters in graphs of their own. segments: the first so many may have rows, also when a
# graph that is captured is replayed; none that has comes behind one that has not.
Batch = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]

_BATCH = "Tensor order, Tensor segment_adapter, Tensor segment_start, Tensor? counts, Tensor nobody, Tensor segments"
_SCHEMAS = {
    "linear": f"Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, {_BATCH}, int[] widths, float scale",
    "shrink": f"Tensor(a!) y, Tensor x, Tensor[] a, {_BATCH}, float scale, bool exact",
    "expand": f"Tensor(a!) y, Tensor x, Tensor[] b, {_BATCH}, int[] widths, int start",
}


def linear(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], batch: Batch, widths: Sequence[int], scale: float
) -> None:
    """`y[:, slice s] += scale * B_s A_s x` for every row that has an adapter; widths: columns of each slice."""
    if is_intercepted():
        torch.ops.punica_kernels_vllm.linear(y, x, list(a), list(b), *batch, list(widths), scale)
    else:
        _linear(y, x, a, b, *batch, widths, scale)


def shrink(y: Tensor, x: Tensor, a: Sequence[Tensor], batch: Batch, scale: float, *, exact: bool) -> None:
    """`y[s] = scale * A_s x`, y: float32 [slices, rows, rank]; zero where a row has no adapter, or a smaller rank.

    y is rounded to x's type, as what goes into B is at the latest; with `exact` (for what will be summed first) it
    keeps the bits of two such numbers.
    """
    if is_intercepted():
        torch.ops.punica_kernels_vllm.shrink(y, x, list(a), *batch, scale, exact)
    else:
        _shrink(y, x, a, *batch, scale, exact)


def expand(y: Tensor, x: Tensor, b: Sequence[Tensor], batch: Batch, widths: Sequence[int], start: int) -> None:
    """`y[:, slice s] += B_s x[s]` for every row that has an adapter; x: [slices, rows, rank], rounded to y's type.

    The slices begin in column `start`.
    """
    if is_intercepted():
        torch.ops.punica_kernels_vllm.expand(y, x, list(b), *batch, list(widths), start)
    else:
        _expand(y, x, b, *batch, widths, start)


# What runs on real tensors, with the arguments of the schemas.


def _linear(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor | None,
    nobody: Tensor,
    segments: Tensor,
    widths: Sequence[int],
    scale: float,
) -> None:
    tables = _tables.of(a, b)  # in any case, so that the first call makes them
    _require_columns(x, tables)
    offsets = tables.offsets(widths, 0)
    if not nobody.item():
        batch = _batch(order, segment_adapter, segment_start, counts, segments, y.shape[0])
        _run(y, x, tables, batch, offsets, scale)


def _shrink(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor | None,
    nobody: Tensor,
    segments: Tensor,
    scale: float,
    exact: bool,
) -> None:
    tables = _tables.of(a, None)
    _require_columns(x, tables)
    _require_shape("y", y, (len(a), len(x), tables.rank))
    if nobody.item():
        y.zero_()
        return
    slices, rows, rank = y.shape
    batch = _batch(order, segment_adapter, segment_start, counts, segments, rows)
    offsets = tables.offsets([rank] * slices, 0)
    high = x.new_zeros(rows, slices * rank)
    _run(high, x, tables, batch, offsets, scale)
    y.copy_(high.view(rows, slices, rank).transpose(0, 1))
    if exact and x.dtype != y.dtype:
        low = high.neg_()  # then A x - high is left
        _run(low, x, tables, batch, offsets, scale)
        y.add_(low.view(rows, slices, rank).transpose(0, 1))


def _expand(
    y: Tensor,
    x: Tensor,
    b: Sequence[Tensor],
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor | None,
    nobody: Tensor,
    segments: Tensor,
    widths: Sequence[int],
    start: int,
) -> None:
    tables = _tables.of(None, b)
    _require_shape("x", x, (len(b), len(y), tables.rank))
    offsets = tables.offsets(widths, start)
    if nobody.item():
        return
    slices, rows, rank = x.shape
    batch = _batch(order, segment_adapter, segment_start, counts, segments, rows)
    if slices > 1 or x.dtype != y.dtype:
        rounded = y.new_empty(rows, slices, rank)
        rounded.copy_(x.transpose(0, 1))
        x = rounded
    _run(y, x.view(rows, slices * rank), tables, batch, offsets, 1.0)


# What add_lora cannot see: it has only the addresses of the weights.
def _require_columns(x: Tensor, tables: _tables.Tables) -> None:
    if x.shape[-1] != tables.h_in:
        raise RuntimeError(f"punica_kernels.vllm: x must have {tables.h_in} columns, got {tuple(x.shape)}")


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise RuntimeError(f"punica_kernels.vllm: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def _batch(
    order: Tensor, segment_adapter: Tensor, segment_start: Tensor, counts: Tensor | None, segments: Tensor, rows: int
) -> LoraBatch:
    """A batch without segments that are not in use: the fewer there are, the sooner a block has found its own."""
    count = int(segments.item())
    if segment_adapter.is_cuda:
        count = min(count, rows)  # each in use has a row
    if count < segment_adapter.shape[0]:
        segment_adapter, segment_start = segment_adapter[:count], segment_start[: count + 1]
    return LoraBatch.of(order, segment_adapter, segment_start, counts)


def _run(
    y: Tensor, x: Tensor, tables: _tables.Tables, batch: LoraBatch, offsets: tuple[int, ...], scale: float
) -> None:
    scales = tables.scales if scale == 1.0 else tables.scales * scale
    add_lora(
        y, x, tables.a_ptr, tables.b_ptr, tables.ranks, scales, batch, 0, offsets, b_row_stride=tables.b_row_stride,
        max_rank=tables.rank,
    )  # fmt: skip


_library: Any = torch.library.Library("punica_kernels_vllm", "DEF")  # type: ignore[no-untyped-call]


def _nothing(*_: object) -> None:
    return None


for _name, _function in (("linear", _linear), ("shrink", _shrink), ("expand", _expand)):
    _library.define(f"{_name}({_SCHEMAS[_name]}) -> ()")
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"punica_kernels_vllm::{_name}", _nothing, lib=_library)

"""LoRA: matrix products whose weights differ from row to row.

Weights are passed as addresses: `w_ptr` holds `data_ptr()` of one tensor [L, ...] an adapter (or a segment), L layers.
Whoever calls keeps those tensors alive. On the CPU these are host addresses.

`y`, `x` and the weights have one data type T: float16, bfloat16 or float32. Sums are accumulated in float32 and rounded
once, when `y` is stored. A row's bits do not depend on the other rows of the batch.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, get_num_threads
from torch._C import _increment_version, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ._dispatch import PLAIN, PLAIN_OR_NONE, explain, is_intercepted, missing, refuse_grad_and_neg
from ._library import Kernel, function
from .lora_batch import LoraBatch

_bgmv, _cutlass, _shrink = Kernel("dispatch_bgmv"), Kernel("sgmv_cutlass"), Kernel("sgmv_shrink")
_bgmv_shortcut, _cutlass_shortcut, _shrink_shortcut = _bgmv.shortcut, _cutlass.shortcut, _shrink.shortcut
_add_lora = Kernel("add_lora")
_add_lora_shortcut = _add_lora.shortcut
_tmp_size = function("sgmv_cutlass_tmp_size")

MAX_RANK = 512  # the default of add_lora's max_rank, and the largest that its CUDA kernels take

# Bytes of weights that a call on the CPU reads, if no two rows share them, in about 100 us: above, the GIL is released.
_LONG = 2_000_000
# What x.nbytes * y.nbytes, which is cheap to ask for, then exceeds as well. (On CUDA a call only launches.)
_MAYBE_LONG = 2 * _LONG


@overload
def dispatch_bgmv(y: Tensor, x: Tensor, w_ptr: Tensor, indices: Tensor, layer_idx: int, scale: float) -> None: ...
@overload
def dispatch_bgmv(y: Tensor, x: Tensor, w_ptr: Tensor, *, indicies: Tensor, layer_idx: int, scale: float) -> None: ...
def dispatch_bgmv(
    y: Tensor,
    x: Tensor,
    w_ptr: Tensor,
    indices: Tensor | None = None,
    layer_idx: int | None = None,
    scale: float | None = None,
    *,
    indicies: Tensor | None = None,
) -> None:
    """`y[b] += scale * W[indices[b]][layer_idx] @ x[b]` for every row b: one adapter a row.

    Args:
        y: T [B, h_out], updated in place. Rows may be strided (a slice of a wider tensor), here and in `x`.
        x: T [B, h_in].
        w_ptr: int64 [num_adapters], addresses of weights T [L, h_out, h_in].
        indices: int64 [B], rows of `w_ptr`; a negative one leaves its row of `y` as it is. `indicies` is accepted too.
        layer_idx: which of the L layers.
        scale: factor of the update.

    Raises:
        RuntimeError: an argument breaks this contract; `y` is untouched. On the CPU the contents of `indices` and the
            addresses that they choose are checked too, on CUDA after `set_checks(True)`.
    """
    if indicies is None and not is_dynamo_compiling() and _bgmv_shortcut(y, x, w_ptr, indices, layer_idx, scale, _LONG):
        return
    if indices is None:
        indices = indicies
    elif indicies is not None:
        raise TypeError("dispatch_bgmv() got both 'indices' and 'indicies', two spellings of one argument")
    if indices is None or layer_idx is None or scale is None:
        missing("dispatch_bgmv", "indices" if indices is None else "layer_idx" if layer_idx is None else "scale")
    direct = (
        not is_intercepted()
        and type(y) in PLAIN
        and type(x) in PLAIN
        and type(w_ptr) in PLAIN
        and type(indices) in PLAIN
    )
    if direct:
        _run_bgmv(y, x, w_ptr, indices, layer_idx, scale)
    else:
        torch.ops.punica_kernels.dispatch_bgmv(y, x, w_ptr, indices, layer_idx, scale)


def sgmv_shrink(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    """`y[s:e] += x[s:e] @ W[i][layer_idx].T` for every segment i, the rows s = s_start[i] to e = s_end[i] (exclusive).

    Args:
        y: T [rows, d_out], updated in place. Rows may be strided, here and in `x`.
        x: T [rows, d_in].
        w_ptr: int64 [S], for each segment the address of weights T [L, d_out, d_in] (a row for each output).
        s_start, s_end: int32 [S]. Segments may be empty (start and end equal, wherever: -1, -1 pads a table), may leave
            rows out (those stay as they are), may share an address, and must not overlap.
        tmp: uint8 workspace of any size, or None.
        layer_idx: which of the L layers.

    Raises:
        RuntimeError: an argument breaks this contract; `y` is untouched. On the CPU the contents of `s_start`, `s_end`
            and the addresses of segments with rows are checked too, on CUDA after `set_checks(True)`.
    """
    if not is_dynamo_compiling() and _shrink_shortcut(y, x, w_ptr, s_start, s_end, tmp, layer_idx, _LONG):
        return
    direct = (
        not is_intercepted()
        and type(y) in PLAIN
        and type(x) in PLAIN
        and type(w_ptr) in PLAIN
        and type(s_start) in PLAIN
        and type(s_end) in PLAIN
        and type(tmp) in PLAIN_OR_NONE
    )
    if direct:
        _run_shrink(y, x, w_ptr, s_start, s_end, tmp, layer_idx)
    else:
        torch.ops.punica_kernels.sgmv_shrink(y, x, w_ptr, s_start, s_end, tmp, layer_idx)


def sgmv_cutlass(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    """`y[s:e] += x[s:e] @ W[i][layer_idx]` for every segment i, the rows s = s_start[i] to e = s_end[i] (exclusive).

    Any d_in and d_out: it expands (d_in < d_out) and shrinks.

    Args:
        y: T [rows, d_out], updated in place. Rows may be strided, here and in `x`.
        x: T [rows, d_in].
        w_ptr: int64 [S], for each segment the address of weights T [L, d_in, d_out] (a row for each input).
        s_start, s_end: int32 [S]. Segments may be empty (start and end equal, wherever: -1, -1 pads a table), may leave
            rows out (those stay as they are), may share an address, and must not overlap.
        tmp: uint8 workspace of `sgmv_cutlass_tmp_size(S)` bytes or more, or None.
        layer_idx: which of the L layers.

    Raises:
        RuntimeError: an argument breaks this contract; `y` is untouched. On the CPU the contents of `s_start`, `s_end`
            and the addresses of segments with rows are checked too, on CUDA after `set_checks(True)`.
    """
    if not is_dynamo_compiling() and _cutlass_shortcut(y, x, w_ptr, s_start, s_end, tmp, layer_idx, _LONG):
        return
    direct = (
        not is_intercepted()
        and type(y) in PLAIN
        and type(x) in PLAIN
        and type(w_ptr) in PLAIN
        and type(s_start) in PLAIN
        and type(s_end) in PLAIN
        and type(tmp) in PLAIN_OR_NONE
    )
    if direct:
        _run_cutlass(y, x, w_ptr, s_start, s_end, tmp, layer_idx)
    else:
        torch.ops.punica_kernels.sgmv_cutlass(y, x, w_ptr, s_start, s_end, tmp, layer_idx)


def sgmv_cutlass_tmp_size(num_segments: int) -> int:
    """Bytes of `tmp` that `sgmv_cutlass` needs for `num_segments` segments; at least 1.

    Raises:
        RuntimeError: `num_segments` is negative.
    """
    return int(_tmp_size(num_segments))


def add_lora(
    y: Tensor,
    x: Tensor,
    a_ptr: Tensor,
    b_ptr: Tensor,
    ranks: Tensor,
    scales: Tensor,
    batch: LoraBatch,
    layer_idx: int,
    slice_offsets: Sequence[int] | None = None,
    *,
    a_layer_stride: int | None = None,
    b_layer_stride: int | None = None,
    b_row_stride: int | None = None,
    max_rank: int = MAX_RANK,
) -> None:
    """The whole LoRA of a layer: `y[t, slice s] += scale * B @ (A @ x[t])` for every row t that has an adapter.

    A and B are those of the row's adapter for slice s, each adapter at its own rank r. `A @ x[t]` stays float32; the
    result is rounded once, when it is stored.

    Args:
        y: T [rows, width], updated in place. Rows may be strided, here and in `x`.
        x: T [rows, h_in].
        a_ptr: int64 [slices, num_adapters], addresses of T [L, r, h_in].
        b_ptr: int64 [slices, num_adapters], addresses of T [L, h_out of the slice, r]. An address of 0 here or in
            `a_ptr`, or a rank of 0: that adapter does nothing for that slice.
        ranks: int32 [num_adapters], or [slices, num_adapters] where slices differ.
        scales: float32 [num_adapters] or [slices, num_adapters], factor of the update.
        batch: the adapter of each row; its capacity is at least the rows of `y`. Rows of no adapter stay as they are.
        layer_idx: which of the L layers.
        slice_offsets: slices + 1 ascending columns of `y`: slice s is the columns from entry s up to entry s + 1.
            Columns of no slice stay as they are. Default: one slice, all of `y`. At most 16 slices.
        a_layer_stride, b_layer_stride: elements from one layer to the next; default r * h_in and
            h_out * `b_row_stride`. They count for all adapters and slices.
        b_row_stride: elements from one row of B to the next; default r. Where slots are padded to the largest rank,
            that rank.
        max_rank: no adapter's rank is larger. Changes no bit of the result; kernels may be faster if it is low.

    Raises:
        RuntimeError: an argument breaks this contract; `y` is untouched. On the CPU the contents of the batch, and the
            ranks and addresses that it chooses, are checked too, on CUDA after `set_checks(True)`.
    """
    order, segment_adapter, segment_start, counts = (
        batch.order,
        batch.segment_adapter,
        batch.segment_start,
        batch.counts,
    )
    if not is_dynamo_compiling() and _add_lora_shortcut(
        y, x, a_ptr, b_ptr, ranks, scales, order, segment_adapter, segment_start, counts, layer_idx, slice_offsets,
        a_layer_stride, b_layer_stride, b_row_stride, max_rank, _LONG,
    ):  # fmt: skip
        return
    tables = (a_ptr, b_ptr, ranks, scales, order, segment_adapter, segment_start)
    direct = (
        not is_intercepted()
        and type(y) in PLAIN
        and type(x) in PLAIN
        and all(type(table) in PLAIN for table in tables)
        and type(counts) in PLAIN_OR_NONE
    )
    run = _run_add_lora if direct else torch.ops.punica_kernels.add_lora
    run(
        y, x, *tables, counts, layer_idx, slice_offsets, a_layer_stride=a_layer_stride, b_layer_stride=b_layer_stride,
        b_row_stride=b_row_stride, max_rank=max_rank,
    )  # fmt: skip


# What follows runs an op on real tensors; the dispatcher's kernels for CPU and CUDA are these same functions.


def _is_long(y: Tensor, x: Tensor) -> bool:
    # A tensor of the wrong rank is for the library to refuse.
    return y.dim() == 2 and x.nbytes * y.shape[1] > _LONG


def _run_bgmv(y: Tensor, x: Tensor, w_ptr: Tensor, indices: Tensor, layer_idx: int, scale: float) -> None:
    # Only floating-point tensors can require grad or be lazy negative views, conj().imag.
    try:
        if y.is_neg() or x.is_neg() or (is_grad_enabled() and (y.requires_grad or x.requires_grad)):
            refuse_grad_and_neg("dispatch_bgmv", (y, x, w_ptr, indices))
        kernel = _bgmv.released if y.is_cpu and x.nbytes * y.nbytes > _MAYBE_LONG and _is_long(y, x) else _bgmv.held
        kernel(y, x, w_ptr, indices, layer_idx, scale, get_num_threads())
    except (RuntimeError, AttributeError) as cause:
        explain("dispatch_bgmv", (y, x, w_ptr, indices), cause)
    _increment_version((y,))


def _run_sgmv(
    op: str,
    kernels: Kernel,
    y: Tensor,
    x: Tensor,
    w_ptr: Tensor,
    s_start: Tensor,
    s_end: Tensor,
    tmp: Tensor | None,
    layer_idx: int,
) -> None:
    try:
        if y.is_neg() or x.is_neg() or (is_grad_enabled() and (y.requires_grad or x.requires_grad)):
            refuse_grad_and_neg(op, (y, x, w_ptr, s_start, s_end, tmp))
        kernel = kernels.released if y.is_cpu and x.nbytes * y.nbytes > _MAYBE_LONG and _is_long(y, x) else kernels.held
        kernel(y, x, w_ptr, s_start, s_end, tmp, layer_idx, get_num_threads())
    except (RuntimeError, AttributeError) as cause:
        explain(op, (y, x, w_ptr, s_start, s_end, tmp), cause)
    _increment_version((y,) if tmp is None else (y, tmp))


def _run_shrink(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    _run_sgmv("sgmv_shrink", _shrink, y, x, w_ptr, s_start, s_end, tmp, layer_idx)


def _run_cutlass(
    y: Tensor, x: Tensor, w_ptr: Tensor, s_start: Tensor, s_end: Tensor, tmp: Tensor | None, layer_idx: int
) -> None:
    _run_sgmv("sgmv_cutlass", _cutlass, y, x, w_ptr, s_start, s_end, tmp, layer_idx)


def _run_add_lora(
    y: Tensor,
    x: Tensor,
    a_ptr: Tensor,
    b_ptr: Tensor,
    ranks: Tensor,
    scales: Tensor,
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor | None,
    layer_idx: int,
    slice_offsets: Sequence[int] | None = None,
    *,
    a_layer_stride: int | None = None,
    b_layer_stride: int | None = None,
    b_row_stride: int | None = None,
    max_rank: int = MAX_RANK,
) -> None:
    tensors = (y, x, a_ptr, b_ptr, ranks, scales, order, segment_adapter, segment_start, counts)
    try:
        floats = (y, x, scales)
        if any(t.is_neg() for t in floats) or (is_grad_enabled() and any(t.requires_grad for t in floats)):
            refuse_grad_and_neg("add_lora", tensors)
        kernel = _add_lora.released if y.is_cpu and 16 * (x.nbytes + y.nbytes) > _LONG else _add_lora.held
        kernel(
            *tensors, layer_idx, slice_offsets, a_layer_stride, b_layer_stride, b_row_stride, max_rank,
            get_num_threads(),
        )  # fmt: skip
    except (RuntimeError, AttributeError) as cause:
        explain("add_lora", tensors, cause)
    _increment_version((y,))

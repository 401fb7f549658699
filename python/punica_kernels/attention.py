"""Attention over the paged KV cache: grouped-query, causal, aligned at the end.

The cache's tables (`kv_ptrs`, `kv_indptr`, `last_page_offset`) are those of `punica_kernels.init_kv`, where a page is
described. T is float16, bfloat16 or float32; scores and sums are float32. A query's bits depend on the query and the
keys it sees, not on the rest of the batch or on the chunk that it came in.
"""

import torch
from torch import Tensor, get_num_threads
from torch._C import _increment_version, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ._dispatch import PLAIN, PLAIN_OR_NONE, explain, is_intercepted, refuse_grad_and_neg
from ._library import Kernel

_prefill, _decode = Kernel("batch_prefill"), Kernel("batch_decode")
_prefill_shortcut, _decode_shortcut = _prefill.shortcut, _decode.shortcut

# What a call on the CPU takes about 100 us for: above, the GIL is released. Decode: bytes of pages of one layer.
# Prefill: bytes of queries times tokens of the cache, as if every query saw all of them.
_LONG_DECODE = 2_000_000
_LONG_PREFILL = 4_000_000


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
    """Attention of the queries [qo_indptr[i], qo_indptr[i + 1]) over the tokens of sequence i, for every sequence.

    Query j of q_len sees the keys 0 to kv_len - q_len + j; one that sees none (a sequence without pages) gets zeros.
    Rows that no sequence covers stay as they are.

    Args:
        o: T [rows, H, D], written. H is a multiple of `num_kv_heads`, D even and at most 256. Rows may be strided (a
            slice of a wider tensor), here and in `q`.
        q: T [rows, H, D].
        qo_indptr: int32 [B + 1].
        kv_ptrs: int64 [>= kv_indptr[B]], addresses of pages T [num_layers, 2, num_kv_heads, page_size, D].
        kv_indptr: int32 [B + 1].
        last_page_offset: int32 [B], tokens in each sequence's last page, 1 to page_size.
        tmpbuf: uint8 workspace, or None. An error names the bytes needed where it is too small.
        num_layers, layer_idx, num_kv_heads, page_size: extents of a page, and which of the layers.
        sm_scale: factor of the scores; default 1 / sqrt(D).
        rope_theta: rotate q and k inside (Llama's halves) by the angle position / rope_scale * theta^(-2 d / D), for
            caches that hold unrotated keys; default: no rotation. The kernels after which these are named always
            rotated, with 1e4.
        rope_scale: divides positions.
        lse: float32 [rows, H], written: the log-sum-exp of the scores in base 2 (-inf where no key is seen).
        window_left: a query sees only this many keys before its own position; -1: all.
        logits_soft_cap: scores become cap * tanh(score / cap) where it is above 0.

    Raises:
        RuntimeError: an argument breaks this contract; nothing is written. On the CPU the contents of the tables are
            checked too, on CUDA after `set_checks(True)`.
    """
    if not is_dynamo_compiling() and _prefill_shortcut(
        o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads, page_size,
        sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap, _LONG_PREFILL,
    ):  # fmt: skip
        return
    direct = (
        not is_intercepted()
        and type(o) in PLAIN
        and type(q) in PLAIN
        and type(qo_indptr) in PLAIN
        and type(kv_ptrs) in PLAIN
        and type(kv_indptr) in PLAIN
        and type(last_page_offset) in PLAIN
        and type(tmpbuf) in PLAIN_OR_NONE
        and type(lse) in PLAIN_OR_NONE
    )
    if direct:
        _run_prefill(
            o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads,
            page_size, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap,
        )  # fmt: skip
    else:
        torch.ops.punica_kernels.batch_prefill(
            o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads,
            page_size, sm_scale=sm_scale, rope_theta=rope_theta, rope_scale=rope_scale, lse=lse,
            window_left=window_left, logits_soft_cap=logits_soft_cap,
        )  # fmt: skip


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
    """`batch_prefill` with one query a sequence, its newest token: row i is the query of sequence i.

    Args:
        o: T [B, H, D], written.
        q: T [B, H, D].
        lse: float32 [B, H]. The other arguments are those of `batch_prefill`.

    Raises:
        RuntimeError: as `batch_prefill`.
    """
    if not is_dynamo_compiling() and _decode_shortcut(
        o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads, page_size,
        sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap, _LONG_DECODE,
    ):  # fmt: skip
        return
    direct = (
        not is_intercepted()
        and type(o) in PLAIN
        and type(q) in PLAIN
        and type(kv_ptrs) in PLAIN
        and type(kv_indptr) in PLAIN
        and type(last_page_offset) in PLAIN
        and type(tmpbuf) in PLAIN_OR_NONE
        and type(lse) in PLAIN_OR_NONE
    )
    if direct:
        _run_decode(
            o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads,
            page_size, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap,
        )  # fmt: skip
    else:
        torch.ops.punica_kernels.batch_decode(
            o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads,
            page_size, sm_scale=sm_scale, rope_theta=rope_theta, rope_scale=rope_scale, lse=lse,
            window_left=window_left, logits_soft_cap=logits_soft_cap,
        )  # fmt: skip


# What follows runs an op on real tensors; the dispatcher's kernels for CPU and CUDA are these same functions.


def _run_prefill(
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
    sm_scale: float | None = None,
    rope_theta: float | None = None,
    rope_scale: float = 1.0,
    lse: Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> None:
    tensors = (o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, lse)
    try:
        if (
            o.is_neg()
            or q.is_neg()
            or (is_grad_enabled() and (o.requires_grad or q.requires_grad))
            or (lse is not None and (lse.is_neg() or (is_grad_enabled() and lse.requires_grad)))
        ):
            refuse_grad_and_neg("batch_prefill", tensors)
        long = q.is_cpu and q.nbytes * (kv_ptrs.nbytes // 8) * page_size > _LONG_PREFILL
        (_prefill.released if long else _prefill.held)(
            o, q, qo_indptr, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads,
            page_size, sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap, get_num_threads(),
        )  # fmt: skip
    except (RuntimeError, AttributeError) as cause:
        explain("batch_prefill", tensors, cause)
    if tmpbuf is None and lse is None:
        _increment_version((o,))
    else:
        _increment_version([tensor for tensor in (o, tmpbuf, lse) if tensor is not None])


def _run_decode(
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
    sm_scale: float | None = None,
    rope_theta: float | None = None,
    rope_scale: float = 1.0,
    lse: Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> None:
    tensors = (o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, lse)
    try:
        if (
            o.is_neg()
            or q.is_neg()
            or (is_grad_enabled() and (o.requires_grad or q.requires_grad))
            or (lse is not None and (lse.is_neg() or (is_grad_enabled() and lse.requires_grad)))
        ):
            refuse_grad_and_neg("batch_decode", tensors)
        # A page of one layer is at least 256 bytes a token and KV head for the usual head_dim of 64 and up.
        long = q.is_cpu and kv_ptrs.nbytes * 32 * page_size * num_kv_heads > _LONG_DECODE
        (_decode.released if long else _decode.held)(
            o, q, kv_ptrs, kv_indptr, last_page_offset, tmpbuf, num_layers, layer_idx, num_kv_heads, page_size,
            sm_scale, rope_theta, rope_scale, lse, window_left, logits_soft_cap, get_num_threads(),
        )  # fmt: skip
    except (RuntimeError, AttributeError) as cause:
        explain("batch_decode", tensors, cause)
    if tmpbuf is None and lse is None:
        _increment_version((o,))
    else:
        _increment_version([tensor for tensor in (o, tmpbuf, lse) if tensor is not None])

"""Writes of keys and values into the paged KV cache.

A page is one contiguous block T [L, 2, N, P, D] (index 0 of the second extent is K, 1 is V): L layers, N KV heads, P
tokens a page, D head dim; T is float16, bfloat16 or float32. Pages come from anywhere, aligned to 16 bytes, and whoever
calls keeps them alive: `kv_ptrs` holds their addresses, those of sequence i at
`kv_ptrs[kv_indptr[i]:kv_indptr[i + 1]]`. With n pages, a sequence has
`(n - 1) * P + last_page_offset[i]` tokens, its kv_len, the ones being written included.
"""

import torch
from torch import Tensor, get_num_threads
from torch._C import _increment_version, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ._dispatch import PLAIN, explain, is_intercepted, refuse_grad_and_neg
from ._library import Kernel

_init_kv, _append_kv = Kernel("init_kv"), Kernel("append_kv")
_init_shortcut, _append_shortcut = _init_kv.shortcut, _append_kv.shortcut

# Bytes of keys that a call on the CPU takes about 100 us for: above, the GIL is released.
_LONG = 2_000_000


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
    """Writes the rows [seqlen_indptr[i], seqlen_indptr[i + 1]) of `k` and `v` as the last positions of sequence i.

    It serves whole prompts and chunks alike. Sequences without pages are skipped.

    Args:
        kv_ptrs: int64 [>= kv_indptr[B]], addresses of pages, which are written (torch's schema declares `kv_ptrs`
            itself as mutated, so that compiled code keeps the order of calls that share it).
        kv_indptr: int32 [B + 1].
        last_page_offset: int32 [B], tokens in each sequence's last page, 1 to P.
        k, v: T [rows, N, D], D even and at most 256. Rows may be strided (a slice of a wider tensor).
        seqlen_indptr: int32 [B + 1].
        num_layers, layer_idx, num_kv_heads, page_size: L, which of the L layers, N, P.

    Raises:
        RuntimeError: an argument breaks this contract; nothing is written. On the CPU the contents of the tables are
            checked too (a sequence given more tokens than its kv_len is an error), on CUDA after `set_checks(True)`.
    """
    if not is_dynamo_compiling() and _init_shortcut(
        kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, num_layers, layer_idx, num_kv_heads, page_size, _LONG
    ):
        return
    direct = (
        not is_intercepted()
        and type(kv_ptrs) in PLAIN
        and type(kv_indptr) in PLAIN
        and type(last_page_offset) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
        and type(seqlen_indptr) in PLAIN
    )
    run = _run_init_kv if direct else torch.ops.punica_kernels.init_kv
    run(
        kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, num_layers, layer_idx, num_kv_heads, page_size
    )  # fmt: skip


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
    """Writes row i of `k` and `v` as the last position of sequence i: `init_kv` with one token a sequence.

    Args:
        k, v: T [B, N, D]. The other arguments are those of `init_kv`.

    Raises:
        RuntimeError: as `init_kv`.
    """
    if not is_dynamo_compiling() and _append_shortcut(
        kv_ptrs, kv_indptr, last_page_offset, k, v, num_layers, layer_idx, num_kv_heads, page_size, _LONG
    ):
        return
    direct = (
        not is_intercepted()
        and type(kv_ptrs) in PLAIN
        and type(kv_indptr) in PLAIN
        and type(last_page_offset) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
    )
    run = _run_append_kv if direct else torch.ops.punica_kernels.append_kv
    run(kv_ptrs, kv_indptr, last_page_offset, k, v, num_layers, layer_idx, num_kv_heads, page_size)


# What follows runs an op on real tensors; the dispatcher's kernels for CPU and CUDA are these same functions.


def _run_init_kv(
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
    tensors = (kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr)
    try:
        if k.is_neg() or v.is_neg() or (is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            refuse_grad_and_neg("init_kv", tensors)
        kernel = _init_kv.released if k.is_cpu and k.nbytes > _LONG else _init_kv.held
        kernel(
            kv_ptrs, kv_indptr, last_page_offset, k, v, seqlen_indptr, num_layers, layer_idx, num_kv_heads, page_size,
            get_num_threads(),
        )  # fmt: skip
    except (RuntimeError, AttributeError) as cause:
        explain("init_kv", tensors, cause)
    _increment_version((kv_ptrs,))


def _run_append_kv(
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
    tensors = (kv_ptrs, kv_indptr, last_page_offset, k, v)
    try:
        if k.is_neg() or v.is_neg() or (is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            refuse_grad_and_neg("append_kv", tensors)
        kernel = _append_kv.released if k.is_cpu and k.nbytes > _LONG else _append_kv.held
        kernel(
            kv_ptrs, kv_indptr, last_page_offset, k, v, num_layers, layer_idx, num_kv_heads, page_size,
            get_num_threads(),
        )  # fmt: skip
    except (RuntimeError, AttributeError) as cause:
        explain("append_kv", tensors, cause)
    _increment_version((kv_ptrs,))

"""The operations as torch knows them: `torch.ops.punica_kernels.*`.

The schemas declare what is written: outputs, workspaces, and `kv_ptrs` in the KV writes, for what lies behind it is
written; so compiled code keeps the order of ops that share a table, and a KV write stays even if nothing in the graph
reads what it wrote. What lies behind an address is otherwise invisible to the compiler. So inside a compiled function

- memory behind an address (weights, pages) may be written by these ops only: a torch op that writes adapter weights
  may be moved behind an op that reads them through `w_ptr`;
- ops that are to keep their order must share the table, the same tensor: two tables with the same addresses are
  strangers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from . import attention, kv_cache, lora, lora_batch, norm
from ._dispatch import TENSORS, error, explain, refuse_grad_and_neg, require_one_device

_TABLES = "Tensor kv_indptr, Tensor last_page_offset"
_CACHE = "SymInt num_layers, SymInt layer_idx, SymInt num_kv_heads, SymInt page_size"
_ATTENTION = (
    f"Tensor kv_ptrs, {_TABLES}, Tensor(b!)? tmpbuf, {_CACHE}, *, float? sm_scale=None, float? rope_theta=None, "
    "float rope_scale=1.0, Tensor(c!)? lse=None, SymInt window_left=-1, float logits_soft_cap=0.0"
)
_SGMV = "Tensor(a!) y, Tensor x, Tensor w_ptr, Tensor s_start, Tensor s_end, Tensor(b!)? tmp, SymInt layer_idx"

_BATCH = "Tensor order, Tensor segment_adapter, Tensor segment_start, Tensor? counts"

_OPS: dict[str, tuple[str, Callable[..., None]]] = {
    "batch_prefill": (f"Tensor(a!) o, Tensor q, Tensor qo_indptr, {_ATTENTION}", attention._run_prefill),
    "batch_decode": (f"Tensor(a!) o, Tensor q, {_ATTENTION}", attention._run_decode),
    "init_kv": (
        f"Tensor(a!) kv_ptrs, {_TABLES}, Tensor k, Tensor v, Tensor seqlen_indptr, {_CACHE}",
        kv_cache._run_init_kv,
    ),
    "append_kv": (f"Tensor(a!) kv_ptrs, {_TABLES}, Tensor k, Tensor v, {_CACHE}", kv_cache._run_append_kv),
    "dispatch_bgmv": (
        "Tensor(a!) y, Tensor x, Tensor w_ptr, Tensor indices, SymInt layer_idx, float scale",
        lora._run_bgmv,
    ),
    "sgmv_cutlass": (_SGMV, lora._run_cutlass),
    "sgmv_shrink": (_SGMV, lora._run_shrink),
    "add_lora": (
        f"Tensor(a!) y, Tensor x, Tensor a_ptr, Tensor b_ptr, Tensor ranks, Tensor scales, {_BATCH}, SymInt layer_idx, "
        "SymInt[]? slice_offsets=None, *, SymInt? a_layer_stride=None, SymInt? b_layer_stride=None, "
        f"SymInt? b_row_stride=None, SymInt max_rank={lora.MAX_RANK}",
        lora._run_add_lora,
    ),
    "update_lora_batch": (
        "Tensor indices, SymInt num_adapters, Tensor(a!) batch_indices, Tensor(b!) order, Tensor(c!) segment_adapter, "
        "Tensor(d!) segment_start, Tensor(e!) counts",
        lora_batch._run_update,
    ),
    "rms_norm": (
        "Tensor(a!) output, Tensor input, Tensor weight, float epsilon, *, Tensor(b!)? residual=None",
        norm._run_rms_norm,
    ),
}

# Torch would resolve a lazy view by copying, and refuse the others without naming the argument.
_REFUSED = (
    "Negative",
    "Conjugate",
    "SparseCPU",
    "SparseCUDA",
    "SparseCsrCPU",
    "SparseCsrCUDA",
    "QuantizedCPU",
    "QuantizedCUDA",
    "MkldnnCPU",
)

_library: Any = torch.library.Library("punica_kernels", "DEF")  # type: ignore[no-untyped-call]


def _register(name: str, schema: str, run: Callable[..., None]) -> None:
    _library.define(f"{name}({schema}) -> ()")
    op = getattr(torch.ops.punica_kernels, name).default
    positions = [[argument.name for argument in op._schema.arguments].index(tensor) for tensor in TENSORS[name]]

    def tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
        return [
            args[position] if position < len(args) else kwargs.get(tensor)
            for tensor, position in zip(TENSORS[name], positions, strict=True)
        ]

    def without_grad(keyset: Any, *args: Any, **kwargs: Any) -> None:
        # Here and not only in `run`: what compiles or transforms the op peels requires_grad off before `run` sees it.
        if (torch.is_grad_enabled() and _C._any_requires_grad(*args, **kwargs)) or forward_ad._current_level >= 0:
            refuse_grad_and_neg(name, tensors(args, kwargs))
        with _C._AutoDispatchBelowAutograd():
            op.redispatch(keyset & _C._after_autograd_keyset, *args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> None:
        require_one_device(name, tensors(args, kwargs))

    def refuse(*args: Any, **kwargs: Any) -> None:
        refuse_grad_and_neg(name, tensors(args, kwargs))
        explain(name, tensors(args, kwargs), error(name, "tensors must be plain"))

    def no_vmap(*_: Any, **__: Any) -> None:
        raise error(name, "torch.vmap is not supported; pass a batch to the operation itself")

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    _library.impl(name, without_grad, "Autograd", with_keyset=True)
    _library.impl(name, no_vmap, "FuncTorchBatched")
    for key in _REFUSED:
        _library.impl(name, refuse, key)
    torch.library.register_fake(f"punica_kernels::{name}", fake, lib=_library)
    # Not dead code even if its table is made in the graph and read by nobody. (Effect tokens would say more, but torch
    # takes them only for ops whose schema mutates nothing.)
    torch.fx.node.has_side_effect(op)


for _name, (_schema, _run) in _OPS.items():
    _register(_name, _schema, _run)

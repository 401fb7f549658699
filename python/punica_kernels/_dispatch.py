"""Which way a call takes, and what is refused before it reaches the library.

The direct way hands the tensors to the library at once. It is right only if nothing listens in: torch is not compiling,
no TorchDispatchMode is on the stack, no functorch transform or forward-mode level is active, and every tensor is a
plain one. A FakeTensor or a functionalized tensor handed over directly would arrive as a null pointer, and make_fx
would not see the op. All else goes through torch's dispatcher, which is slower by microseconds and comes back to the
same functions.

Before either, the operations try the library's shortcut (bindings/shortcut.h), which knows the same rules and answers
False where it finds anything but an ordinary, valid, short call of the direct way. Errors are never said there.
"""

from collections.abc import Iterator, Sequence
from types import NoneType
from typing import NoReturn

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# The tensor arguments of each operation, in the order in which this package passes them around.
_TABLES = ("kv_ptrs", "kv_indptr", "last_page_offset")
_SEGMENTS = ("order", "segment_adapter", "segment_start", "counts")
TENSORS = {
    "batch_prefill": ("o", "q", "qo_indptr", *_TABLES, "tmpbuf", "lse"),
    "batch_decode": ("o", "q", *_TABLES, "tmpbuf", "lse"),
    "init_kv": (*_TABLES, "k", "v", "seqlen_indptr"),
    "append_kv": (*_TABLES, "k", "v"),
    "dispatch_bgmv": ("y", "x", "w_ptr", "indices"),
    "sgmv_cutlass": ("y", "x", "w_ptr", "s_start", "s_end", "tmp"),
    "sgmv_shrink": ("y", "x", "w_ptr", "s_start", "s_end", "tmp"),
    "add_lora": ("y", "x", "a_ptr", "b_ptr", "ranks", "scales", *_SEGMENTS),
    "update_lora_batch": ("indices", "batch_indices", *_SEGMENTS),
    "rms_norm": ("output", "input", "weight", "residual"),
}

_OPTIONAL = frozenset({"tmp", "tmpbuf", "lse", "residual"})
_OPTIONAL_OF = {"add_lora": frozenset({"counts"})}

# The direct way is for tensors whose type is in PLAIN, and optional ones whose type is in PLAIN_OR_NONE.
PLAIN = frozenset({Tensor, torch.nn.Parameter})
PLAIN_OR_NONE = PLAIN | {NoneType}


def is_intercepted() -> bool:
    return (
        is_compiling()
        or _len_torch_dispatch_stack() != 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def error(op: str, message: str) -> RuntimeError:
    return RuntimeError(f"punica_kernels.{op}: {message}")


def refuse_grad_and_neg(op: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises if a tensor asks for a gradient, or is a view whose memory holds its negative or conjugate."""
    grad = torch.is_grad_enabled()
    dual = forward_ad._current_level >= 0
    for name, tensor in _named(op, tensors):
        if grad and tensor.requires_grad:
            raise error(op, f"{name} requires grad, but there is no backward; use torch.no_grad()")
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise error(op, f"{name} carries a tangent, but there is no forward-mode derivative either")
        if tensor.is_neg() or tensor.is_conj():
            kind, remedy = ("negative", "resolve_neg") if tensor.is_neg() else ("conjugate", "resolve_conj")
            raise error(op, f"{name} must be a plain tensor, got a lazy {kind} view; use {remedy}()")


def explain(op: str, tensors: Sequence[Tensor | None], cause: Exception) -> None:
    """After a failed call: returns if all tensors are on meta (nothing is to be done), else raises what was wrong.

    Tensors that torch cannot describe to the library at all fail before it sees them, with torch's words for it. On
    success none of this costs anything, and success is what must be fast.
    """
    for name, given in zip(TENSORS[op], tensors, strict=True):
        if given is None and name not in _OPTIONAL and name not in _OPTIONAL_OF.get(op, ()):
            raise TypeError(f"punica_kernels.{op}: {name} must be a tensor, got None") from None
    for name, tensor in _named(op, tensors):
        if tensor.layout is not torch.strided:
            raise error(op, f"{name} must be a strided tensor, got layout {tensor.layout}") from None
        if tensor.is_quantized:
            raise error(op, f"{name} must not be quantized, got {tensor.dtype}") from None
    require_one_device(op, tensors)
    ours = str(cause).startswith("punica_kernels.")
    if ours or any(tensor.device.type != "meta" for _, tensor in _named(op, tensors)):
        raise cause


def require_one_device(op: str, tensors: Sequence[Tensor | None]) -> None:
    named = _named(op, tensors)
    first, like = next(named)
    for name, tensor in named:
        if tensor.device != like.device:
            raise error(op, f"{name} must be on {like.device} like {first}, got {tensor.device}") from None


def _named(op: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in zip(TENSORS[op], tensors, strict=True) if tensor is not None)


def missing(op: str, *names: str) -> NoReturn:
    raise TypeError(f"{op}() missing required argument: {' or '.join(map(repr, names))}")

"""Kernels for serving many LoRA adapters in one batch.

    lora        dispatch_bgmv, sgmv_shrink, sgmv_cutlass, sgmv_cutlass_tmp_size; add_lora, LoraBatch,
                AdapterSet
    attention   batch_prefill, batch_decode
    kv_cache    init_kv, append_kv
    norm        rms_norm

All write in place and return None; errors are RuntimeErrors that name operation, argument, what was expected and what
came. `punica_kernels.reference` has the same functions in plain PyTorch: the definition of what each computes.
`torch.ops.punica_kernels.*` are the same operations for torch's dispatcher, which torch.compile sees through.
`punica_kernels.peft.accelerate(model)` lets PEFT's mixed batches run through them.
"""

import importlib
from typing import Any

from . import _torch_ops as _torch_ops  # registers the operations with torch
from . import reference
from ._library import function as _function
from ._settings import (
    active_cuda_arch,
    active_isa,
    early_reads,
    has_cuda,
    last_cuda_arch,
    last_isa,
    set_checks,
    supported_isas,
)
from .adapter_set import AdapterError, AdapterSet, LoraWeights
from .attention import batch_decode, batch_prefill
from .kv_cache import append_kv, init_kv
from .lora import add_lora, dispatch_bgmv, sgmv_cutlass, sgmv_cutlass_tmp_size, sgmv_shrink
from .lora_batch import LoraBatch
from .norm import rms_norm


def __getattr__(name: str) -> Any:
    if name == "peft":  # only when asked for: it imports PEFT, and so Transformers
        return importlib.import_module(".peft", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = str(_function("version")())

__all__ = [
    "AdapterError",
    "AdapterSet",
    "LoraBatch",
    "LoraWeights",
    "active_cuda_arch",
    "active_isa",
    "add_lora",
    "append_kv",
    "batch_decode",
    "batch_prefill",
    "dispatch_bgmv",
    "early_reads",
    "has_cuda",
    "init_kv",
    "last_cuda_arch",
    "last_isa",
    "reference",
    "rms_norm",
    "set_checks",
    "sgmv_cutlass",
    "sgmv_cutlass_tmp_size",
    "sgmv_shrink",
    "supported_isas",
]

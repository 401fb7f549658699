"""The parts of vLLM that the wrapper overrides, calls or hooks into, as they were when it was written."""

import importlib
import inspect
from typing import Any

_BASE = "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase"
_MANAGER = "vllm.lora.model_manager.LoRAModelManager"

# Arguments by name, in order, self left out.
_SIGNATURES = {
    f"{_BASE}.update_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
    f"{_BASE}._update_base_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    f"{_BASE}.add_shrink": ("y", "x", "lora_a_stacked", "scale", "kwargs"),
    f"{_BASE}.add_expand": ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs"),
    f"{_BASE}.add_lora_embedding": ("y", "x", "lora_b_stacked", "add_inputs", "kwargs"),
    f"{_BASE}.add_lora_linear": (
        "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs",
    ),
    f"{_BASE}.add_lora_logits": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"),
    f"{_MANAGER}._create_lora_modules": (),
    f"{_MANAGER}.activate_adapter": ("lora_id",),
}  # fmt: skip

_WRAPPERS = {
    "CPU": "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU",
    "CUDA": "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU",
}
_INIT = ("max_num_batched_tokens", "max_batches", "device", "kwargs")

_META = "vllm.lora.ops.triton_ops.lora_kernel_metadata.LoRAKernelMeta"
_META_FIELDS = (
    "token_indices_sorted_by_lora_ids", "active_lora_ids", "lora_token_start_loc", "no_lora_flag_cpu",
    "num_active_loras_cpu", "default_num_active_loras_cpu",
)  # fmt: skip


def difference(platform: str) -> str | None:
    """The first difference from what the wrapper expects on "CPU" or "CUDA"; None if there is none."""
    expected = _SIGNATURES | {f"{_WRAPPERS[platform]}.__init__": _INIT}
    for name, arguments in expected.items():
        found = _find(name)
        if found is None:
            return f"there is no {name}"
        names = tuple(inspect.signature(found).parameters)[1:]
        if names != arguments:
            return f"{name} takes ({', '.join(names)}), expected ({', '.join(arguments)})"
    if platform == "CUDA":
        fields = getattr(_find(_META), "__dataclass_fields__", ())
        for field in _META_FIELDS:
            if field not in fields:
                return f"{_META} has no {field}"
    return None


def _find(name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(path), attribute, None)
    except ImportError:
        owner = _find(path) if "." in path else None
        return getattr(owner, attribute, None)

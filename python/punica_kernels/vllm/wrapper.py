"""The Punica wrappers that vLLM's LoRA layers call, on this package's kernels. Importing this imports vLLM.

Each is a child of vLLM's own for the platform. What is not overridden here, and what does not fit, is done by the
parent: LoRA of mixture-of-experts layers, full heads of classifiers, data types that differ within a call.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ..lora_batch import LoraBatch
from . import logger, ops, tables

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_said: set[str] = set()


def _say(message: str) -> None:
    # Not in a trace: what is logged there would be traced as well.
    if not is_compiling() and message not in _said:
        _said.add(message)
        logger.info("punica_kernels: %s", message)


def _fits(y: Tensor, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a call is one that the kernels do. (A row stride is theirs, a stride within rows is not.)"""
    ok = (
        y.dtype == x.dtype == weights[0].dtype
        and y.dtype in _TYPES
        and y.stride(-1) == 1
        and x.stride(-1) == 1
        and len(weights) <= ops.MAX_SLICES
    )
    if not ok:
        _say(
            f"a layer with {len(weights)} slices, y {y.dtype}, x {x.dtype}, adapters {weights[0].dtype} stays with "
            "vLLM's own kernels"
        )
    return ok


class OurKernels(PunicaWrapperBase):  # type: ignore[misc]
    _max_rank: int

    def _rows(self) -> ops.Batch:
        """The adapter of each token."""
        raise NotImplementedError

    def _prompt_rows(self) -> ops.Batch:
        """The adapter of each row that logits are computed of."""
        raise NotImplementedError

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        if not _fits(y, x, lora_a_stacked):
            own = super().add_lora_linear
            own(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        if not kwargs.get("add_inputs", True):
            y.zero_()
        rows = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        ops.linear(rows, x, lora_a_stacked, lora_b_stacked, self._rows(), output_slices, scale)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        if not isinstance(y, Tensor) or y.dim() != 3 or not _fits(x, x, lora_a_stacked):
            super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
            return
        # With all ranks here, and not a share of them, workers have shares of h_in, and will add up what they have.
        exact = lora_a_stacked[0].shape[-2] == self._max_rank
        ops.shrink(y, x.view(-1, x.shape[-1]), lora_a_stacked, self._rows(), scale, exact=exact)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or not add_inputs or not _fits(y, y, lora_b_stacked):
            super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs)
            return
        ops.expand(y.view(-1, y.shape[-1]), x, lora_b_stacked, self._rows(), output_slices, offset_start)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not add_inputs or not _fits(y, y, (lora_b_stacked,)):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)
            return
        ops.expand(y, x.unsqueeze(0), (lora_b_stacked,), self._rows(), (y.shape[-1],), 0)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if not _fits(y, x, (lora_a_stacked,)):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
            return
        rows, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        # Either may be padded.
        width = min(rows.shape[-1], lora_b_stacked.shape[-2])
        ops.linear(rows, x, (lora_a_stacked,), (lora_b_stacked,), self._prompt_rows(), (width,), scale)


class _Rows:
    def __init__(self, nobody: Tensor, slots: int):
        self._batch = batch = LoraBatch(nobody, slots)
        self._nobody = torch.ones(1, dtype=torch.bool)
        segments = torch.tensor([len(batch.segment_adapter)])
        self.tensors = batch.order, batch.segment_adapter, batch.segment_start, batch.counts, self._nobody, segments

    def update(self, slots: Tensor, nobody: bool) -> None:
        self._nobody.fill_(nobody)
        if not nobody:
            self._batch.update(slots)


class PunicaKernelsWrapperCPU(OurKernels, PunicaWrapperCPU):  # type: ignore[misc]
    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        config = kwargs["lora_config"]
        self._max_rank = config.max_lora_rank
        with torch.inference_mode(False):  # vLLM updates in it and outside of it
            nobody = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32, device=device)
            self._tokens, self._prompts = (_Rows(nobody, config.max_loras) for _ in range(2))

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        # For what the parent still does: its way for single tokens serves any batch.
        self.is_prefill = False
        self._tokens.update(self.token_lora_indices, not any(mapping.index_mapping))
        self._prompts.update(self.sampler_indices, not any(mapping.prompt_mapping))

    def _rows(self) -> ops.Batch:
        return self._tokens.tensors

    def _prompt_rows(self) -> ops.Batch:
        return self._prompts.tensors


def install() -> None:
    """Makes vLLM's manager of adapters say which layers there are, and when it has filled a slot."""
    if getattr(LoRAModelManager, "punica_kernels", False):
        return
    LoRAModelManager.punica_kernels = True
    # (Its __init__ is running when the first wrapper is asked for. The layers come after the wrappers.)
    create, activate = LoRAModelManager._create_lora_modules, LoRAModelManager.activate_adapter

    @functools.wraps(create)
    def create_and_register(self: Any) -> None:
        create(self)
        if any(isinstance(wrapper, OurKernels) for wrapper in self.punica_wrapper_mapping.values()):
            _register_layers(self)

    @functools.wraps(activate)
    def activate_and_read_ranks(self: Any, lora_id: int) -> bool:
        activated = bool(activate(self, lora_id))
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            for layer in getattr(self, "_punica_layers", ()):
                layer.read_ranks(slot)
        return activated

    LoRAModelManager._create_lora_modules = create_and_register
    LoRAModelManager.activate_adapter = activate_and_read_ranks


def _register_layers(manager: Any) -> None:
    layers, left = [], Counter[str]()
    for module in manager.modules.values():
        layer = _layer_of(module)
        if layer is None:
            left[type(module).__name__] += 1
        else:
            tables.add(layer)
            layers.append(layer)
    manager._punica_layers = layers
    weakref.finalize(manager, tables.remove, layers)
    logger.info("punica_kernels: the LoRA of %d layers is computed by punica_kernels", len(layers))
    if left:
        names = ", ".join(f"{name} ({count})" for name, count in left.items())
        _say(f"stays with vLLM's own kernels: {names}")


def _layer_of(module: BaseLayerWithLoRA) -> tables.Layer | None:
    held = vars(module)
    a, b = held.get("lora_a_stacked"), held.get("lora_b_stacked")
    if a is None or b is None:
        return None
    a, b = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (a, b))
    stacked = all(t.dim() == 4 and t.dtype in _TYPES for t in b)
    if not b or not stacked:  # experts have a list of views there
        return None
    # An embedding's A is a table that vLLM looks rows up in.
    return tables.Layer(None if a[0].dim() == 3 else a, b)

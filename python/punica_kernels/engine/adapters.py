"""The adapters of an engine, and the LoRA of one batch: four calls a layer, whatever adapters and ranks are in it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import punica_kernels as pk

from .checkpoint import ATTENTION_MODULES, ModelConfig
from .errors import EngineError

NO_ADAPTER = -1

# One call each: modules that read the same input, in the order in which their outputs lie side by side.
PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
MAX_ADAPTERS = 64  # unless more are given at the start


def module_path(module: str) -> str:
    """Of a module inside a layer."""
    return f"{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"


class Adapters:
    """The loaded adapters. An id is a slot of the set; NO_ADAPTER serves the base model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_adapters: int = MAX_ADAPTERS):
        shapes = {
            projection: {module_path(module): config.module_shape(module) for module in modules}
            for projection, modules in PROJECTIONS.items()
        }
        self.device = device
        self.set = pk.AdapterSet(shapes, device, dtype, num_layers=config.num_layers, capacity=max_adapters)
        self.seconds = 0.0  # in LoRA calls; on CUDA that is the time to launch them

    @property
    def names(self) -> list[str]:
        return self.set.names

    def load(self, name: str, path: Path) -> None:
        """EngineError for an adapter that is missing, broken or cannot be represented."""
        try:
            self.set.add(name, path)
        except pk.AdapterError as error:
            raise EngineError(str(error)) from error

    def load_weights(self, name: str, weights: Mapping[str, pk.LoraWeights]) -> None:
        """From tensors by module, "q_proj" and so on."""
        try:
            self.set.add_weights(name, {module_path(module): w for module, w in weights.items()})
        except pk.AdapterError as error:
            raise EngineError(str(error)) from error

    def remove(self, name: str) -> None:
        self.id(name)
        self.set.remove(name)

    def id(self, name: str | None) -> int:
        try:
            return self.set.index(name)
        except pk.AdapterError as error:
            raise EngineError(str(error)) from error


class Lora:
    """The LoRA of a batch of B sequences: `apply` adds it to the output of a projection.

    With a `capacity`, for batches of up to so many rows whose adapters set() changes in place, as captured graphs want.
    """

    def __init__(
        self,
        adapters: Adapters,
        ids: Sequence[int],
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
    ):
        self.adapters = adapters
        self.batch = pk.LoraBatch(self._rows(ids, lengths), adapters.set.capacity, capacity)

    def _rows(self, ids: Sequence[int], lengths: Sequence[int] | None) -> Tensor:
        """The adapter of each row, on the device. lengths: rows of each sequence; None: one each."""
        # torch's allocator of pinned memory hands it out again only when the copy is done.
        rows = torch.tensor(ids, dtype=torch.int32, pin_memory=self.adapters.device.type == "cuda")
        if lengths is not None:
            rows = rows.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        return rows.to(self.adapters.device, non_blocking=True)

    def set(self, ids: Sequence[int]) -> None:
        """The adapter of each row; rows behind the last one have none."""
        self.batch.update(self._rows(ids, None))

    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None:
        """y += scale * B (A x) for the rows whose adapter has modules of this projection."""
        start = time.perf_counter()
        adapters = self.adapters.set
        t = adapters.tables[projection]
        pk.add_lora(
            y, x, t.a_ptr, t.b_ptr, t.ranks, t.scales, self.batch, layer, t.slice_offsets, max_rank=adapters.rank_bound
        )  # fmt: skip
        self.adapters.seconds += time.perf_counter() - start

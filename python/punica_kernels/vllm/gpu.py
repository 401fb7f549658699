"""The Punica wrapper of CUDA devices. Importing this imports vLLM, and Triton."""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from . import ops
from .wrapper import OurKernels


class PunicaKernelsWrapperGPU(OurKernels, PunicaWrapperGPU):  # type: ignore[misc]
    """vLLM's own metadata serves as it is: nothing is computed twice, and its own kernels find it too."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._max_rank = self.lora_config.max_lora_rank

    def _rows(self) -> ops.Batch:
        return self._batch_of(self.token_mapping_meta)

    def _prompt_rows(self) -> ops.Batch:
        return self._batch_of(self.prompt_mapping_meta)

    def _batch_of(self, meta: Any) -> ops.Batch:
        # With this option vLLM captures a graph for each of some numbers of adapters in use, and one says so at least.
        specialized = self.lora_config.specialize_active_lora
        return (
            meta.token_indices_sorted_by_lora_ids,
            meta.active_lora_ids,
            meta.lora_token_start_loc,
            None,
            meta.no_lora_flag_cpu,
            meta.num_active_loras_cpu if specialized else meta.default_num_active_loras_cpu,
        )

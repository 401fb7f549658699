"""Which row of a batch has which adapter: what `add_lora` needs to know, made on the device, once a step."""

import torch
from torch import Tensor, get_num_threads
from torch._C import _increment_version
from torch.compiler import is_dynamo_compiling

from ._dispatch import PLAIN, error, explain, is_intercepted
from ._library import Kernel

_update = Kernel("update_lora_batch")
_update_shortcut = _update.shortcut

# Bytes of indices that take the CPU about 100 us to sort.
_LONG = 16_000


class LoraBatch:
    """The rows of a batch sorted by adapter. `update` changes it in place, also in a captured graph.

    A thin holder of int32 tensors of fixed sizes, on the device of `indices`. `torch.ops.punica_kernels.add_lora` takes
    all but the first:

        indices          [capacity]       adapter of each row, -1: none; rows beyond those given have none
        order            [capacity]       row numbers sorted by adapter, rows without one first; -1 behind the given
        segment_adapter  [segments]       the adapter of each run of equal ones, ascending; -1 for rows without one, and
                                          where unused
        segment_start    [segments + 1]   where the run begins in `order`; 0 behind the end of the last one in use
        counts           [2]              runs in use, rows with an adapter

    `segments` is min(capacity, num_adapters + 1), as many as there can be. Segment s is the rows
    `order[segment_start[s] : segment_start[s + 1]]`.

    Args:
        indices: int32 or int64 [n], the adapter of each row; negative: none.
        num_adapters: how many there are; an index that is not below it counts as none. On the CPU, and on CUDA after
            `set_checks(True)`, it is an error.
        capacity: rows at most (default n). A later `update` may bring up to so many.
    """

    indices: Tensor | None
    order: Tensor
    segment_adapter: Tensor
    segment_start: Tensor
    counts: Tensor | None
    num_adapters: int

    def __init__(self, indices: Tensor, num_adapters: int, capacity: int | None = None):
        capacity = indices.numel() if capacity is None else capacity
        if not 0 <= num_adapters < 2**31:
            raise error("LoraBatch", f"num_adapters must be in [0, {2**31 - 1}], got {num_adapters}")
        if not 0 <= capacity < 2**31:
            raise error("LoraBatch", f"capacity must be in [0, {2**31 - 1}], got {capacity}")
        segments = min(capacity, num_adapters + 1)
        empty = indices.new_empty
        self.indices = empty(capacity, dtype=torch.int32)
        self.order = empty(capacity, dtype=torch.int32)
        self.segment_adapter = empty(segments, dtype=torch.int32)
        self.segment_start = empty(segments + 1, dtype=torch.int32)
        self.counts = empty(2, dtype=torch.int32)
        self.num_adapters = num_adapters
        self.update(indices)

    @classmethod
    def of(
        cls, order: Tensor, segment_adapter: Tensor, segment_start: Tensor, counts: Tensor | None = None
    ) -> "LoraBatch":
        """A batch of tensors that somebody else has filled; it cannot be updated."""
        batch = cls.__new__(cls)
        batch.indices, batch.num_adapters = None, 0
        batch.order, batch.segment_adapter, batch.segment_start = order, segment_adapter, segment_start
        batch.counts = counts
        return batch

    @classmethod
    def from_vllm(
        cls,
        token_lora_mapping: Tensor,
        token_indices_sorted_by_lora_ids: Tensor,
        num_tokens_per_lora: Tensor,
        lora_token_start_loc: Tensor,
        lora_ids: Tensor,
    ) -> "LoraBatch":
        """A view of the metadata that vLLM makes for its own LoRA kernels; nothing is copied, nothing is launched.

        The arguments in the order of vLLM's `LoRAKernelMeta.meta_args`: token_lora_mapping int32 [T],
        token_indices_sorted_by_lora_ids int32 [T], num_tokens_per_lora int32 [n], lora_token_start_loc int32 [n + 1],
        lora_ids int32 [n] (active_lora_ids), n = max_loras + 1. When vLLM fills them anew, the batch has changed too.
        lora_ids are slots: rows of the address tables are slots then. num_tokens_per_lora says what the differences of
        lora_token_start_loc say, and is not read. token_lora_mapping is not either: where no token has an adapter vLLM
        leaves it as it was, and clears only the others.
        """
        del num_tokens_per_lora
        batch = cls.of(token_indices_sorted_by_lora_ids, lora_ids, lora_token_start_loc)
        batch.indices = token_lora_mapping
        return batch

    @property
    def capacity(self) -> int:
        return len(self.order)

    def update(self, indices: Tensor) -> None:
        """New rows, in place and in stream order: one kernel on CUDA, which can be captured.

        Args:
            indices: int32 or int64 [n], n <= capacity. The rows behind have no adapter.

        Raises:
            RuntimeError: an argument breaks this contract; the batch is as it was. On the CPU, and on CUDA after
                `set_checks(True)`, an index that is not below `num_adapters` is an error too.
        """
        if self.indices is None or self.counts is None:
            raise error("LoraBatch.update", "the tensors of this batch belong to somebody else; fill them there")
        _update_lora_batch(
            indices,
            self.num_adapters,
            self.indices,
            self.order,
            self.segment_adapter,
            self.segment_start,
            self.counts,
        )


def _update_lora_batch(
    indices: Tensor,
    num_adapters: int,
    batch_indices: Tensor,
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor,
) -> None:
    if not is_dynamo_compiling() and _update_shortcut(
        indices, num_adapters, batch_indices, order, segment_adapter, segment_start, counts, _LONG
    ):
        return
    tensors = (indices, batch_indices, order, segment_adapter, segment_start, counts)
    if not is_intercepted() and all(type(tensor) in PLAIN for tensor in tensors):
        _run_update(indices, num_adapters, *tensors[1:])
    else:
        torch.ops.punica_kernels.update_lora_batch(indices, num_adapters, *tensors[1:])


# What the dispatcher's kernels for CPU and CUDA are too.
def _run_update(
    indices: Tensor,
    num_adapters: int,
    batch_indices: Tensor,
    order: Tensor,
    segment_adapter: Tensor,
    segment_start: Tensor,
    counts: Tensor,
) -> None:
    written = (batch_indices, order, segment_adapter, segment_start, counts)
    try:
        kernel = _update.released if indices.is_cpu and indices.nbytes > _LONG else _update.held
        kernel(indices, num_adapters, *written, get_num_threads())
    except (RuntimeError, AttributeError) as cause:
        explain("update_lora_batch", (indices, *written), cause)
    _increment_version(written)

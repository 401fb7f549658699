"""Decoding under a CUDA graph: one replay a step in the place of hundreds of launches.

A graph is captured for a batch of 1, 2, 4, ... rows, at the first step that needs it, and serves every smaller batch:
rows too many are sequences without pages and without an adapter, which the kernels skip. What changes from step to step
(tokens, positions, page tables, the adapter of each row) lies in tensors that stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import punica_kernels as pk

from .adapters import Adapters, DecodeLora
from .kv_cache import PageTable
from .model import Batch, Llama


@dataclass(frozen=True)
class Captured:
    batch: Batch
    lora: DecodeLora
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps of one model, its adapters and a page pool of `num_pages`."""

    def __init__(self, model: Llama, adapters: Adapters, num_pages: int, page_size: int):
        self.model, self.adapters = model, adapters
        self.num_pages, self.page_size = num_pages, page_size
        self.captured: dict[int, Captured] = {}
        self.num_adapters = len(adapters.names)
        with torch.cuda.device(model.device):
            # One of this device: torch's own stream for captures belongs to the device of the first capture.
            self.stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
            # Replays follow one another, so all graphs may use the same memory.
            self.pool = torch.cuda.graph_pool_handle()

    def forward(self, batch: Batch, adapter_ids: Sequence[int]) -> Tensor:
        """What `model.forward(batch)` returns, for a batch of one token a sequence. The next call overwrites it."""
        if self.num_adapters != len(self.adapters.names):  # the tables that the graphs hold are those of before
            self.captured.clear()
            self.num_adapters = len(self.adapters.names)
        rows = len(batch.tokens)
        size = 1 << (rows - 1).bit_length()
        with torch.cuda.device(self.model.device):
            if size not in self.captured:
                self.captured[size] = self._capture(size)
            step = self.captured[size]
            # After the last row, each sequence begins where the one before it ends: it has no pages.
            step.batch.tokens[:rows].copy_(batch.tokens)
            step.batch.positions[:rows].copy_(batch.positions)
            pages = step.batch.pages
            pages.kv_ptrs[: len(batch.pages.kv_ptrs)].copy_(batch.pages.kv_ptrs)
            pages.kv_indptr[: rows + 1].copy_(batch.pages.kv_indptr)
            pages.kv_indptr[rows + 1 :] = len(batch.pages.kv_ptrs)
            pages.last_page_offset[:rows].copy_(batch.pages.last_page_offset)
            step.lora.set(adapter_ids)
            step.graph.replay()
            return step.logits[:rows]

    def _capture(self, size: int) -> Captured:
        device = self.model.device

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        pages = PageTable(
            zeros(self.num_pages, torch.int64), zeros(size + 1, torch.int32), zeros(size, torch.int32), self.page_size
        )
        lora = DecodeLora(self.adapters, [], capacity=size)
        batch = Batch(zeros(size, torch.int64), zeros(size, torch.int64), pages, lora)
        # Within a replay, the keys and values of the newest tokens are all that is written of what early reads cover;
        # tables are written before a replay, in stream order, and adapters never.
        with pk.early_reads():
            self.stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.stream):
                self.model.forward(batch)  # libraries initialise themselves in the first call
            torch.cuda.current_stream(device).wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                logits = self.model.forward(batch)
        return Captured(batch, lora, graph, logits)

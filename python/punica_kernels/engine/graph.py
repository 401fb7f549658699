"""Decoding under a CUDA graph: one replay a step in the place of hundreds of launches.

A graph is captured for a batch of 1, 2, 4, ... rows, at the first step that needs it, and serves every smaller batch:
rows too many are sequences without pages and without an adapter, which the kernels skip. What changes from step to step
(tokens, positions, page tables, the adapter of each row) lies in tensors that stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import punica_kernels as pk

from .adapters import Adapters, Lora
from .kv_cache import PageTable
from .model import Batch, Llama


class StepTables:
    """The tensors of a decode step of up to `size` rows, in one block of memory: one copy brings a step's over."""

    def __init__(self, size: int, num_pages: int, page_size: int, device: torch.device):
        self.size, self.num_pages, self.page_size = size, num_pages, page_size
        self.memory = torch.zeros(self._words(num_pages), dtype=torch.int64, device=device)
        self.tokens, self.positions, self.pages = self._views(self.memory)

    def _words(self, num_pages: int) -> int:
        return 3 * self.size + 1 + num_pages

    def _views(self, memory: Tensor) -> tuple[Tensor, Tensor, PageTable]:
        # The addresses come last: a step copies only as many as it has.
        size = self.size
        tokens, positions = memory[:size], memory[size : 2 * size]
        narrow = memory[2 * size : 3 * size + 1].view(torch.int32)
        table = PageTable(memory[3 * size + 1 :], narrow[: size + 1], narrow[size + 1 : 2 * size + 1], self.page_size)
        return tokens, positions, table

    def set(self, batch: Batch) -> None:
        """To a batch in host memory. Rows behind its last one are sequences without pages."""
        rows, num_pages = len(batch.tokens), len(batch.pages.kv_ptrs)
        # torch's allocator of pinned memory hands it out again only when the copy is done.
        memory = torch.zeros(self._words(num_pages), dtype=torch.int64, pin_memory=self.memory.is_cuda)
        tokens, positions, pages = self._views(memory)
        tokens[:rows], positions[:rows] = batch.tokens, batch.positions
        pages.kv_ptrs.copy_(batch.pages.kv_ptrs)
        pages.kv_indptr[: rows + 1] = batch.pages.kv_indptr
        # Each of the others begins where the one before it ends.
        pages.kv_indptr[rows + 1 :] = num_pages
        pages.last_page_offset[:rows] = batch.pages.last_page_offset
        self.memory[: len(memory)].copy_(memory, non_blocking=True)


@dataclass(frozen=True)
class Captured:
    tables: StepTables
    lora: Lora
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Captured decode steps of one model, its adapters and a page pool of `num_pages`."""

    def __init__(self, model: Llama, adapters: Adapters, num_pages: int, page_size: int):
        self.model, self.adapters = model, adapters
        self.num_pages, self.page_size = num_pages, page_size
        self.captured: dict[int, Captured] = {}
        self.rank_bound = adapters.set.rank_bound
        with torch.cuda.device(model.device):
            # One of this device: torch's own stream for captures belongs to the device of the first capture.
            self.stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
            # Replays follow one another, so all graphs may use the same memory.
            self.pool = torch.cuda.graph_pool_handle()

    def forward(self, batch: Batch, adapter_ids: Sequence[int]) -> Tensor:
        """What `model.forward(batch)` returns, for a batch of one token a sequence, in host memory.

        The next call overwrites it.
        """
        if self.rank_bound != self.adapters.set.rank_bound:  # the graphs have the one of before
            self.captured.clear()
            self.rank_bound = self.adapters.set.rank_bound
        rows = len(batch.tokens)
        size = 1 << (rows - 1).bit_length()
        with torch.cuda.device(self.model.device):
            if size not in self.captured:
                self.captured[size] = self._capture(size)
            step = self.captured[size]
            step.tables.set(batch)
            step.lora.set(adapter_ids)
            step.graph.replay()
            return step.logits[:rows]

    def _capture(self, size: int) -> Captured:
        device = self.model.device
        tables = StepTables(size, self.num_pages, self.page_size, device)
        lora = Lora(self.adapters, [], capacity=size)
        batch = Batch(tables.tokens, tables.positions, tables.pages, lora)
        graph, logits = capture(self.model, batch, self.stream, self.pool)
        return Captured(tables, lora, graph, logits)


def capture(model: Llama, batch: Batch, stream: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `model.forward(batch)`, and the logits that its replays write."""
    # Within a replay, the keys and values of the newest tokens are all that is written of what early reads cover;
    # tables, those of adapters that come and go too, are written before a replay, in stream order.
    with pk.early_reads():
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            model.forward(batch)  # libraries initialise themselves in the first call
        torch.cuda.current_stream(model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = model.forward(batch)
    return graph, logits

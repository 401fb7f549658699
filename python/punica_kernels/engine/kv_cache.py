"""The paged KV cache: a pool of pages, and the tables that tell a kernel which pages a batch reads and writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import ModelConfig
from .errors import EngineError


@dataclass(frozen=True)
class PageTable:
    """Pages of a batch of B sequences, as the attention and kv_cache kernels take them."""

    kv_ptrs: Tensor  # int64 [pages]: addresses
    kv_indptr: Tensor  # int32 [B + 1]: sequence i owns kv_ptrs[kv_indptr[i] : kv_indptr[i + 1]]
    last_page_offset: Tensor  # int32 [B]: tokens in the last page, 1..page_size
    page_size: int


class KvCache:
    """A pool of pages, each one block [L, 2, N, P, D]: all layers of a token's page share one address."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        self.page_size, self.num_pages, self.device = page_size, num_pages, device
        size = page_bytes(config, page_size, dtype)
        stride = -(-size // 16) * 16  # the kernels ask for pages aligned to 16 bytes
        try:
            self.pool = torch.empty(num_pages, stride // dtype.itemsize, dtype=dtype, device=device)
        except RuntimeError as error:
            raise EngineError(f"no memory for {num_pages} pages of {size} bytes") from error
        self.addresses = [self.pool.data_ptr() + i * stride for i in range(num_pages)]
        self.free = list(range(num_pages))[::-1]  # a stack: a page that was just freed is warm in the cache

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> list[int] | None:
        """Pages for `tokens` tokens, or None while the pool has too few."""
        count = self.pages_for(tokens)
        if count > len(self.free):
            return None
        return [self.free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        self.free.extend(reversed(pages))

    def table(self, sequences: list[tuple[list[int], int]], device: torch.device | None = None) -> PageTable:
        """The table of (pages, kv_len) pairs, on `device` (default: the cache's).

        A sequence may hold more pages than kv_len needs: the rest stay out.
        """
        device = self.device if device is None else device
        kv_ptrs: list[int] = []
        kv_indptr = [0]
        last_page_offset = []
        for pages, kv_len in sequences:
            kv_ptrs += [self.addresses[page] for page in pages[: self.pages_for(kv_len)]]
            kv_indptr.append(len(kv_ptrs))
            last_page_offset.append((kv_len - 1) % self.page_size + 1)
        return PageTable(
            torch.tensor(kv_ptrs, dtype=torch.int64, device=device),
            torch.tensor(kv_indptr, dtype=torch.int32, device=device),
            torch.tensor(last_page_offset, dtype=torch.int32, device=device),
            self.page_size,
        )


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    return config.num_layers * 2 * config.num_kv_heads * page_size * config.head_dim * dtype.itemsize

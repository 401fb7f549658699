"""A small serving engine over punica_kernels: one Llama-family model, many LoRA adapters, one continuous batch.

checkpoint.py   a Hugging Face folder or a GGUF file, taken exactly or refused
adapters.py     the adapters, and the LoRA of a mixed batch       AdapterSet, LoraBatch, add_lora
kv_cache.py     the pool of pages and the page tables
graph.py        decoding under CUDA graphs
model.py        the forward pass              rms_norm, init_kv, batch_prefill, append_kv, batch_decode
sampling.py     logits to tokens, tokens to text
scheduler.py    who is in the batch
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .adapters import MAX_ADAPTERS, Adapters
from .checkpoint import Weights, open_checkpoint
from .errors import EngineError
from .kv_cache import KvCache, page_bytes
from .model import Llama
from .sampling import SamplingParams
from .scheduler import Engine, Request

__all__ = ["Engine", "EngineError", "Request", "SamplingParams", "load_engine"]


def load_engine(
    model: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    page_size: int = 16,
    num_pages: int | None = None,
    kv_memory: int = 512 << 20,
    max_batch: int = 64,
    max_adapters: int = MAX_ADAPTERS,
    cuda_graphs: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> Engine:
    """An engine for a checkpoint and its adapters (name -> PEFT folder).

    Up to `max_adapters` adapters, or as many as are given, can be loaded at once: more may come and go later.
    The KV pool has `num_pages` pages of `page_size` tokens; without it, as many as fit into `kv_memory` bytes.
    On CUDA, decoding runs under CUDA graphs unless `cuda_graphs` is off.
    `progress` is told in a few words what is being loaded.
    Raises EngineError for a checkpoint or an adapter that is missing, broken or not supported.
    """
    device = torch.device(device)
    progress("checkpoint (a GGUF file is converted once and then kept)")
    checkpoint = open_checkpoint(model, dtype)
    adapters = adapters or {}
    # Before the weights: mistakes in small files show at once.
    pool = Adapters(checkpoint.config, dtype, device, max(max_adapters, len(adapters)))
    for name, path in adapters.items():
        progress(f"adapter {name}")
        pool.load(name, Path(path).expanduser())
    if page_size < 1:
        raise EngineError(f"page_size must be >= 1, got {page_size}")
    if num_pages is None:
        num_pages = kv_memory // page_bytes(checkpoint.config, page_size, dtype)
    if num_pages < 1:
        raise EngineError("the KV pool has no page: give it more memory or more pages")
    cache = KvCache(checkpoint.config, num_pages, page_size, dtype, device)
    llama = Llama(checkpoint.config, Weights(checkpoint.folder), dtype, device, progress)
    return Engine(
        llama,
        pool,
        cache,
        checkpoint.tokenizer,
        checkpoint.stop_tokens,
        max_batch=max_batch,
        cuda_graphs=cuda_graphs,
    )

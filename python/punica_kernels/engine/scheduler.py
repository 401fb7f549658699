"""Continuous batching: requests of any adapter join the batch when the page pool has room, and leave when done."""

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapters, Lora
from .errors import EngineError
from .graph import DecodeGraphs
from .kv_cache import KvCache
from .model import Batch, Llama
from .sampling import Sampler, SamplingParams, TextStream


@dataclass
class Request:
    """One prompt and what becomes of it."""

    index: int
    adapter: str | None
    adapter_id: int
    prompt_tokens: list[int]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    tokens: list[int] = field(default_factory=list)  # generated; a stop token is included, its text is not
    finish_reason: str | None = None  # "stop" or "length"
    pages: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.stream.text


@dataclass
class Statistics:
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    lora_seconds: float = 0.0
    peak_pages: int = 0
    peak_batch: int = 0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


class Engine:
    """Serves requests over one model. Call add() at any time and step() while there is work; run() does both ends.

    A request is admitted when the pool has the pages for its prompt and all tokens that it may still generate. It then
    never has to stop half way, so waiting requests cannot block each other; what it does not use returns at the end.
    """

    def __init__(
        self,
        model: Llama,
        adapters: Adapters,
        cache: KvCache,
        tokenizer: Any,
        stop_tokens: frozenset[int],
        *,
        max_batch: int = 64,
        max_prefill_tokens: int = 4096,
        cuda_graphs: bool = True,
    ):
        self.model, self.adapters, self.cache, self.tokenizer = model, adapters, cache, tokenizer
        self.stop_tokens, self.max_batch, self.max_prefill_tokens = stop_tokens, max_batch, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: list[Request] = []
        self.statistics = Statistics()
        self._decode_lora: Lora | None = None
        self.graphs: DecodeGraphs | None = None
        if cuda_graphs and model.device.type == "cuda":
            self.graphs = DecodeGraphs(model, adapters, cache.num_pages, cache.page_size)

    def add(
        self, prompt_tokens: list[int], adapter: str | None = None, params: SamplingParams | None = None
    ) -> Request:
        """Queue a request; EngineError if it could never be served. max_tokens is cut at the end of the context."""
        params = params or SamplingParams()
        index, context = self.statistics.requests, self.model.config.max_positions
        if not prompt_tokens:
            raise EngineError(f"request {index}: the prompt is empty")
        if len(prompt_tokens) >= context:
            raise EngineError(
                f"request {index}: the prompt has {len(prompt_tokens)} tokens, the context holds {context}"
            )
        adapter_id = self.adapters.id(adapter)
        request = Request(
            index, adapter, adapter_id, prompt_tokens, params, Sampler(params), TextStream(self.tokenizer, params.stop)
        )
        if (need := self.cache.pages_for(self._most_tokens(request))) > self.cache.num_pages:
            raise EngineError(f"request {index}: needs {need} pages, the pool has {self.cache.num_pages}")
        self.statistics.requests += 1
        self.requests.append(request)
        self.waiting.append(request)
        return request

    def add_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads a PEFT folder; requests that are added from now on may name it. EngineError if it cannot be served."""
        self.adapters.load(name, Path(path).expanduser())

    def remove_adapter(self, name: str) -> None:
        """EngineError if there is no such adapter, or if a request that is not done yet uses it."""
        self.adapters.id(name)
        if users := sum(request.adapter == name for request in (*self.waiting, *self.running)):
            raise EngineError(f"adapter {name} is in use by {users} request{'s' if users > 1 else ''}")
        self.adapters.remove(name)

    def _most_tokens(self, request: Request) -> int:
        """Positions that the request can fill at most: the last token is only given out, never read back."""
        generated = min(request.params.max_tokens, self.model.config.max_positions - len(request.prompt_tokens))
        return len(request.prompt_tokens) + generated - 1

    def run(self) -> Iterator[tuple[Request, str]]:
        """Serve everything that is queued; yields (request, new text), an empty text too when a request has ended."""
        while self.waiting or self.running:
            yield from self.step()

    def clear(self) -> None:
        """Forgets all requests. Those that are not done are dropped, as after a step that has failed."""
        for request in self.requests:
            self.cache.release(request.pages)
            request.pages = []
        self.requests, self.running, self._decode_lora = [], [], None
        self.waiting.clear()

    def step(self) -> list[tuple[Request, str]]:
        """One forward pass: the prompts that can join now, if any, else one token of every running request."""
        start, lora_start = time.perf_counter(), self.adapters.seconds
        joining = self._admit()
        requests = joining or self.running
        logits = self.model.forward(self._prefill_batch(joining)) if joining else self._decode()
        outputs = self._advance(requests, logits)
        elapsed = time.perf_counter() - start
        self.statistics.lora_seconds += self.adapters.seconds - lora_start
        if joining:
            self.statistics.prefill_seconds += elapsed
            self.statistics.prompt_tokens += sum(len(request.prompt_tokens) for request in joining)
        else:
            self.statistics.decode_seconds += elapsed
            self.statistics.decode_steps += 1
        self.statistics.generated_tokens += len(requests)
        self._retire(joining)
        return outputs

    def _admit(self) -> list[Request]:
        """First come, first served: a large request at the head waits for pages, and nobody overtakes it."""
        joining: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) + len(joining) < self.max_batch:
            request = self.waiting[0]
            tokens += len(request.prompt_tokens)
            if joining and tokens > self.max_prefill_tokens:
                break
            pages = self.cache.allocate(self._most_tokens(request))
            if pages is None:
                break
            request.pages = pages
            joining.append(self.waiting.popleft())
        self.statistics.peak_pages = max(self.statistics.peak_pages, self.cache.num_pages - len(self.cache.free))
        self.statistics.peak_batch = max(self.statistics.peak_batch, len(self.running) + len(joining))
        return joining

    def _prefill_batch(self, requests: list[Request]) -> Batch:
        device = self.model.device
        lengths = [len(request.prompt_tokens) for request in requests]
        positions = [torch.arange(length) for length in lengths]
        indptr = torch.tensor([0, *lengths]).cumsum(0)
        return Batch(
            tokens=torch.tensor([token for request in requests for token in request.prompt_tokens], device=device),
            positions=torch.cat(positions).to(device),
            pages=self.cache.table([(r.pages, length) for r, length in zip(requests, lengths, strict=True)]),
            lora=Lora(self.adapters, [request.adapter_id for request in requests], lengths),
            qo_indptr=indptr.to(device, torch.int32),
        )

    def _decode(self) -> Tensor:
        ids = [request.adapter_id for request in self.running]
        if self._decode_lora is None:  # only when somebody has joined or left
            # A graph has its own.
            self._decode_lora = Lora(self.adapters, ids if self.graphs is None else [])
        if self.graphs is None:
            return self.model.forward(self._decode_batch(self._decode_lora, self.model.device))
        return self.graphs.forward(self._decode_batch(self._decode_lora, torch.device("cpu")), ids)

    def _decode_batch(self, lora: Lora, device: torch.device) -> Batch:
        # The newest token has no keys yet: it takes the next position.
        lengths = [len(request.prompt_tokens) + len(request.tokens) for request in self.running]
        sequences = [(request.pages, length) for request, length in zip(self.running, lengths, strict=True)]
        return Batch(
            tokens=torch.tensor([request.tokens[-1] for request in self.running], device=device),
            positions=torch.tensor([length - 1 for length in lengths], device=device),
            pages=self.cache.table(sequences, device),
            lora=lora,
        )

    def _advance(self, requests: list[Request], logits: Tensor) -> list[tuple[Request, str]]:
        outputs = []
        for request, token in zip(requests, self.choose(requests, logits), strict=True):
            request.tokens.append(token)
            text = "" if token in self.stop_tokens else request.stream.push(token)
            if token in self.stop_tokens or request.stream.stopped:
                request.finish_reason = "stop"
            elif len(request.prompt_tokens) + len(request.tokens) > self._most_tokens(request):
                request.finish_reason = "length"
            if request.finish_reason:
                text += request.stream.finish()
            if text or request.finish_reason:
                outputs.append((request, text))
        return sorted(outputs, key=lambda output: output[0].index)

    def choose(self, requests: list[Request], logits: Tensor) -> list[int]:
        """The next token of each request, from logits [B, vocab]."""
        best = logits.argmax(dim=1).tolist()
        return [
            token if request.params.temperature == 0 else request.sampler(row)
            for request, token, row in zip(requests, best, logits, strict=True)
        ]

    def _retire(self, joined: list[Request]) -> None:
        members = self.running + joined
        self.running = [request for request in members if not request.finish_reason]
        for request in members:
            if request.finish_reason:
                self.cache.release(request.pages)
                request.pages = []
        if joined or len(self.running) < len(members):
            self._decode_lora = None

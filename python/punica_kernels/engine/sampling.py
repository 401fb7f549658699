"""From logits to a token, and from tokens to text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import EngineError


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off. `stop` strings end the text and are not part of it."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "finite and >= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
            ("stop", all(self.stop), "without empty strings"),
        ):
            if not valid:
                raise EngineError(f"{name} must be {range_}, got {getattr(self, name)!r}")


class Sampler:
    """Draws the tokens of one request. It owns its generator: what others draw does not change its text."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self.generator = torch.Generator().manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, from logits [vocab] in float32 on any device."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        scaled = logits.cpu() / self.params.temperature
        if 0 < self.params.top_k < len(scaled):
            scaled[scaled < scaled.topk(self.params.top_k).values[-1]] = -torch.inf
        probabilities = scaled.softmax(dim=0)
        if self.params.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # The smallest set whose mass reaches top_p: a token stays if the mass before it is still below.
            outside = ordered.cumsum(0) - ordered >= self.params.top_p
            probabilities[order[outside]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


class TextStream:
    """Turns the tokens of one request into text, piece by piece.

    A piece is held back while it may still change: half a UTF-8 character, or the start of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""  # final, given out
        self.held = ""  # decoded, but perhaps the start of a stop string
        self.tokens: list[int] = []
        self.start = self.read = 0  # tokens[start:read] are decoded; they are the context of the next piece
        self.stopped = False

    def push(self, token: int) -> str:
        self.tokens.append(token)
        before = self._decode(self.tokens[self.start : self.read])
        after = self._decode(self.tokens[self.start :])
        if after.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return self._release(after[len(before) :], final=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self.tokens[self.start : self.read])
        return self._release(self._decode(self.tokens[self.start :])[len(before) :], final=True)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, piece: str, final: bool) -> str:
        text = self.held + piece
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped = True
            text, self.held = text[: min(places)], ""
        else:
            keep = 0 if final else max((_overlap(text, stop) for stop in self.stop), default=0)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

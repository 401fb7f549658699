"""What `add_lora` reads for a layer of vLLM: addresses of its slots, and how many of their ranks are in use.

vLLM keeps the adapters of a layer in stacked tensors, for each slice A [slots, 1, max_rank, h_in] and B [slots, 1,
h_out, max_rank], zero beyond an adapter's own rank. A slot is then a padded adapter, of which only the rank must be
known. No argument says it, and tensor parallelism and packed layers change it on the way; so it is read from the
weights: rows of A (columns of B) up to the last one that is not zero, on the device, which nobody waits for, whenever
vLLM has filled a slot.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Tables:
    """The tables of one call. The tensors stay the same ones and are changed in place: captured graphs may keep them.

    One of `a` and `b` may be missing. Then its place is taken by ones and zeros that copy: without `b` the call writes
    A x into y, `rank` columns a slice; without `a` it takes such an x.
    """

    def __init__(self, a: Sequence[Tensor] | None, b: Sequence[Tensor] | None):
        weights = b if a is None else a
        if weights is None:
            raise ValueError("no weights")
        _check(a, b)
        like = weights[0]
        self.slices, slots = len(weights), like.shape[0]
        self.rank = like.shape[-1] if a is None else like.shape[-2]
        self.h_in = None if a is None else a[0].shape[-1]
        self.b_row_stride = self.rank if b is None else b[0].shape[-1]
        self._widest = [self.rank] * self.slices if b is None else [w.shape[-2] for w in b]
        self._offsets: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.ranks = torch.zeros(self.slices, slots, dtype=torch.int32, device=like.device)
        self.scales = torch.ones(slots, dtype=torch.float32, device=like.device)
        size = self.rank * (self.slices if a is None else 1)
        self._ones = torch.eye(size, dtype=like.dtype, device=like.device)
        rows = range(0, size, self.rank) if a is None else [0] * self.slices
        copying = [[self._ones[row].data_ptr()] * slots for row in rows]
        self.a_ptr = torch.tensor(copying if a is None else _addresses(a), device=like.device)
        self.b_ptr = torch.tensor(copying if b is None else _addresses(b), device=like.device)
        self._weights, self._rank_dim = weights, 2 if a is None else 1
        self._counting = torch.arange(1, self.rank + 1, dtype=torch.int32, device=like.device)
        self.read_ranks()

    def offsets(self, widths: Sequence[int], start: int) -> tuple[int, ...]:
        """The slice_offsets of slices so wide, from column `start` on."""
        key = (start, *widths)
        offsets = self._offsets.get(key)
        if offsets is None:
            if len(widths) != self.slices or any(w > most for w, most in zip(widths, self._widest, strict=True)):
                raise RuntimeError(
                    f"punica_kernels.vllm: widths must be at most B's, {self._widest}, got {list(widths)}"
                )
            offsets = self._offsets[key] = tuple(accumulate(widths, initial=start))
        return offsets

    def read_ranks(self, slot: int | None = None) -> None:
        """Sets the ranks of one slot, or of all, to what its weights say."""
        slots = slice(None) if slot is None else slice(slot, slot + 1)
        for s, stacked in enumerate(self._weights):
            weights = stacked[slots].flatten(0, -3)  # [slots, rows, columns]
            used = (weights != 0).any(3 - self._rank_dim)
            self.ranks[s, slots] = (used * self._counting).amax(1)


def _check(a: Sequence[Tensor] | None, b: Sequence[Tensor] | None) -> None:
    """Addresses say nothing of sizes, so these must be right."""
    every = [*(a or ()), *(b or ())]
    ranks = {t.shape[-2] for t in a or ()} | {t.shape[-1] for t in b or ()}
    ok = (
        (a is None or b is None or len(a) == len(b))
        and len({(t.shape[0], t.dtype, t.device) for t in every}) == 1
        and all(t.dim() in (3, 4) and t.is_contiguous() and t.shape[1:-2].numel() == 1 for t in every)
        and len(ranks) == 1
        and len({t.shape[-1] for t in a or ()}) <= 1
    )
    if not ok:
        shapes = [[tuple(t.shape) for t in stacked or ()] for stacked in (a, b)]
        raise RuntimeError(
            "punica_kernels.vllm: A must be [slots, 1, rank, h_in] and B [slots, 1, h_out, rank] for each slice, "
            f"contiguous, of one type and device; got A {shapes[0]} and B {shapes[1]}"
        )


def _addresses(stacked: Sequence[Tensor]) -> list[list[int]]:
    return [[t.data_ptr() + i * t.stride(0) * t.itemsize for i in range(t.shape[0])] for t in stacked]


class Layer:
    """The stacked weights of one layer, and the tables of the calls that it has made."""

    def __init__(self, a: Sequence[Tensor] | None, b: Sequence[Tensor] | None):
        self.a, self.b = a, b
        self._tables: dict[tuple[bool, bool], Tables] = {}

    def tables(self, with_a: bool, with_b: bool) -> Tables:
        found = self._tables.get((with_a, with_b))
        if found is None:
            # vLLM's first call comes in inference mode, and not all that change a slot do.
            with torch.inference_mode(False):
                found = Tables(self.a if with_a else None, self.b if with_b else None)
            self._tables[with_a, with_b] = found
        return found

    def read_ranks(self, slot: int) -> None:
        for tables in self._tables.values():
            tables.read_ranks(slot)

    def _addresses(self) -> list[int]:
        return [stacked[0].data_ptr() for stacked in (self.a, self.b) if stacked is not None]


# By the address of their first A, and of their first B: all that is left of a layer in compiled code. Layers here keep
# their weights alive, so that an address cannot have two meanings.
_layers: dict[int, Layer] = {}


def add(layer: Layer) -> None:
    for address in layer._addresses():
        _layers[address] = layer


def remove(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for address in layer._addresses():
            if _layers.get(address) is layer:
                del _layers[address]


def of(a: Sequence[Tensor] | None, b: Sequence[Tensor] | None) -> Tables:
    """The tables of a call with these weights; made when it first comes, which must not be in a capture."""
    weights = b if a is None else a
    if weights is None:
        raise ValueError("no weights")
    layer = _layers.get(weights[0].data_ptr())
    if layer is None or (a is not None and layer.a is None) or (b is not None and layer.b is None):
        layer = Layer(a, b)
        add(layer)
    return layer.tables(a is not None, b is not None)

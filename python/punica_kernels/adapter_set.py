"""LoRA adapters on a device, as the tables that `add_lora` reads; adapters come and go while the model runs."""

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._peft import AdapterError as AdapterError
from ._peft import LoraWeights as LoraWeights
from ._peft import read_adapter
from .lora import MAX_RANK

_ALIGNMENT = 256  # bytes: of every matrix, more than any kernel's fast path asks for


@dataclass(frozen=True)
class AdapterTables:
    """What `add_lora` takes for one projection. The tensors stay the same ones for as long as their set exists."""

    a_ptr: Tensor  # int64 [slices, capacity]
    b_ptr: Tensor
    ranks: Tensor  # int32 [slices, capacity]
    scales: Tensor  # float32 [slices, capacity]
    slice_offsets: tuple[int, ...]


class AdapterSet:
    """Adapters by name, up to `capacity` of them, each in a slot: `index(name)` is what a LoraBatch wants.

    `tables[projection]` has the arguments of `add_lora` for that projection. Their contents are changed in place, in
    stream order, so that captured CUDA graphs go on working while adapters come and go:

        batch = LoraBatch(indices, adapters.capacity)
        t = adapters.tables["qkv_proj"]
        add_lora(y, x, t.a_ptr, t.b_ptr, t.ranks, t.scales, batch, layer, t.slice_offsets, max_rank=adapters.rank_bound)

    An adapter has its own rank for each module, and takes memory for no more. Of PEFT it understands alpha, rsLoRA,
    rank and alpha patterns, and any choice of modules and layers; what else would change the result it refuses by
    name. Weights of another type are rounded to `dtype`; those of the same keep their bits. (Layers whose ranks differ
    share blocks of the largest; layers whose scales differ have theirs multiplied into B, which is rounded again.)

    Args:
        base_shapes: the projections, each one call of `add_lora`, and in each the modules that share its input, one
            after another in the columns of y: {"qkv_proj": {"self_attn.q_proj": (h_out, h_in), ...}, ...}. Modules are
            named by their path inside a layer.
        device: where the tables and the weights are.
        dtype: T of the calls.
        num_layers: layers of the model.
        capacity: adapters at most. 24 bytes of table for each of them and each module.
        max_rank: an adapter of a larger rank is refused. It bounds the memory that CUDA kernels take on the chip: the
            tighter, the faster they are. `rank_bound` is a bound that grows with the adapters, in powers of two: graphs
            that were captured with it as `max_rank` must be captured anew when it has grown.
        layers: path of the list of layers, as in the names of the adapter's tensors.

    One thread at a time may call `add` and `remove`.
    """

    def __init__(
        self,
        base_shapes: Mapping[str, Mapping[str, tuple[int, int]]],
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        num_layers: int,
        capacity: int = 64,
        max_rank: int = MAX_RANK,
        layers: str = "model.layers",
    ):
        self.device, self.dtype = torch.device(device), dtype
        if self.device == torch.device("cuda"):  # of which no index is said
            self.device = torch.device("cuda", torch.cuda.current_device())
        if capacity < 1:
            raise AdapterError(f"capacity must be at least 1, got {capacity}")
        if max_rank < 1:
            raise AdapterError(f"max_rank must be at least 1, got {max_rank}")
        if self.device.type == "cuda" and max_rank > MAX_RANK:
            raise AdapterError(f"max_rank must be at most {MAX_RANK} on CUDA, got {max_rank}")
        self.num_layers, self.capacity, self.max_rank, self.layers = num_layers, capacity, max_rank, layers
        self.base_shapes = {projection: dict(modules) for projection, modules in base_shapes.items()}
        self.module_shapes: dict[str, tuple[int, int]] = {}
        for modules in self.base_shapes.values():
            self.module_shapes |= modules
        if len(self.module_shapes) < sum(len(modules) for modules in self.base_shapes.values()):
            raise AdapterError("base_shapes: a module belongs to one projection, one comes twice")
        # All tables in one block of memory: one copy brings them over, and no kernel can see half of an adapter.
        host = torch.zeros(self._words(), dtype=torch.int64)
        self._host = self._views(host)
        self._host_memory = host
        self._memory = host if self.device.type == "cpu" else host.to(self.device)
        self.tables = self._views(self._memory)
        self.rank_bound = min(8, max_rank)
        self._slots: dict[str, int] = {}
        self._weights: dict[str, Tensor] = {}
        # The slot that has been free for longest comes next: a stale index meets another adapter as late as possible.
        self._free = deque(range(capacity))
        # Memory that work on some stream may still use, and the events behind that work.
        self._retired: deque[tuple[list[torch.cuda.Event], list[Tensor]]] = deque()

    # ------------------------------------------------------------------------------------------------------ who is in

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def index(self, name: str | None) -> int:
        """The slot of an adapter, for `indices` of a LoraBatch; -1 for None."""
        if name is None:
            return -1
        if name not in self._slots:
            raise AdapterError(f"no adapter named {name!r} ({', '.join(self._slots) or 'none'} loaded)")
        return self._slots[name]

    # ------------------------------------------------------------------------------------------------- coming and going

    def add(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        stream: "torch.cuda.Stream | Sequence[torch.cuda.Stream] | None" = None,
    ) -> int:
        """Loads a PEFT folder into a free slot, whose number it returns.

        The host does not wait for the device: upload and table change are queued on `stream`, the stream (or all
        streams) that the model runs on, default the current one. Work that is queued there later sees the adapter.

        Raises:
            AdapterError: the folder is broken, was made for another model or needs what LoRA tables cannot represent,
                the name is taken, or the set is full. The set is as it was.
        """
        self._check_room(name)
        weights = read_adapter(name, Path(path), self.module_shapes, self.num_layers, self.layers)
        return self.add_weights(name, weights, stream=stream)

    def add_weights(
        self,
        name: str,
        weights: Mapping[str, LoraWeights],
        *,
        stream: "torch.cuda.Stream | Sequence[torch.cuda.Stream] | None" = None,
    ) -> int:
        """As `add`, from tensors: for some of the modules A [L, r, h_in], B [L, h_out, r] and the scale.

        Tensors on the device are copied there, behind what is queued on the current stream, and may be dropped at
        once; others go through pinned memory.
        """
        self._check_room(name)
        self._check_weights(name, weights)
        slot = self._free[0]
        streams = self._enter(stream)
        with _on(streams):
            memory = self._upload(weights)
            try:
                self._fill(slot, weights, memory.data_ptr())
                self._publish(streams)
            except BaseException:
                self._clear(slot)
                raise
        self._free.popleft()
        self._slots[name], self._weights[name] = slot, memory
        largest = max((w.rank for w in weights.values()), default=0)
        while self.rank_bound < largest:
            self.rank_bound = min(2 * self.rank_bound, self.max_rank)
        return slot

    def remove(self, name: str, *, stream: "torch.cuda.Stream | Sequence[torch.cuda.Stream] | None" = None) -> None:
        """Frees the adapter's slot: rows that still name it get nothing.

        The host does not wait: what is queued on `stream` before this call still finds the adapter, and its memory is
        freed once that has run (at a later `add` or `remove`, or `collect`).
        """
        slot = self.index(name)
        streams = self._enter(stream)
        with _on(streams):
            self._clear(slot)
            self._publish(streams)
        self._retire(streams, [self._weights.pop(name)])
        del self._slots[name]
        self._free.append(slot)

    def collect(self) -> int:
        """Frees the memory whose last use is over, without waiting; how many blocks are still in use."""
        while self._retired and all(map(torch.cuda.Event.query, self._retired[0][0])):
            self._retired.popleft()
        return len(self._retired)

    def _check_room(self, name: str) -> None:
        if name in self._slots:
            raise AdapterError(f"adapter {name} is given twice")
        if not self._free:
            raise AdapterError(f"adapter {name}: all {self.capacity} slots are taken")

    def _check_weights(self, name: str, weights: Mapping[str, LoraWeights]) -> None:
        for module, w in weights.items():
            if module not in self.module_shapes:
                known = ", ".join(self.module_shapes)
                raise AdapterError(f"adapter {name}: {module} is not one of {known}")
            if w.a.dim() != 3 or w.b.dim() != 3:
                raise AdapterError(
                    f"adapter {name}: {module} must have A [L, r, h_in] and B [L, h_out, r], "
                    f"got {tuple(w.a.shape)} and {tuple(w.b.shape)}"
                )
            h_out, h_in = self.module_shapes[module]
            expected = (self.num_layers, w.rank, h_in), (self.num_layers, h_out, w.rank)
            if (tuple(w.a.shape), tuple(w.b.shape)) != expected:
                raise AdapterError(
                    f"adapter {name}: {module} must have shapes {expected[0]} and {expected[1]}, "
                    f"got {tuple(w.a.shape)} and {tuple(w.b.shape)}"
                )
            if w.rank > self.max_rank:
                raise AdapterError(f"adapter {name}: {module} has rank {w.rank}, max_rank is {self.max_rank}")
            if not math.isfinite(w.scale):
                raise AdapterError(f"adapter {name}: {module} has scale {w.scale}")

    # ---------------------------------------------------------------------------------------------------------- memory

    def _fill(self, slot: int, weights: Mapping[str, LoraWeights], address: int) -> None:
        offsets = self._offsets(weights)
        for projection, modules in self.base_shapes.items():
            table = self._host[projection]
            for s, module in enumerate(modules):
                if module not in weights:
                    continue
                a, b = (address + self.dtype.itemsize * offset for offset in offsets[module])
                table.a_ptr[s, slot], table.b_ptr[s, slot] = a, b
                table.scales[s, slot] = weights[module].scale
                table.ranks[s, slot] = weights[module].rank

    def _clear(self, slot: int) -> None:
        for table in self._host.values():
            for tensor in (table.ranks, table.a_ptr, table.b_ptr, table.scales):
                tensor[:, slot] = 0

    def _words(self) -> int:
        return sum(
            2 * len(modules) * self.capacity + 2 * self._half_words(modules) for modules in self.base_shapes.values()
        )

    def _half_words(self, modules: Mapping[str, tuple[int, int]]) -> int:
        return (len(modules) * self.capacity + 1) // 2  # entries of 4 bytes in words of 8

    def _views(self, memory: Tensor) -> dict[str, AdapterTables]:
        tables, at = {}, 0
        for projection, modules in self.base_shapes.items():
            shape = (len(modules), self.capacity)
            entries, half = math.prod(shape), self._half_words(modules)
            wide = [memory[at + i * entries :][:entries].view(shape) for i in range(2)]
            at += 2 * entries
            narrow = [
                memory[at + i * half :][:half].view(dtype)[:entries].view(shape)
                for i, dtype in enumerate((torch.int32, torch.float32))
            ]
            at += 2 * half
            offsets = [0]
            for h_out, _ in modules.values():
                offsets.append(offsets[-1] + h_out)
            tables[projection] = AdapterTables(wide[0], wide[1], narrow[0], narrow[1], tuple(offsets))
        return tables

    def _offsets(self, weights: Mapping[str, LoraWeights]) -> dict[str, tuple[int, int]]:
        """Where A and B of each module lie in the adapter's memory, in elements."""
        step, at, offsets = _ALIGNMENT // self.dtype.itemsize, 0, {}
        for module, w in weights.items():
            b = at + -(-w.a.numel() // step) * step
            offsets[module] = at, b
            at = b + -(-w.b.numel() // step) * step
        return offsets

    def _upload(self, weights: Mapping[str, LoraWeights]) -> Tensor:
        """The weights in one block on the device; on CUDA they are there in the order of the current stream."""
        offsets = self._offsets(weights)
        size = max((offsets[module][1] + w.b.numel() for module, w in weights.items()), default=0)
        on_device = [w.a.device == self.device and w.b.device == self.device for w in weights.values()]
        memory = torch.empty(size, dtype=self.dtype, device=self.device)
        staged = memory
        if self.device.type == "cuda" and not all(on_device):
            staged = torch.empty(size, dtype=self.dtype, pin_memory=True)
        for module, w in weights.items():
            for offset, source in zip(offsets[module], (w.a, w.b), strict=True):
                staged[offset : offset + source.numel()].view(source.shape).copy_(source)
                if source.is_cuda:  # the caller may drop it before the copy has run
                    source.record_stream(torch.cuda.current_stream(source.device))
        if staged is not memory:
            memory.copy_(staged, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._retired.append(([event], [staged]))
        return memory

    def _publish(self, streams: "list[torch.cuda.Stream]") -> None:
        """Makes the tables on the device those of the host, on the first stream; the others go on behind it.

        A copy, not a kernel: what is launched after it waits for it, even kernels that may start before the kernel
        ahead of them has ended (programmatic dependent launch), so that early reads see the new tables.
        """
        if not streams:
            return
        staged = torch.empty(self._host_memory.shape, dtype=torch.int64, pin_memory=True).copy_(self._host_memory)
        self._memory.copy_(staged, non_blocking=True)
        for stream in streams[1:]:
            stream.wait_stream(streams[0])
        self._retire(streams[:1], [staged])

    def _enter(self, stream: "torch.cuda.Stream | Sequence[torch.cuda.Stream] | None") -> "list[torch.cuda.Stream]":
        """The streams of a call; the first one waits for the others, and for the one that may have made what is to be
        copied. None on the CPU."""
        if self.device.type != "cuda":
            return []
        if stream is None:
            streams = [torch.cuda.current_stream(self.device)]
        else:
            streams = [stream] if isinstance(stream, torch.cuda.Stream) else list(stream)
        if not streams:
            raise AdapterError("stream: expected a stream or a list of streams, got an empty list")
        current = torch.cuda.current_stream(self.device)
        for s in (*streams, current):
            if s.device != self.device:
                raise AdapterError(f"stream: expected a stream of {self.device}, got one of {s.device}")
            with torch.cuda.stream(s):
                if torch.cuda.is_current_stream_capturing():
                    raise AdapterError("adapters cannot come or go while a CUDA graph is captured")
        self.collect()  # asks events, which a capture forbids
        for other in (current, *streams[1:]):
            if other != streams[0]:
                streams[0].wait_stream(other)
        return streams

    def _retire(self, streams: "list[torch.cuda.Stream]", tensors: list[Tensor]) -> None:
        events = [stream.record_event() for stream in streams]
        if events:
            self._retired.append((events, tensors))


def _on(streams: "list[torch.cuda.Stream]") -> "AbstractContextManager[object]":
    return torch.cuda.stream(streams[0]) if streams else nullcontext()

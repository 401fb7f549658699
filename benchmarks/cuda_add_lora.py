"""What the CUDA benchmark measures of add_lora: decode and prefill sizes, alone, chained, beside torch's matmuls.

Rivals: our own two launches, and the kernels of vLLM and SGLang where their files are given (cuda_peers.py), all on the
same adapters. Before a rival is timed, its result is compared with ours.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import punica_kernels as pk
import torch
import torch.nn.functional as F
from cuda_harness import FloorLibrary, addresses, calls_for, early, time_graph
from cuda_peers import Peer, peers
from cuda_works import ITEM, Row, measured, random
from torch import Tensor

# What the floor of a call is made of, on an H200: a launch, its start and end; bytes that are only read; bytes that are
# read and written again.
LAUNCH, READ, UPDATE = 1.5, 4.5e6, 4.13e6  # us, bytes a us


class AddLora:
    """Calls of add_lora; each layer of the adapters is one set of inputs. Rows take adapters in turn.

    `slots`: places for adapters in the tables, as an engine has them; those behind the adapters are empty.
    """

    def __init__(
        self, rows: int, h_in: int, widths: Sequence[int], adapters: int, ranks: Sequence[int], slots: int | None = None
    ):
        self.h_in, self.widths, self.adapters, self.ranks = h_in, widths, adapters, ranks
        self.rows, self.width = rows, sum(widths)
        self.offsets = [0, *accumulate(widths)]
        of_adapter = [ranks[i % len(ranks)] for i in range(adapters)]
        weights = sum(r * (h_in + width) for r in of_adapter for width in widths) * ITEM
        self.read, self.update = weights + rows * h_in * ITEM, rows * self.width * ITEM
        self.calls = calls_for(self.read + self.update)
        self.a = [[random(self.calls, r, h_in, scale=h_in**-0.5) for r in of_adapter] for _ in widths]
        self.b = [[random(self.calls, width, r, scale=r**-0.5) for r in of_adapter] for width in widths]
        self.a_ptr, self.b_ptr = (torch.stack([addresses(of_slice) for of_slice in all]) for all in (self.a, self.b))
        empty = (slots or adapters) - adapters
        self.a_ptr, self.b_ptr = (F.pad(table, (0, empty)) for table in (self.a_ptr, self.b_ptr))
        self.rank_table = torch.tensor(of_adapter + [0] * empty, dtype=torch.int32, device="cuda")
        self.scales = torch.ones(adapters + empty, device="cuda")
        self.indices = torch.arange(rows, device="cuda") * adapters // rows
        if rows <= 1024:
            self.indices = self.indices[torch.randperm(rows, device="cuda")]
        self.batch = pk.LoraBatch(self.indices, adapters + empty)
        self.x, self.y = random(self.calls, rows, h_in), random(self.calls, rows, self.width)

    def floor(self) -> float:
        return LAUNCH + self.read / READ + 2 * self.update / UPDATE

    def __call__(self, i: int) -> None:
        pk.add_lora(self.y[i], self.x[i], self.a_ptr, self.b_ptr, self.rank_table, self.scales, self.batch, i,
                    slice_offsets=self.offsets, max_rank=max(self.ranks))  # fmt: skip

    def run(self) -> None:
        for i in range(self.calls):
            self(i)

    def two_launches(self) -> Callable[[], None] | None:
        """By shrink and expand, where all ranks are equal and there is one slice."""
        if len(self.widths) > 1 or len(self.ranks) > 1:
            return None
        v = torch.zeros(self.calls, self.rows, self.ranks[0], dtype=self.x.dtype, device="cuda")
        a_ptr, b_ptr = self.a_ptr[0], self.b_ptr[0]
        if self.rows <= 256:

            def decode() -> None:
                for i in range(self.calls):
                    pk.dispatch_bgmv(v[i], self.x[i], a_ptr, self.indices, i, 1.0)
                    pk.dispatch_bgmv(self.y[i], v[i], b_ptr, self.indices, i, 1.0)

            return decode
        starts = torch.arange(self.adapters, dtype=torch.int32, device="cuda") * (self.rows // self.adapters)
        ends = starts + self.rows // self.adapters

        def prefill() -> None:
            for i in range(self.calls):
                pk.sgmv_shrink(v[i], self.x[i], a_ptr, starts, ends, None, i)
                pk.sgmv_shrink(self.y[i], v[i], b_ptr, starts, ends, None, i)

        return prefill

    def by(self, peer: Peer) -> Callable[[], None]:
        """The same calls by somebody else's kernels."""
        peer.forget()
        batch = peer.batch(self.indices, [self.ranks[i % len(self.ranks)] for i in range(self.adapters)])
        weights = [peer.weights(*self.matrices(i)) for i in range(self.calls)]

        def run() -> None:
            for i in range(self.calls):
                peer.add(self.y[i], self.x[i], weights[i], batch)

        self.compare(peer.name, run)
        return run

    def matrices(self, i: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """A and B of call i, by slice and adapter."""
        a, b = ([[weights[i] for weights in of_slice] for of_slice in all] for all in (self.a, self.b))
        return a, b

    def compare(self, name: str, theirs: Callable[[], None]) -> None:
        """Of the first and the last call; both round v or y in ways of their own."""
        kept = self.y.clone()
        checked = [0, self.calls - 1]
        self.y[checked] = 0
        for i in checked:
            self(i)
        ours = self.y[checked].float()
        self.y[checked] = 0
        theirs()
        difference = ((self.y[checked].float() - ours).abs() / ours.abs().amax(-1, keepdim=True)).max().item()
        self.y.copy_(kept)
        if not difference < 2**-5:
            raise AssertionError(f"{name}: {difference:.3g} of a row's largest result apart")

    def beside_matmuls(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Each call behind a matmul of the layer's size, that writes its y; the matmuls alone."""
        base = [random(self.width, self.h_in, scale=self.h_in**-0.5) for _ in range(16)]

        def matmul(i: int) -> None:
            torch.mm(self.x[i], base[i % len(base)].t(), out=self.y[i])

        def both() -> None:
            for i in range(self.calls):
                matmul(i)
                self(i)

        def alone() -> None:
            for i in range(self.calls):
                matmul(i)

        return both, alone


CASES: list[tuple[str, int, int, tuple[int, ...], int, tuple[int, ...], float | None]] = [
    # name, rows, h_in, widths of the slices, adapters, ranks, goal
    ("B=1, r=16", 1, 4096, (4096,), 1, (16,), 2.6),
    ("B=16, 16 adapters, r=16", 16, 4096, (4096,), 16, (16,), 3.6),
    ("B=64, 64 adapters, r=16", 64, 4096, (4096,), 64, (16,), 6.6),
    ("B=64, 64 adapters, r=64", 64, 4096, (4096,), 64, (64,), 18.5),
    ("B=64, 1 adapter, r=16", 64, 4096, (4096,), 1, (16,), 3.2),
    ("B=64, 8 adapters, r=16", 64, 4096, (4096,), 8, (16,), None),
    ("B=256, 256 adapters, r=16", 256, 4096, (4096,), 256, (16,), 20.0),
    ("4096 + 1024 + 1024, B=64, 64 adapters, r=16", 64, 4096, (4096, 1024, 1024), 64, (16,), 12.0),
    ("B=64, 64 adapters, ranks 8, 16, 32, 64", 64, 4096, (4096,), 64, (8, 16, 32, 64), 11.1),
    ("8 x 512 rows, r=16", 4096, 4096, (4096,), 8, (16,), 28.5),
    ("64 x 64 rows, r=16", 4096, 4096, (4096,), 64, (16,), 32.0),
    ("1 x 4096 rows, r=16", 4096, 4096, (4096,), 1, (16,), 28.5),
    ("8 x 512 rows, r=64", 4096, 4096, (4096,), 8, (64,), 31.0),
]


# The same in tables with room for more adapters than the batch has: the host cannot know how many that are.
SLOTS = 64
IN_SLOTS = [
    ("B=64, 1 adapter in 64 slots, r=16", 64, 4096, (4096,), 1, (16,)),
    ("B=64, 8 adapters in 64 slots, r=16", 64, 4096, (4096,), 8, (16,)),
    ("4096 + 1024 + 1024, B=64, 1 adapter in 64 slots, r=16", 64, 4096, (4096, 1024, 1024), 1, (16,)),
]


def rows(floors: FloorLibrary) -> Iterator[Row]:
    rivals_of_all = peers()
    for name, batch, h_in, widths, adapters, ranks, goal in CASES:
        work = AddLora(batch, h_in, widths, adapters, ranks)
        rivals: dict[str, float] = {}
        if (two := work.two_launches()) is not None:
            rivals["ours, two launches"] = time_graph(floors, two, work.calls)
        for peer in rivals_of_all:
            rivals[peer.name] = time_graph(floors, work.by(peer), work.calls)
        row = measured(floors, "add_lora alone", name, work.run, work.calls, work.floor(), goal, rivals,
                       bytes=work.read + 2 * work.update)  # fmt: skip
        row.goal = goal  # as given
        yield row
        rivals = {"ours, without early_reads": row.ours}
        yield measured(floors, "add_lora chained", name, early(work.run), work.calls, work.floor() - LAUNCH, None,
                       rivals, bytes=work.read + 2 * work.update)  # fmt: skip
        if batch <= 256:
            both, alone = work.beside_matmuls()
            matmuls = time_graph(floors, alone, work.calls)
            beside = [time_graph(floors, early(both), work.calls) - matmuls for _ in range(2)]
            yield Row("add_lora behind matmuls", name, *beside, work.floor(), bytes=work.read + 2 * work.update)
        del work
    for name, *shape in IN_SLOTS:
        work = AddLora(*shape, slots=SLOTS)
        for group, call, floor in (
            ("add_lora alone", work.run, work.floor()),
            ("add_lora chained", early(work.run), work.floor() - LAUNCH),
        ):
            yield measured(floors, group, name, call, work.calls, floor, None, {}, bytes=work.read + 2 * work.update)
        del work

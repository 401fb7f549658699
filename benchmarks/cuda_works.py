"""What the CUDA benchmark measures: the LoRA operations and rms_norm, alone, chained, and beside torch's ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import punica_kernels as pk
import torch
import torch.nn.functional as F
from cuda_harness import FloorLibrary, addresses, calls_for, early, time_graph
from torch import Tensor

DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize


@dataclass
class Row:
    """Microseconds a call. `again`: a second run of ours, whose difference is the noise."""

    group: str
    work: str
    ours: float
    again: float
    floor: float
    goal: float | None = None  # the given one, or 1.15 floors where that is more
    given_goal: float | None = None
    bytes: int = 0
    flop: int = 0
    rivals: dict[str, float] = field(default_factory=dict)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_(std=scale)


def popularity(kind: str, rows: int) -> Tensor:
    """The adapter of each row: one for all, one each, or drawn from as many adapters as rows."""
    if kind == "identical":
        return torch.zeros(rows, dtype=torch.int64, device="cuda")
    if kind == "distinct":
        return torch.randperm(rows, device="cuda")
    if kind == "uniform":
        return torch.randint(max(1, round(rows**0.5)), (rows,), device="cuda")
    weights = 1 / torch.arange(1, rows + 1, dtype=torch.float64) ** 1.5  # Zipf
    return torch.multinomial(weights, rows, replacement=True).cuda()


class Bgmv:
    """Calls of dispatch_bgmv; each layer of the adapters is one set of inputs."""

    def __init__(self, h_in: int, h_out: int, indices: Tensor, num_adapters: int, max_calls: int | None = None):
        self.h_in, self.h_out, self.indices, self.rows = h_in, h_out, indices, len(indices)
        used = len(indices.unique())
        self.read = (used * h_in * h_out + self.rows * h_in) * ITEM
        self.update = self.rows * h_out * ITEM
        self.calls = min(calls_for(num_adapters * h_in * h_out * ITEM), max_calls or 1 << 30)
        self.weights = random(num_adapters, self.calls, h_out, h_in, scale=h_in**-0.5)
        self.w_ptr = addresses(list(self.weights))
        self.x, self.y = random(self.calls, self.rows, h_in), random(self.calls, self.rows, h_out)

    def __call__(self, i: int) -> None:
        pk.dispatch_bgmv(self.y[i], self.x[i], self.w_ptr, self.indices, i, 1.0)

    def run(self) -> None:
        for i in range(self.calls):
            self(i)

    def cold_tables(self) -> Callable[[], None]:
        tables = [(self.w_ptr.clone(), self.indices.clone()) for _ in range(self.calls)]

        def run() -> None:
            for i, (w_ptr, indices) in enumerate(tables):
                pk.dispatch_bgmv(self.y[i], self.x[i], w_ptr, indices, i, 1.0)

        return run

    def gather_bmm(self) -> Callable[[], None]:
        stacked = self.weights.transpose(0, 1).contiguous()

        def run() -> None:
            for i in range(self.calls):
                chosen = stacked[i].index_select(0, self.indices)
                self.y[i].unsqueeze(2).baddbmm_(chosen, self.x[i].unsqueeze(2))

        return run

    def matmul(self) -> Callable[[], None]:
        """For one adapter alone."""

        def run() -> None:
            for i in range(self.calls):
                self.y[i].addmm_(self.x[i], self.weights[0, i].t())

        return run


def bgmv_rows(floors: FloorLibrary) -> Iterator[Row]:
    """The goals of decode: alone (launched as dependents, but reading nothing early) and chained under early_reads."""
    cases = [  # name, rows, adapters, h, r, goal alone, goal chained
        ("B=1, h=4096, r=16", 1, 1, 4096, 16, 1.9, 1.0),
        ("B=64, 64 adapters, h=4096, r=16", 64, 64, 4096, 16, 4.0, 2.4),
        ("B=64, 1 adapter, h=4096, r=16", 64, 1, 4096, 16, 2.3, 1.3),
        ("B=64, 64 adapters, h=4096, r=64", 64, 64, 4096, 64, 10.2, 8.2),
        ("B=256, 256 adapters, h=4096, r=16", 256, 256, 4096, 16, 10.8, 8.8),
        ("B=64, 64 adapters, h=14336, r=16", 64, 64, 14336, 16, 9.6, 7.8),
    ]
    for name, rows, adapters, h, r, alone, chained in cases:
        indices = popularity("distinct" if adapters > 1 else "identical", rows)
        pair = (Bgmv(h, r, indices, adapters), Bgmv(r, h, indices, adapters))
        for label, work in zip(("shrink", "expand"), pair, strict=True):
            floor = floors.floor(((work.read, work.update),), early=False)
            rivals = {"torch: index_select + bmm": time_graph(floors, work.gather_bmm(), work.calls)}
            if adapters == 1:
                rivals["torch: matmul (one adapter)"] = time_graph(floors, work.matmul(), work.calls)
            rivals["ours, tables cold"] = time_graph(floors, work.cold_tables(), work.calls)
            yield measured(floors, "BGMV alone", f"{label} {name}", work.run, work.calls, floor, alone,
                           bytes=work.read + 2 * work.update, rivals=rivals)  # fmt: skip
        yield chain_row(floors, name, pair, chained)
        del pair, work


def chain_row(floors: FloorLibrary, name: str, pair: tuple["Bgmv", "Bgmv"], goal: float) -> Row:
    """shrink, expand, shrink, ...: each expand reads what the shrink before it wrote."""
    shrink, expand = pair
    calls = min(shrink.calls, expand.calls)

    def run() -> None:
        for i in range(calls):
            shrink(i)
            pk.dispatch_bgmv(expand.y[i], shrink.y[i], expand.w_ptr, expand.indices, i, 1.0)

    parts = tuple((work.read, work.update) for work in pair)
    floor = floors.floor(parts, early=True)
    default = time_graph(floors, run, 2 * calls)
    return measured(floors, "BGMV chained", f"shrink and expand, mean, {name}", early(run), 2 * calls, floor, goal,
                    bytes=sum(read + 2 * update for read, update in parts) // 2,
                    rivals={"ours, without early_reads": default})  # fmt: skip


def measured(floors: FloorLibrary, group: str, name: str, run: Callable[[], None], calls: int, floor: float,
             goal: float | None, rivals: dict[str, float], bytes: int = 0, flop: int = 0) -> Row:  # fmt: skip
    ours, again = (time_graph(floors, run, calls) for _ in range(2))
    # Where the floor of the same bytes leaves no room for the goal, 1.15 times that floor is the goal.
    allowed = None if goal is None else max(goal, 1.15 * floor)
    return Row(group, name, ours, again, floor, allowed, goal, bytes, flop, rivals)


class Sgmv:
    """Calls of sgmv_shrink or sgmv_cutlass on equal segments; each layer is one set of inputs."""

    def __init__(self, d_in: int, d_out: int, num_segments: int, length: int, shrink: bool, max_calls: int = 1 << 30):
        self.d_in, self.d_out, self.num_segments, self.length = d_in, d_out, num_segments, length
        self.rows, self.shrink = num_segments * length, shrink
        weight_bytes = num_segments * d_in * d_out * ITEM
        self.read = weight_bytes + self.rows * d_in * ITEM
        self.update = self.rows * d_out * ITEM
        self.calls = min(calls_for(self.read + self.update), max_calls)
        shape = (d_out, d_in) if shrink else (d_in, d_out)
        self.weights = random(num_segments, self.calls, *shape, scale=d_in**-0.5)
        self.w_ptr = addresses(list(self.weights))
        self.x, self.y = random(self.calls, self.rows, d_in), random(self.calls, self.rows, d_out)
        self.starts = torch.arange(0, self.rows, length, dtype=torch.int32, device="cuda")
        self.ends = self.starts + length

    def run(self) -> None:
        call = pk.sgmv_shrink if self.shrink else pk.sgmv_cutlass
        for i in range(self.calls):
            call(self.y[i], self.x[i], self.w_ptr, self.starts, self.ends, None, i)

    def _matrices(self) -> Tensor:
        """[calls, segments, d_in, d_out], a view or not as it lies."""
        stacked = self.weights.transpose(0, 1).contiguous()
        return stacked.transpose(2, 3) if self.shrink else stacked

    def bmm(self) -> Callable[[], None]:
        matrices = self._matrices()
        x = self.x.view(self.calls, self.num_segments, self.length, self.d_in)
        y = self.y.view(self.calls, self.num_segments, self.length, self.d_out)

        def run() -> None:
            for i in range(self.calls):
                if self.num_segments == 1:
                    y[i, 0].addmm_(x[i, 0], matrices[i, 0])
                else:
                    y[i].baddbmm_(x[i], matrices[i])

        return run

    def grouped_mm(self) -> Callable[[], None]:
        matrices = self._matrices()

        def run() -> None:
            for i in range(self.calls):
                self.y[i].add_(torch._grouped_mm(self.x[i], matrices[i], offs=self.ends))

        return run


def sgmv_rivals(floors: FloorLibrary, work: Sgmv) -> dict[str, float]:
    ways = {"torch: bmm over equal segments": work.bmm, "torch: _grouped_mm, add_": work.grouped_mm}
    return {name: time_graph(floors, make(), work.calls) for name, make in ways.items()}


def sgmv_rows(floors: FloorLibrary) -> Iterator[Row]:
    cases = [  # segments, length, h, r, goal of shrink, goal of expand
        (1, 4096, 4096, 16, 10.5, 20.0),
        (8, 512, 4096, 16, 10.5, 20.0),
        (64, 64, 4096, 16, 12.0, 22.0),
        (8, 512, 4096, 64, 11.5, 21.0),
        (8, 512, 14336, 16, 31.0, 66.0),
    ]
    for segments, length, h, r, shrink_goal, expand_goal in cases:
        for shrink, goal in ((True, shrink_goal), (False, expand_goal)):
            work = Sgmv(h if shrink else r, r if shrink else h, segments, length, shrink)
            floor = floors.floor(((work.read, work.update),), early=False)
            name = f"{'shrink' if shrink else 'expand'} {segments} x {length}, h={h}, r={r}"
            yield measured(floors, "SGMV", name, work.run, work.calls, floor, goal, sgmv_rivals(floors, work),
                           bytes=work.read + 2 * work.update, flop=2 * work.rows * h * r)  # fmt: skip
            del work


def norm_rows(floors: FloorLibrary) -> Iterator[Row]:
    cases = [(16384, 4096, None, None), (8192, 8192, None, None), (1, 4096, 1.27, 1.0), (256, 4096, 2.8, 1.8)]
    for rows, columns, alone, chained in cases:
        nbytes = rows * columns * ITEM
        calls = calls_for(2 * nbytes)
        x, y, weight = random(calls, rows, columns), random(calls, rows, columns), random(calls, columns)

        def run(x: Tensor = x, y: Tensor = y, weight: Tensor = weight) -> None:
            for i in range(len(x)):
                pk.rms_norm(y[i], x[i], weight[i], 1e-5)

        def theirs(x: Tensor = x, weight: Tensor = weight, columns: int = columns) -> None:
            for i in range(len(x)):
                F.rms_norm(x[i], (columns,), weight[i], 1e-5)

        floor = floors.copy_floor(nbytes)
        rivals = {"torch: F.rms_norm": time_graph(floors, theirs, calls)}
        row = measured(floors, "RMS norm", f"{rows} x {columns}", run, calls, floor, alone, rivals, bytes=2 * nbytes)
        if alone is None:
            row.goal = floor / 0.985
        yield row
        if chained is not None:
            one = floors.floor(((columns * ITEM, nbytes),), early=True)
            yield measured(floors, "RMS norm", f"{rows} x {columns}, chained", early(run), calls, one, chained, {},
                           bytes=2 * nbytes)  # fmt: skip

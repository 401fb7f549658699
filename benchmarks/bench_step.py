"""What LoRA adds to a decode step of Llama-3-8B's shape under one CUDA graph, and to what parts of it.

    python benchmarks/bench_step.py [--batch 64] [--context 1024] [--rank 16] [--rounds 15] [--rivals WORD]

The engine behind `punica generate`, with random weights: every sequence has as many tokens of context, LoRA is on all
seven projections. One captured graph serves 64, 8 and 1 distinct adapters; another one is the same engine without LoRA.
In every round each graph is replayed once, in turns; what LoRA adds is the median over the rounds of the difference
within a round. A step reads 15 GB of weights, so no adapter is found in the cache.

The floor of LoRA: over all calls, 1.5 us and their bytes at 4.5 TB/s; bytes are A and B of each distinct adapter and x
once, y twice. The goal is 1.15 times that.

Rivals: our own dispatch_bgmv, two for each of the seven projections, and the kernels of vLLM and SGLang, two launches
for each of the four groups of projections, where their files are given (cuda_peers.py). Their metadata is made
beforehand. Before anything is timed, one layer of each is compared with ours, the graph's logits with those of single
launches, and those of a batch without adapters with those of the engine without LoRA.

Writes step_cuda.json and step_cuda.md into benchmarks/results.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import punica_kernels as pk
import results_form
import torch
import torch.nn.functional as F
from bench_engine import DTYPE, LLAMA3_8B, RandomWeights, random_adapter
from cuda_peers import Peer, peers
from punica_kernels.engine.adapters import PROJECTIONS, Adapters, Lora
from punica_kernels.engine.graph import StepTables, capture
from punica_kernels.engine.kv_cache import KvCache
from punica_kernels.engine.model import Batch, Llama
from torch import Tensor

DISTINCT = (64, 8, 1)
LAUNCH, RATE, AIM = 1.5, 4.5e6, 4.55e6  # us, bytes a us
FACTOR = 1.15
WARMUP = 2
TWO = "ours, two launches a projection"


class AnyLora(Protocol):
    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None: ...


class NoLora:
    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None:
        pass


@dataclass
class Only:
    """The LoRA of one group of projections."""

    lora: AnyLora
    projection: str

    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None:
        if projection == self.projection:
            self.lora.apply(projection, layer, x, y)


class TwoLaunches:
    """The way of the operations without add_lora: A and B of each projection, for adapters of one rank."""

    def __init__(self, adapters: Adapters, rank: int, indices: Tensor):
        self.tables, self.rank, self.indices = adapters.set.tables, rank, indices

    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None:
        t = self.tables[projection]
        v = torch.zeros(len(t.a_ptr), len(x), self.rank, dtype=x.dtype, device=x.device)
        for s in range(len(t.a_ptr)):
            pk.dispatch_bgmv(v[s], x, t.a_ptr[s], self.indices, layer, 1.0)
            columns = y[:, t.slice_offsets[s] : t.slice_offsets[s + 1]]
            pk.dispatch_bgmv(columns, v[s], t.b_ptr[s], self.indices, layer, 1.0)


class PeerLora:
    def __init__(self, peer: Peer, weights: dict[str, list[Any]], indices: Tensor, rank: int, adapters: int):
        self.peer, self.weights = peer, weights
        self.batch = peer.batch(indices, [rank] * adapters)

    def apply(self, projection: str, layer: int, x: Tensor, y: Tensor) -> None:
        self.peer.add(y, x, self.weights[projection][layer], self.batch)


class Bench:
    def __init__(self, batch: int, context: int, rank: int):
        self.rows, self.rank, self.config = batch, rank, LLAMA3_8B
        device = torch.device("cuda", torch.cuda.current_device())
        self.model = Llama(self.config, RandomWeights(), DTYPE, device)
        self.adapters = Adapters(self.config, DTYPE, device, max(DISTINCT))
        self.loaded = [random_adapter(self.config, rank) for _ in range(max(DISTINCT))]
        for i, weights in enumerate(self.loaded):
            self.adapters.load_weights(f"random{i}", weights)
        self.lora = Lora(self.adapters, [], capacity=batch)
        cache = KvCache(self.config, batch * -(-context // 16), 16, DTYPE, device)
        cache.pool.normal_()
        order = torch.randperm(cache.num_pages).tolist()
        pages = len(order) // batch
        sequences = [(order[i * pages : (i + 1) * pages], context) for i in range(batch)]
        self.cache = cache  # its pages are read by address
        host = torch.device("cpu")
        self.tables = StepTables(batch, cache.num_pages, cache.page_size, device)
        tokens = torch.randint(self.config.vocab_size, (batch,))
        positions = torch.full((batch,), context - 1)
        # Only the tables of it are read.
        step = Batch(tokens, positions, cache.table(sequences, host), self.lora)
        self.tables.set(step)
        self.kv_bytes = 4 * batch * context * self.config.num_kv_heads * self.config.head_dim
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def ids(self, distinct: int) -> list[int]:
        """Rows take adapters in turn; 0 distinct ones: none."""
        return [self.adapters.id(f"random{i % distinct}") if distinct else -1 for i in range(self.rows)]

    def set(self, distinct: int) -> None:
        self.lora.set(self.ids(distinct))

    def batch(self, lora: AnyLora) -> Batch:
        return Batch(self.tables.tokens, self.tables.positions, self.tables.pages, lora)  # type: ignore[arg-type]

    def graph(self, lora: AnyLora) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        return capture(self.model, self.batch(lora), self.stream, self.pool)

    def graph_of(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with pk.early_reads(), torch.inference_mode():
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                run()
        return graph

    # ------------------------------------------------------------------------------------------------------- bytes

    def call_bytes(self, projection: str, distinct: int) -> int:
        shapes = [self.config.module_shape(module) for module in PROJECTIONS[projection]]
        width, h_in = sum(h_out for h_out, _ in shapes), shapes[0][1]
        weights = distinct * self.rank * (len(shapes) * h_in + width)
        return (weights + self.rows * (h_in + 2 * width)) * DTYPE.itemsize

    def floor(self, projections: Sequence[str], distinct: int) -> float:
        calls = [LAUNCH + self.call_bytes(projection, distinct) / RATE for projection in projections]
        return self.config.num_layers * sum(calls)

    def aim(self, distinct: int) -> float:
        nbytes = sum(self.call_bytes(projection, distinct) for projection in PROJECTIONS)
        return FACTOR * self.config.num_layers * nbytes / AIM

    # ---------------------------------------------------------------------------------------------- parts of the base

    def matmuls(self) -> tuple[Callable[[], None], float]:
        config, rows = self.config, self.rows
        x = torch.randn(rows, config.hidden_size, dtype=DTYPE, device="cuda")
        wide = torch.randn(rows, config.intermediate_size, dtype=DTYPE, device="cuda")

        def run() -> None:
            for layer in self.model.layers:
                layer.qkv_proj(x)
                layer.o_proj(x)
                layer.gate_up_proj(x)
                layer.down_proj(wide)
            F.linear(x, self.model.lm_head)

        nbytes = self.model.lm_head.nbytes
        for layer in self.model.layers:
            linears = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
            nbytes += sum(linear.weight.nbytes for linear in linears)
        return run, nbytes / RATE

    def attention(self) -> tuple[Callable[[], None], float]:
        config, pages = self.config, self.tables.pages
        q = torch.randn(self.rows, config.num_heads, config.head_dim, dtype=DTYPE, device="cuda")
        k, v = (torch.randn(self.rows, config.num_kv_heads, config.head_dim, dtype=DTYPE, device="cuda") for _ in "kv")
        o = torch.empty_like(q)
        table = (pages.kv_ptrs, pages.kv_indptr, pages.last_page_offset)

        def run() -> None:
            for i in range(config.num_layers):
                sizes = (config.num_layers, i, config.num_kv_heads, pages.page_size)
                pk.append_kv(*table, k, v, *sizes)
                pk.batch_decode(o, q, *table, None, *sizes)

        return run, config.num_layers * self.kv_bytes / RATE

    def norms(self) -> tuple[Callable[[], None], None]:
        x, y, z = (torch.randn(self.rows, self.config.hidden_size, dtype=DTYPE, device="cuda") for _ in range(3))

        def run() -> None:
            for _ in range(2 * self.config.num_layers + 1):
                pk.rms_norm(y, x, self.model.norm, self.config.rms_norm_eps, residual=z)

        return run, None


# ------------------------------------------------------------------------------------------------------------- checks


def check_peer(bench: Bench, name: str, theirs: AnyLora) -> None:
    for projection, modules in PROJECTIONS.items():
        shapes = [bench.config.module_shape(module) for module in modules]
        x = torch.randn(bench.rows, shapes[0][1], dtype=DTYPE, device="cuda")
        y = torch.zeros(2, bench.rows, sum(h_out for h_out, _ in shapes), dtype=DTYPE, device="cuda")
        bench.lora.apply(projection, 1, x, y[0])
        theirs.apply(projection, 1, x, y[1])
        ours, other = y.float()
        difference = ((other - ours).abs() / ours.abs().amax(1, keepdim=True)).max().item()
        if not difference < 2**-5:
            raise AssertionError(f"{name}, {projection}: {difference:.3g} of a row's largest result apart")


def check_graph(bench: Bench, graph: torch.cuda.CUDAGraph, logits: Tensor, base: Tensor) -> None:
    """`base`: the logits of the engine without LoRA."""
    if not base.isfinite().all():
        raise AssertionError("logits are not finite")
    for distinct in (0, *DISTINCT):
        bench.set(distinct)
        single = bench.model.forward(bench.batch(bench.lora))
        graph.replay()
        if not torch.equal(logits, single):
            raise AssertionError(f"{distinct} adapters: graph and single launches differ")
        if torch.equal(logits, base) is not (distinct == 0):
            raise AssertionError(f"{distinct} adapters: equal to the engine without LoRA: {distinct != 0}")


# ------------------------------------------------------------------------------------------------------------- timing


@dataclass
class Variant:
    name: str
    graph: torch.cuda.CUDAGraph
    distinct: int | None = None  # our graphs: adapters to set before the replay
    kept: Any = None  # what the graph reads by address


def time_variants(
    bench: Bench, variants: Sequence[Variant], rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Microseconds of each variant, by round. Nothing waits between replays, so launching is not in the figures."""
    for variant in variants:  # one by one, so that it is known which one fails
        say(f"first replay: {variant.name}")
        variant.graph.replay()
        torch.cuda.synchronize()
    events: dict[str, list[tuple[Any, Any]]] = {variant.name: [] for variant in variants}
    for attempt in range(WARMUP + rounds):
        for variant in variants if attempt % 2 == 0 else reversed(variants):
            if variant.distinct is not None:
                bench.set(variant.distinct)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variant.graph.replay()
            end.record()
            events[variant.name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs[WARMUP:]] for name, pairs in events.items()}


def added(times: dict[str, list[float]], name: str) -> float:
    return max(0.0, statistics.median(a - b for a, b in zip(times[name], times["base"], strict=True)))


def measure(bench: Bench, rounds: int, word: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    base, base_logits = bench.graph(NoLora())
    ours, logits = bench.graph(bench.lora)
    base.replay()
    check_graph(bench, ours, logits, base_logits)
    say("the graphs give the logits of single launches")
    variants = [Variant("base", base), Variant("none", ours, 0)]
    for distinct in DISTINCT:
        variants += [Variant(f"ours {distinct}", ours, distinct), Variant(f"again {distinct}", ours, distinct)]
    for projection in PROJECTIONS:
        graph = bench.graph(Only(bench.lora, projection))[0]
        variants += [Variant(f"{projection} {distinct}", graph, distinct) for distinct in DISTINCT]
    rivals = [TWO] if word in TWO else []
    weights: dict[type, dict[str, list[Any]]] = {}
    all_peers = [peer for peer in peers() if word in peer.name]
    for distinct in DISTINCT:
        indices = torch.tensor(bench.ids(distinct), device="cuda")
        bench.set(distinct)
        others: list[tuple[str, AnyLora]] = []
        if rivals:
            others.append((TWO, TwoLaunches(bench.adapters, bench.rank, indices)))
        for peer in all_peers:
            if type(peer) not in weights:
                weights[type(peer)] = peer_weights(bench, peer)
            lora = PeerLora(peer, weights[type(peer)], indices, bench.rank, len(bench.loaded))
            others.append((peer.name, lora))
        for name, other in others:
            check_peer(bench, name, other)
            variants.append(Variant(f"{name} {distinct}", bench.graph(other)[0], kept=other))
    rivals += [peer.name for peer in all_peers]
    say("rivals compared and captured")
    parts = {
        "matrix products": bench.matmuls(),
        "attention and KV writes": bench.attention(),
        "RMS norms": bench.norms(),
    }
    for name, (run, _) in parts.items():
        variants.append(Variant(name, bench.graph_of(run), kept=run))
    times = time_variants(bench, variants, rounds, say)
    say("timed")
    return rows_of(bench, times, rivals, {name: floor for name, (_, floor) in parts.items()})


def peer_weights(bench: Bench, peer: Peer) -> dict[str, list[Any]]:
    def of(projection: str, layer: int) -> Any:
        modules = PROJECTIONS[projection]
        a = [[weights[module].a[layer] for weights in bench.loaded] for module in modules]
        b = [[weights[module].b[layer] for weights in bench.loaded] for module in modules]
        return peer.weights(a, b)

    return {projection: [of(projection, i) for i in range(bench.config.num_layers)] for projection in PROJECTIONS}


def rows_of(
    bench: Bench, times: dict[str, list[float]], rivals: list[str], parts: dict[str, float | None]
) -> list[dict[str, Any]]:
    def row(group: str, work: str, ours: float, floor: float | None = None, **more: Any) -> dict[str, Any]:
        basic = {"group": group, "work": work, "unit": "us a step", "ours": ours, "floor": floor, "goal": None}
        return {**basic, "rivals": {}, **more}

    what = f"{bench.rows} rows"
    step = {name: statistics.median(of) for name, of in times.items()}
    rows = [row("step", f"{what}, without LoRA", step["base"])]
    rows.append(row("step", f"{what}, LoRA's calls, no row with an adapter", step["none"]))
    for distinct in DISTINCT:
        with_rivals = {name: step[f"{name} {distinct}"] for name in rivals}
        floor = step["base"] + bench.floor(list(PROJECTIONS), distinct)
        rows.append(row("step", f"{what}, {count(distinct)}", step[f"ours {distinct}"], floor, rivals=with_rivals))
    for distinct in DISTINCT:
        ours, floor = added(times, f"ours {distinct}"), bench.floor(list(PROJECTIONS), distinct)
        rows.append(
            row(
                "LoRA adds", f"{what}, {count(distinct)}", ours, floor, goal=FACTOR * floor,
                met=ours <= FACTOR * floor, again=added(times, f"again {distinct}"), aim=bench.aim(distinct),
                rivals={name: added(times, f"{name} {distinct}") for name in rivals},
            )
        )  # fmt: skip
    for distinct in DISTINCT:
        for projection in PROJECTIONS:
            floor = bench.floor([projection], distinct)
            work = f"{projection} alone, {count(distinct)}"
            rows.append(row("LoRA by projection", work, added(times, f"{projection} {distinct}"), floor))
    rest = step["base"]
    for name, part_floor in parts.items():
        rest -= step[name]
        rows.append(row("base by part", name, step[name], part_floor))
    rows.append(row("base by part", "the rest: RoPE, SiLU, embedding, gaps", max(0.0, rest)))
    return rows


def markdown(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        "# A decode step with LoRA",
        "",
        f"`{result['command']}`, {result['device']}, {result['date'][:10]}, torch {result['versions']['torch']}. A "
        f"model of Llama-3-8B's shape with random weights, bfloat16; {settings['batch']} sequences with "
        f"{settings['context']} tokens of context; LoRA of rank {settings['rank']} on all seven projections; one CUDA "
        "graph. Microseconds a step. What LoRA adds is the difference to the same engine without LoRA in the same "
        "round. Floor of LoRA: over its calls, 1.5 us and their bytes at 4.5 TB/s; goal: 1.15 times that. Of the base: "
        "bytes at 4.5 TB/s.",
        "",
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        of_group = [row for row in result["rows"] if row["group"] == group]
        names = list(dict.fromkeys(name for row in of_group for name in row["rivals"]))
        goals = any(row["goal"] is not None for row in of_group)
        head = [group, "ours", *(["again"] if goals else []), "floor", *(["goal"] if goals else []), *names]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for row in of_group:
            cells = [row["work"], f"**{figure(row['ours'])}**"]
            cells += [figure(row.get("again"))] if goals else []
            cells.append(figure(row["floor"]))
            if goals:
                cells.append(f"{figure(row['goal'])} ({'met' if row['met'] else 'missed'})")
            cells += [figure(row["rivals"].get(name)) for name in names]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def count(distinct: int) -> str:
    return f"{distinct} adapter{'s' if distinct != 1 else ''}"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rivals", metavar="WORD", default="", help="only those whose names contain this")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not pk.has_cuda():
        print("bench_step: no CUDA device, or built without CUDA", file=sys.stderr)
        return 2

    start = time.monotonic()

    def say(message: str) -> None:
        print(f"{time.monotonic() - start:.1f} s: {message}", file=sys.stderr, flush=True)

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bench = Bench(args.batch, args.context, args.rank)
    torch.cuda.synchronize()
    say("model, adapters and cache are there")
    rows = measure(bench, args.rounds, args.rivals, say)
    result = {
        **results_form.head(
            " ".join(["python", "benchmarks/bench_step.py", *results_form.given(sys.argv[1:])]),
            torch.cuda.get_device_name(),
            {"torch": torch.__version__},
        ),
        "arch": pk.last_cuda_arch(),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "rows": rows,
    }
    results_form.write(args.output / "step_cuda.json", result)
    (args.output / "step_cuda.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

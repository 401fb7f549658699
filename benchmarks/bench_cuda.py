"""Measures the CUDA backend in one run: kernel floors, our operations, and torch's ways of doing the same.

    python benchmarks/bench_cuda.py [--only WORD,...] [--grid] [--output FOLDER]

Prints a line a row; writes cuda.json and cuda.md (with --grid: cuda_grid.json and cuda_grid.md) into
benchmarks/results. `--plot benchmarks/results/cuda.json` draws cuda.svg, add_lora.svg and the same as png, which needs
no GPU. Rivals that are not torch's, vLLM, SGLang and FlashInfer, are measured where their files are given:
cuda_peers.py, cuda_flashinfer.py.

bfloat16. Weights, x and y rotate and are cold in the second-level cache; index and pointer tables are the same small
tensors in every call, as in an engine, so they are warm: "ours, tables cold" is the figure without that. How time is
taken, and what a floor is: cuda_harness.py. "Alone" calls are launched as the library always does on Hopper
(programmatic dependents that wait before they read anything); "chained" ones under early_reads().
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cuda_add_lora
import cuda_attention
import cuda_grid
import cuda_report
import cuda_works
import punica_kernels as pk
import results_form
import torch
from cuda_harness import FloorLibrary
from works import overhead

GROUPS = {
    "BGMV": cuda_works.bgmv_rows,
    "SGMV": cuda_works.sgmv_rows,
    "add_lora": cuda_add_lora.rows,
    "RMS norm": cuda_works.norm_rows,
    "Decode attention": cuda_attention.decode_rows,
    "Prefill attention": cuda_attention.prefill_rows,
    "KV writes": cuda_attention.write_rows,
}
OVERHEAD = "Call overhead"
OVERHEAD_GOALS = {"rms_norm": 1.5, "dispatch_bgmv": 1.5, "batch_decode": 2.2, "batch_prefill": 2.2}


def overhead_rows(floors: FloorLibrary) -> list[dict[str, Any]]:
    """Host time of a call, from Python to the launch; the floor is the same launch of an empty kernel from C."""

    def bare(dependent: bool) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        floors.launches(overhead.BLOCK, dependent)
        return (time.perf_counter() - start) / overhead.BLOCK

    rows = []
    calls = overhead.tiny_calls("cuda")
    bare(True)
    for call in calls.values():
        call()
    for busy in (False, True):
        times: dict[str, list[float]] = {name: [] for name in calls}
        plain, launch = [], []
        # In turns: the host's pace changes by more than half within minutes.
        for _ in range(5 if busy else 40):
            plain.append(bare(False))
            launch.append(bare(True))
            for name, call in calls.items():
                torch.cuda.synchronize()
                if busy:
                    with overhead.busy_thread():
                        times[name].append(overhead.beside(call))
                else:
                    times[name].append(overhead.alone(call))
        floor = statistics.median(launch) * 1e6
        print(f"a bare launch: {statistics.median(plain) * 1e6:.2f} us, as a programmatic dependent {floor:.2f} us")
        for name in calls:
            goal = OVERHEAD_GOALS.get(name) if not busy else None
            rows.append(
                {
                    "group": OVERHEAD,
                    "work": f"{name}, beside a busy Python thread" if busy else name,
                    "unit": "us",
                    "ours": statistics.median(times[name]) * 1e6,
                    "floor": floor,
                    "goal": None if goal is None else floor + goal,
                    "rivals": {},
                }
            )
    adds = {row["work"]: row["ours"] for row in rows if row["work"].startswith("torch add_")}
    rows = [row for row in rows if not row["work"].startswith("torch add_")]
    for row in rows:
        row["rivals"]["torch: add_"] = adds[
            "torch add_" + row["work"].partition(",")[1] + row["work"].partition(",")[2]
        ]
        row["met"] = None if row["goal"] is None else row["ours"] <= row["goal"]
    return rows


def row_of(row: cuda_works.Row) -> dict[str, Any]:
    result = {"unit": "us", **asdict(row), "spread": abs(row.again - row.ours) / row.ours}
    result["met"] = None if row.goal is None else row.ours <= row.goal
    result["terabytes_per_second"] = row.bytes / row.ours * 1e-6 if row.bytes else None
    result["teraflop_per_second"] = row.flop / row.ours * 1e-6 if row.flop else None
    return result


def options(arguments: argparse.Namespace) -> list[str]:
    """Those that change what is measured."""
    words = ["--only", arguments.only] if arguments.only else []
    return words + (["--grid", "--seconds", f"{arguments.seconds:g}"] if arguments.grid else [])


def write(
    arguments: argparse.Namespace, name: str, rows: list[dict[str, Any]], markdown: Callable[[dict[str, Any]], str]
) -> None:
    if arguments.output is None:
        return
    result = {
        **results_form.head(
            " ".join(["python", "benchmarks/bench_cuda.py", *options(arguments)]),
            torch.cuda.get_device_name(),
            {"torch": torch.__version__, "cuda": torch.version.cuda, "apache-tvm-ffi": version("apache-tvm-ffi")},
        ),
        "arch": pk.last_cuda_arch(),
        "rows": rows,
    }
    try:
        results_form.write(arguments.output / f"{name}.json", result)
    except ValueError as error:  # said, but no reason to measure no further
        print(f"bench_cuda: {error}", file=sys.stderr)
    (arguments.output / f"{name}.md").write_text(markdown(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="measure only groups whose name contains this, or one of these (a,b); with --grid, points whose name has "
        "all these words, or those of one of these (a b,c d)",
    )
    parser.add_argument("--grid", action="store_true", help="the wide grid of shapes instead of the goals")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the grid after so long")
    parser.add_argument("--output", type=Path, default=None, help="default: results, for whole runs")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of such a file, beside it")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        result = json.loads(arguments.plot.read_text())
        cuda_report.plot(result, [arguments.plot.with_suffix(suffix) for suffix in (".svg", ".png")])
        cuda_report.plot_add_lora(result, [arguments.plot.with_name(f"add_lora.{kind}") for kind in ("svg", "png")])
        return 0
    if not torch.cuda.is_available() or not pk.has_cuda():
        print("bench_cuda: torch finds no CUDA device" if pk.has_cuda() else "bench_cuda: built without CUDA",
              file=sys.stderr)  # fmt: skip
        return 2

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    floors = FloorLibrary()
    if arguments.output is None and not arguments.only:
        arguments.output = Path(__file__).parent / "results"
    if arguments.grid:
        write(arguments, "cuda_grid", cuda_grid.rows(floors, arguments.seconds, arguments.only), cuda_grid.markdown)
    else:
        rows: list[dict[str, Any]] = []
        for group, make in {**GROUPS, OVERHEAD: None}.items():
            if not any(word in group.lower() for word in arguments.only.lower().split(",")):
                continue
            for row in overhead_rows(floors) if make is None else map(row_of, make(floors)):
                rows.append(row)
                print(cuda_report.line(row), flush=True)
            # After each group: what has been measured is kept when a run is cut short.
            write(arguments, "cuda", rows, cuda_report.markdown)
    if arguments.output is None:
        print("not written: only a part was measured (--output FOLDER writes it)")
        return 0
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

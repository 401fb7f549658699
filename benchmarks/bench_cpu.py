"""Measures the CPU backend in one run: the machine's floors, our operations, and what else there is.

    python benchmarks/bench_cpu.py [--only WORD] [--rounds N] [--max-rounds N] [--output FOLDER]

Prints a table; writes cpu.json, cpu.md, cpu.svg and cpu.png into benchmarks/results. bfloat16, h = 4096 and r = 16
where nothing else is said. PUNICA_ISA forces an instruction set; all use torch's number of threads.

The floor of a work is the least time that the machine needs for it: max(bytes / streaming read bandwidth, flop / peak),
where bytes are what has to be read and what has to be written, once each. It is measured beside every work, in every
round (see harness.py), because the machine's bandwidth changes with time. A goal is a share of that rate, or a multiple
of a rival's.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Large tensors on 2 MiB pages, ours and the rivals', as the floor's loops over memory may have: KV pages and adapters
# lie scattered, and with 4 KiB pages each is a miss of the address translation too. torch reads it when it is loaded.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import punica_kernels as pk
import report
import results_form
import torch
from harness import (
    MAX_ROUNDS,
    ROUNDS,
    Floor,
    FloorProcess,
    Measured,
    QuietCheck,
    Work,
    device_name,
    floor_of,
    measure,
    rotation_bytes,
)
from works import attention, kv_cache, lora, norm, overhead

GROUPS: dict[str, Callable[[int], Iterator[Work]]] = {
    "LoRA": lora.works,
    report.MIXED: lora.mixed_works,
    "Attention": attention.works,
    "KV cache": kv_cache.works,
    "Norm": norm.works,
}
OVERHEAD = "Call overhead"


def row_of(work: Work, group: str, predicted: float, m: Measured) -> dict[str, Any]:
    goal = None
    if work.goal is not None:
        goal = m.floor / work.goal
    elif work.times is not None:
        goal = m.rivals[work.times[0]] / work.times[1]
    return {
        "group": group,
        "work": work.name,
        "unit": "us",
        "ours": m.ours * 1e6,
        "floor": m.floor * 1e6,
        "goal": None if goal is None else goal * 1e6,
        # Faster than the floor: something disturbed the floor (a noisy machine), and the row says nothing about goals.
        "met": None if goal is None or (work.goal is not None and m.share > 1.02) else m.ours <= goal,
        "share_of_floor": m.share,
        "predicted": predicted * 1e6,
        "spread": m.spread,
        "bytes": work.bytes,
        "flop": work.flop,
        "quiet_rounds": m.quiet_rounds,
        "rounds": m.rounds,
        "rivals": {name: value * 1e6 for name, value in m.rivals.items()},
    }


def overhead_rows(floor: FloorProcess, rounds: int) -> list[dict[str, Any]]:
    """Time a call at tiny sizes: the median over the rounds. torch's add_ is the rival of all."""
    rows = []
    for busy in (False, True):
        times: dict[str, list[float]] = {name: [] for name in overhead.tiny_calls()}
        calls = overhead.tiny_calls()
        quiet, quiet_rounds = QuietCheck(floor), 0
        for _ in range(4 * rounds if not busy else 5):
            for name, call in calls.items():
                if busy:
                    with overhead.busy_thread():
                        times[name].append(overhead.beside(call))
                else:
                    times[name].append(overhead.alone(call))
            quiet_rounds += quiet.foreign_load() < 0.1
        yardstick = statistics.median(times.pop("torch add_"))
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            half = len(seconds) // 2
            spread = abs(statistics.median(seconds[:half]) - statistics.median(seconds[half:])) / middle
            rows.append(
                {
                    "group": OVERHEAD,
                    "work": f"{name}, beside a busy Python thread" if busy else name,
                    "unit": "us",
                    "ours": middle * 1e6,
                    "floor": None,
                    "goal": None,
                    "spread": spread,
                    "quiet_rounds": quiet_rounds,
                    "rounds": len(seconds),
                    "rivals": {"torch: add_": yardstick * 1e6},
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="measure only works whose group or name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds that count for each work")
    parser.add_argument("--max-rounds", type=int, default=MAX_ROUNDS, help="rounds tried to find quiet ones")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    isa, threads, rotation = pk.active_isa(), torch.get_num_threads(), rotation_bytes()
    print(f"{device_name()}; {threads} threads; {isa}; measuring the machine ...", flush=True)
    floor = FloorProcess(isa, threads, rotation)
    machine: Floor = floor_of(floor.first)
    print(
        f"streaming read {machine.read * 1e-9:.1f} GB/s ({floor.first['read']['how']}), "
        f"update in place {machine.update * 1e-9:.1f} GB/s, "
        f"peak {machine.peak * 1e-9:.0f} GFLOP/s ({floor.first['peak']['how']})",
        flush=True,
    )

    rows = []
    for group, works in GROUPS.items():
        if group_skipped(group, arguments.only):
            continue
        for work in works(rotation):
            if not wanted(f"{group}: {work.name}", arguments.only):
                continue
            predicted = machine.seconds(work)
            print(f"{group}: {work.name}: floor {predicted * 1e6:.0f} us ... ", end="", flush=True)
            m = measure(work, floor, arguments.rounds, arguments.max_rounds)
            rows.append(row_of(work, group, predicted, m))
            rivals = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in m.rivals.items())
            print(
                f"ours {m.ours * 1e6:.1f} us ({100 * m.share:.0f}% of the floor {m.floor * 1e6:.1f}; spread "
                f"{100 * m.spread:.1f}%; {m.quiet_rounds} of {m.rounds} rounds quiet); {rivals}",
                flush=True,
            )
            del work
            gc.collect()
    if wanted(OVERHEAD, arguments.only):
        print(f"{OVERHEAD} ...", flush=True)
        rows += overhead_rows(floor, arguments.rounds)
    floor.close()
    if not rows:
        print(f"nothing is called {arguments.only!r}", file=sys.stderr)
        return 2

    result = {
        **results_form.head(
            " ".join(["python", "benchmarks/bench_cpu.py", *sys.argv[1:]]),
            device_name(),
            {name: version(name) for name in ("torch", "peft", "apache-tvm-ffi")},
        ),
        "threads": threads,
        "isa": {"name": isa, "ran": pk.last_isa(), "peak_instruction": floor.first["peak"]["how"]},
        "floors": {
            "read": {"gb_s": machine.read * 1e-9, "how": floor.first["read"]["how"]},
            "update": {"gb_s": machine.update * 1e-9, "how": floor.first["update"]["how"]},
            "peak": {"gflop_s": machine.peak * 1e-9, "how": floor.first["peak"]["how"]},
            "rotation_bytes": rotation,
        },
        "rows": rows,
    }
    report.print_table(result)
    results_form.write(arguments.output / "cpu.json", result)
    (arguments.output / "cpu.md").write_text(report.markdown(result))
    if any(row["group"] == report.MIXED for row in rows) and len({row["group"] for row in rows}) > 2:
        report.plot(result, [arguments.output / "cpu.svg", arguments.output / "cpu.png"])
    print(f"written to {arguments.output}")
    missed = [row["work"] for row in rows if row.get("met") is False]
    if missed:
        print("missed: " + ", ".join(missed))
    return 0


def wanted(text: str, only: str) -> bool:
    return only.lower() in text.lower()


def group_skipped(group: str, only: str) -> bool:
    """A word that names another group: building this one's works would cost time and memory for nothing."""
    return any(wanted(other, only) for other in (*GROUPS, OVERHEAD)) and not wanted(group, only)


if __name__ == "__main__":
    sys.exit(main())

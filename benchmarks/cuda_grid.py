"""The wide grid: many widths, ranks, row counts and popularities, ours against the best of torch's ways."""

import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from cuda_harness import FloorLibrary, time_graph
from cuda_works import Bgmv, Sgmv, popularity

WIDTHS = (64, 576, 1024, 3424, 4096, 4099, 14336, 29568, 32768)
RANKS = (1, 4, 8, 13, 16, 32, 64, 128, 256, 512)
ROWS = (1, 8, 64, 256, 1024)
SEGMENTS = ((1, 64), (1, 1024), (8, 64), (64, 1), (16, 16))  # number, length
KINDS = ("identical", "uniform", "zipf", "distinct")
CALLS = 12  # of one graph: what matters is the ratio, in the same graph
MAX_WEIGHTS = 3 << 30  # bytes of all sets of one point
REPLAYS = 5


def points() -> list[tuple[str, Callable[[FloorLibrary], dict[str, Any] | None]]]:
    """Every combination, each as its name and what measures it, in an order that is random but always the same: a run
    that is cut short has seen a fair sample of all of them."""
    found: list[tuple[str, Callable[[FloorLibrary], dict[str, Any] | None]]] = []
    for width, rank in itertools.product(WIDTHS, RANKS):
        if rank >= width:
            continue
        for shrink in (True, False):
            for rows, kind in itertools.product(ROWS, KINDS):
                if rows > 1 or kind == "identical":
                    point = {"h": width, "r": rank, "rows": rows, "popularity": kind}
                    found.append((bgmv_name(point, shrink), functools.partial(measure, point=point, shrink=shrink)))
            for count, length in SEGMENTS:
                given: dict[str, Any] = {"width": width, "rank": rank, "count": count, "length": length}
                found.append((sgmv_name(**given, shrink=shrink), functools.partial(segments, **given, shrink=shrink)))
    random.Random(0).shuffle(found)
    return found


def bgmv_name(point: dict[str, Any], shrink: bool) -> str:
    direction = "shrink" if shrink else "expand"
    return f"BGMV {direction} h={point['h']} r={point['r']} rows={point['rows']} {point['popularity']}"


def sgmv_name(width: int, rank: int, count: int, length: int, shrink: bool) -> str:
    return f"SGMV {'shrink' if shrink else 'expand'} h={width} r={rank} {count} x {length}"


def measure(floors: FloorLibrary, point: dict[str, Any], shrink: bool) -> dict[str, Any] | None:
    h, r, rows = point["h"], point["r"], point["rows"]
    indices = popularity(point["popularity"], rows)
    adapters = int(indices.max()) + 1
    calls = min(CALLS, MAX_WEIGHTS // (adapters * h * r * 2))
    if calls < 3:
        return None
    work = Bgmv(h if shrink else r, r if shrink else h, indices, adapters, calls)
    ours = time_graph(floors, work.run, work.calls, replays=REPLAYS)
    rivals = {"index_select + bmm": time_graph(floors, work.gather_bmm(), work.calls, replays=REPLAYS)}
    if adapters == 1:
        rivals["matmul"] = time_graph(floors, work.matmul(), work.calls, replays=REPLAYS)
    return {
        "group": "grid",
        "work": bgmv_name(point, shrink),
        "unit": "us",
        **point,
        "ours": ours,
        "floor": None,
        "goal": min(rivals.values()) * (1.0 if r <= 128 else 1 / 0.85),
        "rivals": rivals,
    }


def segments(
    floors: FloorLibrary, width: int, rank: int, count: int, length: int, shrink: bool
) -> dict[str, Any] | None:
    """The segmented operations: torch's ways are a bmm over equal segments and _grouped_mm."""
    calls = min(CALLS, MAX_WEIGHTS // (count * width * rank * 2))
    if calls < 3:
        return None
    d_in, d_out = (width, rank) if shrink else (rank, width)
    work = Sgmv(d_in, d_out, count, length, shrink, calls)
    ours = time_graph(floors, work.run, work.calls, replays=REPLAYS)
    rivals = {"bmm": time_graph(floors, work.bmm(), work.calls, replays=REPLAYS)}
    if width % 8 == 0 and rank % 8 == 0:
        rivals["_grouped_mm, add_"] = time_graph(floors, work.grouped_mm(), work.calls, replays=REPLAYS)
    return {
        "group": "grid",
        "work": sgmv_name(width, rank, count, length, shrink),
        "unit": "us",
        "h": width,
        "r": rank,
        "rows": count * length,
        "popularity": f"{count} segments",
        "ours": ours,
        "floor": None,
        "goal": min(rivals.values()) * (1.0 if rank <= 128 else 1 / 0.85),
        "rivals": rivals,
    }


def wanted(name: str, only: str) -> bool:
    """Whether the name has all words of one of the alternatives, which are separated by commas."""
    have = name.lower().split()
    return any(set(words.split()) <= set(have) for words in only.lower().split(","))


def rows(floors: FloorLibrary, seconds: float, only: str = "") -> list[dict[str, Any]]:
    start, found = time.monotonic(), []
    works = [work for name, work in points() if wanted(name, only)]
    for number, work in enumerate(works):
        if time.monotonic() - start > seconds:
            print(f"stopped after {seconds:.0f} s, {number} of {len(works)} points")
            break
        try:
            row = work(floors)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if row is not None:
            found.append(row)
    return found


def markdown(result: dict[str, Any]) -> str:
    """What share of the points is won, and every point that is lost by more than 3%."""
    found = result["rows"]
    ratios = sorted(row["goal"] / row["ours"] for row in found)
    lost = sorted((row for row in found if row["ours"] > 1.03 * row["goal"]), key=lambda row: row["goal"] / row["ours"])
    lines = [
        f"{result['device']}, {result['date'][:10]}, torch {result['versions']['torch']}: {len(found)} points "
        f"(h {WIDTHS[0]} to {WIDTHS[-1]}, r {RANKS[0]} to {RANKS[-1]}, {ROWS[0]} to {ROWS[-1]} rows).",
        "",
        f"Torch's best time over ours (above rank 128: over 0.85 of it): median {ratios[len(ratios) // 2]:.2f}, "
        f"least {ratios[0]:.2f}, most {ratios[-1]:.1f}. Lost by more than 3%: {len(lost)} points.",
        "",
        "| lost | ours, us | goal, us | best rival |",
        "|---|---:|---:|---|",
    ]
    for row in lost:
        rival = min(row["rivals"], key=row["rivals"].get)
        lines.append(f"| {row['work']} | {row['ours']:.2f} | {row['goal']:.2f} | {rival} |")
    return "\n".join(lines) + "\n"

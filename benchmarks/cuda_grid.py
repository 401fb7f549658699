"""The wide grid: many widths, ranks, row counts and popularities, ours against the best of torch's ways."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from cuda_harness import FloorLibrary, time_graph
from cuda_works import Bgmv, Sgmv, popularity

WIDTHS = (64, 576, 1024, 3424, 4096, 4099, 14336, 29568, 32768)
RANKS = (1, 4, 8, 13, 16, 32, 64, 128, 256, 512)
ROWS = (1, 8, 64, 256, 1024)
SEGMENTS = ((1, 64), (1, 1024), (8, 64), (64, 1), (16, 16))  # number, length
KINDS = ("identical", "uniform", "zipf", "distinct")
CALLS = 24  # of one graph: what matters is the ratio, in the same graph
MAX_WEIGHTS = 3 << 30  # bytes of all sets of one point


def points() -> Iterator[dict[str, Any]]:
    """Every width and rank with row counts in turn, so that a run that is cut short has seen a bit of everything."""
    for turn in range(len(ROWS) * len(KINDS)):
        for w, width in enumerate(WIDTHS):
            for r, rank in enumerate(RANKS):
                place = (turn + 3 * w + 7 * r) % (len(ROWS) * len(KINDS))
                rows, kind = ROWS[place % len(ROWS)], KINDS[place // len(ROWS)]
                if rows == 1 and kind != "identical":
                    continue
                if rank < width:
                    yield {"h": width, "r": rank, "rows": rows, "popularity": kind}


def measure(floors: FloorLibrary, point: dict[str, Any], shrink: bool) -> dict[str, Any] | None:
    h, r, rows = point["h"], point["r"], point["rows"]
    indices = popularity(point["popularity"], rows)
    adapters = int(indices.max()) + 1
    calls = min(CALLS, MAX_WEIGHTS // (adapters * h * r * 2))
    if calls < 3:
        return None
    work = Bgmv(h if shrink else r, r if shrink else h, indices, adapters, calls)
    ours = time_graph(floors, work.run, work.calls, replays=5)
    rivals = {"index_select + bmm": time_graph(floors, work.gather_bmm(), work.calls, replays=5)}
    if adapters == 1:
        rivals["matmul"] = time_graph(floors, work.matmul(), work.calls, replays=5)
    return {
        "group": "grid",
        "work": f"BGMV {'shrink' if shrink else 'expand'} h={h} r={r} rows={rows} {point['popularity']}",
        "unit": "us",
        **point,
        "ours": ours,
        "floor": None,
        "goal": min(rivals.values()) * (1.0 if r <= 128 else 1 / 0.85),
        "rivals": rivals,
    }


def rows(floors: FloorLibrary, seconds: float) -> list[dict[str, Any]]:
    start, found = time.monotonic(), []
    for point in points():
        if time.monotonic() - start > seconds:
            print(f"stopped after {seconds:.0f} s")
            break
        for shrink in (True, False):
            try:
                row = measure(floors, point, shrink)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if row is not None:
                found.append(row)
    found += list(segments(floors, start, seconds))
    return found


def segment_points() -> Iterator[tuple[int, int, int, int]]:
    """Width, rank, number of segments, their length: every width and rank with one after the other, like points()."""
    for turn in range(len(SEGMENTS)):
        for w, width in enumerate(WIDTHS):
            for r, rank in enumerate(RANKS):
                if rank < width:
                    yield width, rank, *SEGMENTS[(turn + 3 * w + 7 * r) % len(SEGMENTS)]


def segments(floors: FloorLibrary, start: float, seconds: float) -> Iterator[dict[str, Any]]:
    """The segmented operations: torch's ways are a bmm over equal segments and _grouped_mm."""
    for width, rank, count, length in segment_points():
        if time.monotonic() - start > 1.5 * seconds:
            print(f"stopped after {1.5 * seconds:.0f} s")
            return
        for shrink in (True, False):
            calls = min(CALLS, MAX_WEIGHTS // (count * width * rank * 2))
            if calls < 3:
                continue
            d_in, d_out = (width, rank) if shrink else (rank, width)
            work = Sgmv(d_in, d_out, count, length, shrink, calls)
            ours = time_graph(floors, work.run, work.calls, replays=5)
            rivals = {"bmm": time_graph(floors, work.bmm(), work.calls, replays=5)}
            if width % 8 == 0 and rank % 8 == 0:
                rivals["_grouped_mm, add_"] = time_graph(floors, work.grouped_mm(), work.calls, replays=5)
            yield {
                "group": "grid",
                "work": f"SGMV {'shrink' if shrink else 'expand'} h={width} r={rank} {count} x {length}",
                "unit": "us", "h": width, "r": rank, "rows": count * length,
                "popularity": f"{count} segments",
                "ours": ours, "floor": None,
                "goal": min(rivals.values()) * (1.0 if rank <= 128 else 1 / 0.85),
                "rivals": rivals,
            }  # fmt: skip


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

"""The benchmark's table (terminal and Markdown) and its plot."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

OURS, FLOOR = "#0b6e99", "#2a9d4a"
RIVALS = {  # color, marker
    "torch: index_select + bmm": ("#e07b39", "o"),
    "torch: loop of matmuls": ("#b5446e", "s"),
    "torch SDPA, contiguous K/V": ("#8a63b8", "D"),
    "torch SDPA with enable_gqa": ("#5c7cba", "v"),
    "torch SDPA, gathered from pages": ("#c2a300", "^"),
    "torch: indexed assignment": ("#e07b39", "P"),
    "torch: F.rms_norm": ("#777777", "X"),
    "torch: add_ + F.rms_norm": ("#777777", "X"),
    "PEFT mixed batch": ("#c0392b", "*"),
}
GREY = "#555555"
MIXED = "LoRA of a mixed batch"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def best_rival(row: dict[str, Any]) -> tuple[str, float] | None:
    return min(row["rivals"].items(), key=lambda item: item[1]) if row["rivals"] else None


def verdict(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return ""
    return {True: "met", False: "missed", None: "floor disturbed"}[row["met"]]


def percent_of_floor(row: dict[str, Any]) -> str:
    return f"{100 * row['share_of_floor']:.0f}%" if row.get("share_of_floor") else "–"


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(140, Console().width))
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == group]
        rivals = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
        table = Table(title=f"{group} (microseconds a call)", title_justify="left", title_style="bold")
        table.add_column("work", no_wrap=True)
        for column in ("ours", "±", "floor", "of floor", "goal", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for rival in rivals:
            table.add_column(rival, justify="right", style="dim")
        for row in rows:
            state = verdict(row)
            style = {"met": "[green]met[/]", "missed": "[bold red]missed[/]"}.get(state, state)
            table.add_row(
                row["work"],
                f"[bold]{number(row['ours'])}[/]",
                f"{100 * row['spread']:.0f}%",
                number(row["floor"]),
                percent_of_floor(row),
                number(row["goal"]),
                style,
                *(number(row["rivals"].get(rival)) for rival in rivals),
            )
        console.print(table)


def markdown(result: dict[str, Any]) -> str:
    floors = result["floors"]
    lines = [
        f"Measured on {result['device']}, {result['threads']} threads, {result['date'][:10]}, bfloat16, "
        f"instruction set `{result['isa']['name']}`: streaming read {floors['read']['gb_s']:.0f} GB/s, "
        f"{floors['peak']['gflop_s']:.0f} GFLOP/s ({floors['peak']['how']}). Times in microseconds.",
        "",
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == group]
        with_floor = any(row["floor"] is not None for row in rows)
        columns = [group, "ours", *(["floor", "of floor"] if with_floor else []), "goal", "rivals"]
        lines += ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 2) + "---|"]
        for row in rows:
            rivals = "; ".join(f"{name} {number(value)}" for name, value in row["rivals"].items())
            goal = f"{number(row['goal'])} ({verdict(row)})" if row["goal"] is not None else "–"
            floor = [number(row["floor"]), percent_of_floor(row)] if with_floor else []
            lines.append("| " + " | ".join([row["work"], f"**{number(row['ours'])}**", *floor, goal, rivals]) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(result: dict[str, Any], paths: list[Path]) -> None:
    """Left: how much of the machine each work reaches, ours and the rivals. Right: LoRA of a mixed batch, in time."""
    rows = [row for row in result["rows"] if row["floor"] is not None and row["group"] != MIXED]
    mixed = [row for row in result["rows"] if row["group"] == MIXED]
    plt.rcParams.update({"font.size": 9.5, "svg.fonttype": "path", "svg.hashsalt": "0"})
    # In inches: the texts beside and below the axes have their own places.
    width, height, bottom, top = 13.5, 0.31 * len(rows) + 3.4, 1.55, 0.6
    figure = plt.figure(figsize=(width, height), facecolor="white")
    left, right = (
        figure.add_axes((x / width, bottom / height, w / width, 1 - (bottom + top) / height))
        for x, w in ((3.05, 4.9), (9.6, 3.6))
    )
    used = plot_shares(left, rows)
    plot_mixed(right, mixed)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor="#222222")
        axes.tick_params(axis="x", color=GREY, labelcolor=GREY)
        axes.grid(axis="x", color="#e4e4e4", zorder=0)
        axes.set_axisbelow(True)
    handles = [
        Patch(color=OURS, label="punica_kernels"),
        Line2D([], [], color=FLOOR, linewidth=2, label="the machine's limit"),
        Line2D([], [], color="black", marker="|", linestyle="", markersize=11, markeredgewidth=2, label="goal"),
    ]
    for (color, marker), names in used.items():
        label = " / ".join(names)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", markersize=7, label=label))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.015, 0.03), ncols=5, frameon=False, fontsize=9)
    note = f"{result['device']}, {result['threads']} threads, {result['isa']['name']}, {result['date'][:10]}"
    figure.text(0.985, 0.015, note, fontsize=8, color=GREY, ha="right")
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def plot_shares(axes: Any, rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Returns the names of the rivals by color and marker."""
    used: dict[tuple[str, str], list[str]] = {}
    y, last, ticks = 0.0, None, []
    for row in rows:
        y += 1.0 if row["group"] == last else 1.6
        if row["group"] != last:
            axes.text(-0.61, y - 0.8, row["group"], transform=axes.get_yaxis_transform(), va="center",
                      fontweight="bold", color="#222222")  # fmt: skip
        last = row["group"]
        ticks.append(y)
        share = 100 * row["share_of_floor"]
        axes.barh(y, share, height=0.62, color=OURS, zorder=2)
        goal = None if row["goal"] is None else 100 * row["floor"] / row["goal"]
        beside = share if goal is None or not share <= goal < share + 25 else goal  # not across the mark of the goal
        axes.text(beside + 1.3, y, f"{share:.0f}%  {number(row['ours'])} µs", va="center", fontsize=8.5, zorder=7,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})  # fmt: skip
        for name, value in row["rivals"].items():
            style = RIVALS.get(name, ("#000000", "x"))
            if name not in used.setdefault(style, []):
                used[style].append(name)
            axes.plot(100 * row["floor"] / value, y, style[1], color=style[0], markersize=7, markeredgecolor="white",
                      markeredgewidth=0.7, zorder=4)  # fmt: skip
        if goal is not None:
            axes.plot([goal, goal], [y - 0.43, y + 0.43], color="black", linewidth=2, zorder=8)
    axes.axvline(100, color=FLOOR, linewidth=2, zorder=1)
    axes.set_yticks(ticks, [row["work"] for row in rows])
    axes.set_ylim(y + 0.6, 0.2)
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of streaming read bandwidth, or of the dot-product peak where that is less", color=GREY)
    axes.set_title("Share of the machine's limit (longer is better)", loc="left", fontweight="bold")
    return used


def plot_mixed(axes: Any, rows: list[dict[str, Any]]) -> None:
    y, ticks, labels = 0.0, [], []
    longest = max(value for row in rows for value in row["rivals"].values()) / 1e3
    for row in rows:
        y += 1.4
        axes.text(0, y - 0.85, row["work"], fontweight="bold", va="center", color="#222222")
        for name, value in {
            "punica_kernels": row["ours"],
            **row["rivals"],
            "the machine's limit": row["floor"],
        }.items():
            color = {"punica_kernels": OURS, "the machine's limit": FLOOR}.get(name) or RIVALS[name][0]
            axes.barh(y, value / 1e3, height=0.66, color=color, zorder=2)
            times = f"  ({value / row['ours']:.1f} x ours)" if name in row["rivals"] else ""
            axes.text(value / 1e3 + 0.015 * longest, y, f"{value / 1e3:.1f} ms{times}", va="center", fontsize=8.5)
            ticks.append(y)
            labels.append(name)
            y += 1.0
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 0.4, 0)
    axes.set_xlim(0, 1.45 * longest)
    axes.set_xlabel("ms for the seven modules of a Llama-3-8B layer,\neight adapters of ranks 8 to 64", color=GREY)
    axes.set_title("LoRA of a mixed batch (shorter is better)", loc="left", fontweight="bold")

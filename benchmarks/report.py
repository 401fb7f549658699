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
GREY = "#666666"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def best_rival(row: dict[str, Any]) -> tuple[str, float] | None:
    return min(row["rivals"].items(), key=lambda item: item[1]) if row["rivals"] else None


def verdict(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return ""
    return "met" if row["met"] else "missed"


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
            style = {"met": "[green]met[/]", "missed": "[bold red]missed[/]"}.get(state, "")
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
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5, "svg.fonttype": "path", "svg.hashsalt": "0"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.36 * len(rows) + 2.3), width_ratios=(1.75, 1), layout="constrained"
    )

    positions, position, last = [], 0.0, None
    for row in rows:
        position += 1.0 if row["group"] == last else 1.7
        if row["group"] != last:
            left.text(-0.005, position - 0.85, row["group"], transform=left.get_yaxis_transform(), ha="right",
                      va="center", fontweight="bold", color="#222222")  # fmt: skip
        last = row["group"]
        positions.append(position)
    used: dict[str, tuple[str, str]] = {}
    for row, y in zip(rows, positions, strict=True):
        share = 100 * row["share_of_floor"]
        left.barh(y, share, height=0.62, color=OURS, zorder=2)
        left.text(share - 1, y, f"{number(row['ours'])} µs", ha="right", va="center", color="white", fontsize=8.5,
                  zorder=5)  # fmt: skip
        for name, value in row["rivals"].items():
            color, marker = used.setdefault(name, RIVALS.get(name, ("#000000", "x")))
            left.plot(100 * row["floor"] / value, y, marker, color=color, markersize=7, markeredgecolor="white",
                      markeredgewidth=0.7, zorder=4)  # fmt: skip
        if row["goal"] is not None:
            goal = 100 * row["floor"] / row["goal"]
            left.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2, zorder=6)
    left.axvline(100, color=FLOOR, linewidth=2, zorder=1)
    left.set_yticks(positions, [row["work"] for row in rows])
    left.set_ylim(positions[-1] + 0.8, positions[0] - 1.5)
    left.set_xlim(0, max(104, *(102 * row["share_of_floor"] for row in rows)))
    left.set_xlabel("rate, in % of what the machine can do (streaming read bandwidth or dot-product peak)")
    left.set_title("Share of the machine's limit, bfloat16 (longer is better)", loc="left", fontweight="bold")
    left.grid(axis="x", color="#dddddd", zorder=0)
    handles = [
        Patch(color=OURS, label="punica_kernels"),
        Line2D([], [], color=FLOOR, linewidth=2, label="the machine's limit"),
        Line2D([], [], color="black", linewidth=2, linestyle="", marker="|", markersize=11, markeredgewidth=2,
               label="goal"),
        *(Line2D([], [], color=color, marker=marker, linestyle="", markersize=7, label=name)
          for name, (color, marker) in unique_styles(used).items()),
    ]  # fmt: skip
    left.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.3, -0.075), ncols=4, frameon=False, fontsize=8.5)

    y, ticks, labels = 0.0, [], []
    longest = max(value for row in mixed for value in row["rivals"].values()) / 1e3
    for row in mixed:
        right.text(0, y - 0.75, row["work"], fontweight="bold", va="center", color="#222222")
        bars = {"punica_kernels": row["ours"], **row["rivals"], "the machine's limit": row["floor"]}
        for name, value in bars.items():
            color = OURS if name == "punica_kernels" else FLOOR if "limit" in name else RIVALS[name][0]
            right.barh(y, value / 1e3, height=0.7, color=color, zorder=2)
            times = f"  ({value / row['ours']:.1f}x ours)" if name in row["rivals"] else ""
            right.text(value / 1e3 + 0.012 * longest, y, f"{value / 1e3:.2f} ms{times}", va="center", fontsize=8.5)
            ticks.append(y)
            labels.append(name)
            y += 1.0
        y += 1.3
    right.set_yticks(ticks, labels)
    right.set_ylim(y - 1.6, -1.5)
    right.set_xlim(0, 1.34 * longest)
    right.set_xlabel("milliseconds for the LoRA of one layer, all seven modules")
    right.set_title("Eight adapters, ranks 8 to 64, in one batch (shorter is better)", loc="left", fontweight="bold")
    right.grid(axis="x", color="#dddddd", zorder=0)

    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(colors=GREY, labelcolor="#222222")
    note = f"{result['device']}, {result['threads']} threads, {result['isa']['name']}, {result['date'][:10]}"
    figure.supxlabel(note, fontsize=8, color=GREY, x=0.995, ha="right")
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def unique_styles(used: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """One legend entry a style: rivals that share one are named together."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, style in used.items():
        names.setdefault(style, []).append(name)
    return {" / ".join(group): style for style, group in names.items()}


MIXED = "LoRA of a mixed batch"

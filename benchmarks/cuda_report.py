"""The CUDA benchmark's lines, tables and plot."""

from pathlib import Path
from typing import Any


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def verdict(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return ""
    if not row["met"]:
        return "missed"
    given = row.get("given_goal")
    return "met" if given is None or row["ours"] <= given else f"met; given {number(given)}"


def line(row: dict[str, Any]) -> str:
    rivals = ", ".join(f"{name} {number(value)}" for name, value in row["rivals"].items())
    rate = f", {row['terabytes_per_second']:.2f} TB/s" if row.get("terabytes_per_second") else ""
    again = f" / {number(row['again'])}" if "again" in row else ""
    return (
        f"{row['group']}: {row['work']}: {number(row['ours'])}{again} us (floor {number(row['floor'])}, goal "
        f"{number(row['goal'])} {verdict(row)}{rate}); {rivals}"
    )


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"Measured on {result['device']} (path {result['arch']}), {result['date'][:10]}, torch "
        f"{result['versions']['torch']}, bfloat16. Microseconds a call; `{result['command']}`.",
        "",
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rated = "TFLOP/s" if group == "Prefill attention" else "TB/s"
        lines += [f"| {group} | ours | {rated} | floor | goal | others |", "|---|---:|---:|---:|---:|---|"]
        for row in (row for row in result["rows"] if row["group"] == group):
            rivals = "; ".join(f"{name} {number(value)}" for name, value in row["rivals"].items())
            goal = f"{number(row['goal'])} ({verdict(row)})" if row["goal"] is not None else "–"
            rate = number(row.get("teraflop_per_second" if rated == "TFLOP/s" else "terabytes_per_second"))
            cells = [row["work"], f"**{number(row['ours'])}**", rate, number(row["floor"]), goal, rivals]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(result: dict[str, Any], paths: list[Path]) -> None:
    """One bar a work: the floor's time over ours, with the rivals' marks on the same scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Without what has no floor of its own: the host's side, and add_lora but for its goals.
    rows = [
        row
        for row in result["rows"]
        if row["group"] != "Call overhead" and not (row["group"].startswith("add_lora") and row["goal"] is None)
    ]
    colors = {"ours, two launches": "#222222",
              "torch: index_select + bmm": "#e07b39", "torch: matmul (one adapter)": "#b5446e",
              "torch: bmm over equal segments": "#8a63b8", "torch: _grouped_mm, add_": "#c2a300",
              "torch: F.rms_norm": "#777777", "torch: cuDNN, contiguous": "#4c9f38",
              "torch: FlashAttention-2, contiguous": "#d1495b", "vLLM": "#3b1f8f", "vLLM, batch-invariant": "#b79ad6",
              "SGLang csgmv": "#17becf", "FlashInfer, CUDA cores": "#e8b04a", "FlashInfer, tensor cores": "#c2571a",
              "FlashInfer, fa3": "#1f9e89"}  # fmt: skip
    figure, axes = plt.subplots(figsize=(11, 0.34 * len(rows) + 1.6), layout="constrained")
    seen: set[str] = set()
    for y, row in enumerate(rows):
        share = 100 * row["floor"] / row["ours"]
        axes.barh(y, share, height=0.66, color="#0b6e99", label=None if "ours" in seen else "punica_kernels")
        seen.add("ours")
        axes.text(max(share, 100) + 1.5, y, f"{share:.0f}%  {number(row['ours'])} µs", va="center", fontsize=8)
        for name, value in row["rivals"].items():
            if name not in colors:
                continue
            axes.plot(100 * row["floor"] / value, y, "o", color=colors[name], markeredgecolor="white", zorder=4,
                      label=None if name in seen else name)  # fmt: skip
            seen.add(name)
        if row["goal"] is not None:
            goal = 100 * row["floor"] / row["goal"]
            axes.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2,
                      label=None if "goal" in seen else "goal")  # fmt: skip
            seen.add("goal")
    axes.axvline(100, color="#2a9d4a", linewidth=2, label="floor")
    axes.set_yticks(range(len(rows)), [f"{row['group']}: {row['work']}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(118, 1.02 * max(100 * row["floor"] / row["ours"] for row in rows)))
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the rate of a kernel that only moves the same bytes; prefill: of a large matrix product")
    axes.set_title(f"{result['device']}: share of the practical floor (longer is better)", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.045), ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, paths)
    plt.close(figure)


ADD_LORA = {"ours, two launches": ("s", "#222222"), "vLLM": ("o", "#7a3db8"), "vLLM, batch-invariant": ("D", "#b79ad6"),
            "SGLang csgmv": ("^", "#e07b39")}  # fmt: skip


def plot_add_lora(result: dict[str, Any], paths: list[Path]) -> None:
    """The times of one launch and of the rivals' two, in floors, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["group"] == "add_lora alone"]
    chained = {row["work"]: row["ours"] for row in result["rows"] if row["group"] == "add_lora chained"}
    figure, axes = plt.subplots(figsize=(11, 0.46 * len(rows) + 1.8), layout="constrained")
    seen: set[str] = set()

    def once(name: str) -> str | None:
        label = None if name in seen else name
        seen.add(name)
        return label

    for y, row in enumerate(rows):
        floor = row["floor"]
        axes.barh(y, row["ours"] / floor, height=0.62, color="#0b6e99", label=once("add_lora, one launch, alone"))
        if row["work"] in chained:
            axes.plot(chained[row["work"]] / floor, y, "|", color="#8fe3ff", markersize=15, markeredgewidth=2.5,
                      zorder=3, label=once("chained under early_reads (the light line)"))  # fmt: skip
        for name, (marker, color) in ADD_LORA.items():
            if name in row["rivals"]:
                axes.plot(row["rivals"][name] / floor, y, marker, color=color, markeredgecolor="white", markersize=8,
                          zorder=4, label=once(name))  # fmt: skip
        if row["goal"] is not None:
            goal = row["goal"] / floor
            axes.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2, label=once("goal"))
        axes.text(0.7, y, f"{number(row['ours'])} µs", va="center", fontsize=8, color="white")
    axes.axvline(1, color="#2a9d4a", linewidth=2, label="floor")
    axes.set_xscale("log")
    ticks = (1, 1.5, 2, 3, 5, 10, 20)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    furthest = max(value / row["floor"] for row in rows for value in (row["ours"], *row["rivals"].values()))
    axes.set_xlim(0.68, 1.5 * furthest)
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time in floors: 1.5 µs, reads at 4.5 TB/s, y read and written at 4.13 TB/s (shorter is better)")
    axes.set_title(
        f"{result['device']}: the whole LoRA of a projection, 4096 wide but where widths are given", loc="left"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, paths)
    plt.close(figure)


def _save(figure: Any, paths: list[Path]) -> None:
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)

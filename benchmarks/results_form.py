"""The form of every JSON file in benchmarks/results, and the only way in which one is written.

    {"command", "device", "date", "versions",
     "rows": [{"work", "unit", "ours", "floor", "goal", "rivals": {name: figure}}]}

A floor or goal of null: there is none. A file may say more, for the whole and for each row.
"""

import datetime
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import punica_kernels as pk

TOP = ("command", "device", "date", "versions", "rows")
ROW = ("work", "unit", "ours", "floor", "goal", "rivals")


def is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def problems(result: Any) -> list[str]:
    """What is wrong with the contents of such a file; nothing: an empty list."""
    if not isinstance(result, dict):
        return ["it is not an object"]
    wrong = [f"{key} is missing" for key in TOP if key not in result]
    if wrong:
        return wrong
    wrong += [
        f"{key} must be a text, got {result[key]!r}"
        for key in ("command", "device", "date")
        if not isinstance(result[key], str) or not result[key].strip()
    ]
    try:
        if datetime.datetime.fromisoformat(result["date"]).tzinfo is None:
            wrong.append(f"date must have a time zone, got {result['date']!r}")
    except (TypeError, ValueError):
        wrong.append(f"date must be ISO 8601, got {result['date']!r}")
    versions = result["versions"]
    if not isinstance(versions, dict) or not {"python", "punica-kernels", "torch"} <= set(versions):
        wrong.append("versions must name python, punica-kernels and torch at least")
    elif not all(isinstance(value, str) and value for value in versions.values()):
        wrong.append("versions must be texts")
    rows = result["rows"]
    if not isinstance(rows, list) or not rows:
        return [*wrong, "rows must be a list that is not empty"]
    for i, row in enumerate(rows):
        wrong += [f"rows[{i}]: {problem}" for problem in row_problems(row)]
    names = Counter((row.get("group"), row.get("work"), row.get("unit")) for row in rows if isinstance(row, dict))
    return wrong + [f"two rows are called {name}" for name, count in names.items() if count > 1]


def row_problems(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return ["it is not an object"]
    wrong = [f"{key} is missing" for key in ROW if key not in row]
    if wrong:
        return wrong
    wrong += [
        f"{key} must be a text, got {row[key]!r}"
        for key in ("work", "unit")
        if not isinstance(row[key], str) or not row[key].strip()
    ]
    if not is_figure(row["ours"]):
        wrong.append(f"ours must be a figure, got {row['ours']!r}")
    wrong += [
        f"{key} must be a figure or null, got {row[key]!r}"
        for key in ("floor", "goal")
        if row[key] is not None and not is_figure(row[key])
    ]
    rivals = row["rivals"]
    if not isinstance(rivals, dict):
        return [*wrong, f"rivals must be an object, got {rivals!r}"]
    return wrong + [f"rivals[{name!r}] must be a figure" for name, value in rivals.items() if not is_figure(value)]


def head(command: str, device: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """What every file begins with, of now. `versions` of what was measured beside Python and ourselves."""
    return {
        "command": command,
        "device": device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "punica-kernels": pk.__version__, **versions},
    }


def given(words: Sequence[str]) -> list[str]:
    """The arguments, without the folder that results are written to."""
    at = words.index("--output") if "--output" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the file, and raises where its form is wrong: the figures are there all the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if wrong := problems(result):
        raise ValueError(f"{path.name}: " + "; ".join(wrong))

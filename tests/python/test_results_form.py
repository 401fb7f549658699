"""benchmarks/results: every JSON file has the documented form, no row of a goals table is left out, and the Markdown
beside it says the same."""

import ast
import copy
import importlib
import json
import math
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
FILES = sorted(RESULTS.glob("*.json"))

pytestmark = pytest.mark.skipif(not FILES, reason="the results are not beside the tests")


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def form():
    return importlib.import_module("results_form")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_form(path):
    result = json.loads(path.read_text())
    assert form().problems(result) == []
    assert result["command"].startswith(("python ", "make "))
    assert (BENCHMARKS.parent / result["command"].split()[1]).exists() or result["command"].startswith("make ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_met_is_what_the_figures_say(path):
    for row in json.loads(path.read_text())["rows"]:
        if row.get("met") is not None:
            assert row["met"] is (row["ours"] <= row["goal"]), row["work"]


GOALS = {  # every line of the tables of goals on CUDA, met or not
    "BGMV alone": [
        f"{direction} {shape}"
        for shape in (
            "B=1, h=4096, r=16", "B=64, 64 adapters, h=4096, r=16", "B=64, 1 adapter, h=4096, r=16",
            "B=64, 64 adapters, h=4096, r=64", "B=256, 256 adapters, h=4096, r=16", "B=64, 64 adapters, h=14336, r=16",
        )
        for direction in ("shrink", "expand")
    ],
    "SGMV": [
        f"{direction} {shape}"
        for shape in (
            "1 x 4096, h=4096, r=16", "8 x 512, h=4096, r=16", "64 x 64, h=4096, r=16", "8 x 512, h=4096, r=64",
            "8 x 512, h=14336, r=16",
        )
        for direction in ("shrink", "expand")
    ],
    "RMS norm": ["16384 x 4096", "8192 x 8192", "1 x 4096", "1 x 4096, chained", "256 x 4096", "256 x 4096, chained"],
    "Decode attention": [
        "B=1, ctx 4096, 32/8", "B=1, ctx 32768, 32/8", "B=32, ctx 1024, 32/8", "B=64, ctx 2048, 32/8",
        "B=128, ctx 2048, 32/8", "B=256, ctx 1024, 64/8", "Zipf lengths, B=64, 32/8",
    ],
    "Prefill attention": [
        *(f"{shape}, D={d}" for d in (128, 64) for shape in ("16 x 1024", "4 x 4096", "1 x 16384")),
        *(f"{q} queries, 32768 keys, D=128" for q in (512, 4, 16)),
    ],
    "KV writes": ["init_kv 16 x 1024", "append_kv B=256", "append_kv B=256, chained"],
    "Call overhead": ["dispatch_bgmv", "rms_norm", "batch_decode", "batch_prefill"],
}  # fmt: skip
GOALS["BGMV chained"] = [
    f"shrink and expand, mean, {work.removeprefix('shrink ')}"
    for work in GOALS["BGMV alone"]
    if work.startswith("shrink")
]


def test_no_goal_is_left_out():
    rows = json.loads((RESULTS / "cuda.json").read_text())["rows"]
    with_goals = {(row["group"], row["work"]) for row in rows if row["goal"] is not None}
    wanted = {(group, work) for group, works in GOALS.items() for work in works}
    assert not wanted - with_goals


def test_no_goal_of_a_step_is_left_out():
    rows = json.loads((RESULTS / "step_cuda.json").read_text())["rows"]
    with_goals = {row["work"] for row in rows if row["group"] == "LoRA adds" and row["goal"] is not None}
    assert with_goals == {f"64 rows, {adapters}" for adapters in ("64 adapters", "8 adapters", "1 adapter")}


@pytest.mark.parametrize(
    ("name", "module"),
    [("cpu", "report"), ("cuda", "cuda_report"), ("cuda_grid", "cuda_grid"), ("step_cuda", "bench_step")],
    ids=lambda text: text,
)
def test_the_markdown_is_made_of_the_figures(name, module):
    if module == "report":
        pytest.importorskip("matplotlib")
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert importlib.import_module(module).markdown(result) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("program", ["bench_cpu", "bench_cuda", "bench_engine", "bench_step", "compare_devices"])
def test_the_programs_write_through_the_form(program):
    """So that a run says at once what is wrong with its file."""
    calls = [node for node in ast.walk(ast.parse((BENCHMARKS / f"{program}.py").read_text())) if is_call(node)]
    names = [ast.unparse(node.func) for node in calls]
    assert {"results_form.head", "results_form.write"} <= set(names)
    assert "json.dumps" not in names and "json.dump" not in names


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call)


GOOD = {
    "command": "python benchmarks/bench_cpu.py", "device": "a machine", "date": "2026-01-31T12:00:00+00:00",
    "versions": {"python": "3.11.7", "punica-kernels": "0.1.0", "torch": "2.13.0"},
    "rows": [{"work": "a", "unit": "us", "ours": 2.0, "floor": 1.0, "goal": None, "rivals": {"torch": 3.0}}],
}  # fmt: skip


def broken(change):
    result = copy.deepcopy(GOOD)
    change(result)
    return result


def test_the_head_is_of_the_form():
    head = form().head("python benchmarks/bench_cpu.py", "a machine", {"torch": "2.13.0"})
    assert form().problems({**head, "rows": GOOD["rows"]}) == []
    assert form().given(["--rounds", "3", "--output", "a folder", "--only", "x"]) == ["--rounds", "3", "--only", "x"]
    assert form().given(["--rounds", "3"]) == ["--rounds", "3"]


def test_what_is_refused(tmp_path):
    assert form().problems(GOOD) == []
    changes = [
        lambda r: r.pop("device"), lambda r: r.update(command=" "), lambda r: r.update(date="31.1.2026"),
        lambda r: r.update(date="2026-01-31T12:00:00"), lambda r: r["versions"].pop("torch"),
        lambda r: r["versions"].update(torch=2), lambda r: r.update(rows=[]), lambda r: r["rows"][0].pop("goal"),
        lambda r: r["rows"][0].update(ours=None), lambda r: r["rows"][0].update(ours="2"),
        lambda r: r["rows"][0].update(ours=math.nan), lambda r: r["rows"][0].update(floor=-1.0),
        lambda r: r["rows"][0].update(goal=True), lambda r: r["rows"][0].update(rivals=[3.0]),
        lambda r: r["rows"][0]["rivals"].update(torch=None), lambda r: r["rows"].append(r["rows"][0]),
        lambda r: r["rows"].append(3),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        assert form().problems(broken(change)), i
        with pytest.raises(ValueError, match=r"wrong\.json: "):
            form().write(tmp_path / "wrong.json", broken(change))
    form().write(tmp_path / "more" / "right.json", GOOD)
    assert json.loads((tmp_path / "more" / "right.json").read_text()) == GOOD

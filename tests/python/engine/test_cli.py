"""The command `punica generate`: its output, and one clear line with exit code 2 for each mistake."""

import io
import json
import re
import subprocess
import sys

import pytest
from punica_kernels import cli


@pytest.fixture(scope="module")
def files(make_model, make_adapter, tmp_path_factory):
    model = make_model()
    other = make_model(hidden_size=64, num_attention_heads=8)
    folder = tmp_path_factory.mktemp("cli")
    (folder / "broken").mkdir()
    (folder / "broken.json").write_text("[")
    (folder / "text.txt").write_text("no model")
    (folder / "prompts.json").write_text(
        json.dumps(
            [
                {"adapter": "one", "prompt": "hello"},
                {"adapter": None, "prompt": "good day", "max_tokens": 3},
                {"prompt": "sampled", "temperature": 1.0, "seed": 7},
            ]
        )
    )
    return {
        "model": model,
        "one": make_adapter(model, r=4, target_modules=["q_proj", "v_proj"]),
        "other": make_adapter(other, r=4, target_modules=["q_proj"]),
        "folder": folder,
    }


def run(capsys, files, *arguments):
    """Exit code, stdout, stderr of `punica generate`; {model}, {one}, ... stand for paths."""
    try:
        code = cli.main(["generate", *(str(a).format(**files) for a in arguments)])
    except SystemExit as stop:
        code = stop.code
    return (code, *capsys.readouterr())


GOOD = ("--model", "{model}", "--adapter", "one={one}", "--dtype", "float32", "--max-tokens", "6")
MISTAKES = {
    "no model given": (["--prompt", "hi"], "--model"),
    "missing model": (["--model", "{folder}/nothing", "--prompt", "hi"], "nothing: no such file or folder"),
    "not a model": (
        ["--model", "{folder}/text.txt", "--prompt", "hi"],
        "expected a Hugging Face folder or a .gguf file",
    ),
    "empty folder": (["--model", "{folder}/broken", "--prompt", "hi"], "config.json: No such file"),
    "nothing to do": ([*GOOD], "give --prompt, --prompts or --interactive"),
    "missing adapter": ([*GOOD, "--adapter", "two={folder}/nothing", "--prompt", "hi"], "adapter two .*no such folder"),
    "broken adapter": (
        [*GOOD, "--adapter", "two={folder}/broken", "--prompt", "hi"],
        "adapter_config.json: No such file",
    ),
    "adapter of another model": ([*GOOD, "--adapter", "two={other}", "--prompt", "hi"], "adapter two .*another model"),
    "same name twice": ([*GOOD, "--adapter", "one={one}", "--prompt", "hi"], "same name"),
    "adapter without path": ([*GOOD, "--adapter", "one", "--prompt", "hi"], "expected NAME=PATH"),
    "unknown adapter": ([*GOOD, "--prompt", "@two hi"], "asks for adapter 'two'"),
    "adapter without text": ([*GOOD, "--prompt", "@one"], "expected '@NAME TEXT'"),
    "missing prompts": ([*GOOD, "--prompts", "{folder}/nothing.json"], "nothing.json: No such file"),
    "broken prompts": ([*GOOD, "--prompts", "{folder}/broken.json"], "not valid JSON"),
    "empty prompt": ([*GOOD, "--prompt", ""], "the prompt is empty"),
    "long prompt": ([*GOOD, "--prompt", "x" * 200], "the prompt has 200 tokens, the context holds 128"),
    "small pool": (
        [*GOOD, "--num-pages", "1", "--page-size", "4", "--prompt", "hello"],
        "needs 3 pages, the pool has 1",
    ),
    "no pool": ([*GOOD, "--num-pages", "0", "--prompt", "hi"], "no page"),
    "JSON and lines": ([*GOOD, "--interactive", "--json"], "--json: not with --interactive"),
    "no batch": ([*GOOD, "--max-batch", "0", "--prompt", "hi"], "--max-batch"),
    "page size": ([*GOOD, "--page-size", "0", "--prompt", "hi"], "page_size"),
    "no tokens": ([*GOOD, "--max-tokens", "0", "--prompt", "hi"], "max_tokens must be >= 1"),
    "temperature": ([*GOOD, "--temperature", "-1", "--prompt", "hi"], "temperature"),
    "no number": ([*GOOD, "--top-k", "many", "--prompt", "hi"], "--top-k"),
    "no template": ([*GOOD, "--chat", "--prompt", "hi"], "no chat template"),
    "two styles": ([*GOOD, "--chat", "--raw", "--prompt", "hi"], "--raw: not allowed with argument --chat"),
    "device": ([*GOOD, "--device", "abacus", "--prompt", "hi"], "--device abacus"),
    "dtype": ([*GOOD, "--dtype", "int8", "--prompt", "hi"], "--dtype"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, capsys, files):
    arguments, message = MISTAKES[name]
    code, out, err = run(capsys, files, *arguments)
    assert code == 2
    assert out == ""
    assert re.fullmatch(rf"punica generate: error: .*{message}.*\n", err), err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a list"),
        (["hi"], "entry 0 is not an object"),
        ([{"adapter": "one"}], "entry 0 is not an object with a prompt"),
        ([{"prompt": "hi", "speed": 3}], "unknown key 'speed'"),
        ([{"prompt": "hi", "seed": "x"}], 'seed = "x" has the wrong type'),
        ([{"prompt": "hi", "max_tokens": 1.5}], "max_tokens = 1.5 has the wrong type"),
        ([{"prompt": "hi", "stop": "x"}], 'stop = "x" has the wrong type'),
        ([{"prompt": "hi", "adapter": 3}], "adapter must be a name"),
    ],
)
def test_prompts_file(content, message, capsys, files, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    code, _, err = run(capsys, files, *GOOD, "--prompts", path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_no_traceback_from_a_shell(files):
    command = [sys.executable, "-m", "punica_kernels.cli", "generate", "--model", "nothing", "--prompt", "hi"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "punica generate: error: nothing: no such file or folder\n"


def test_json(capsys, files):
    code, out, _ = run(capsys, files, *GOOD, "--prompts", "{folder}/prompts.json", "--prompt", "@one again", "--json")
    result = json.loads(out)
    assert code == 0
    assert [r["adapter"] for r in result["requests"]] == ["one", "one", None, None]
    assert [r["prompt"] for r in result["requests"]] == ["again", "hello", "good day", "sampled"]
    assert [r["prompt_tokens"] for r in result["requests"]] == [5, 5, 8, 7]
    for request in result["requests"]:
        assert len(request["tokens"]) <= (3 if request["prompt"] == "good day" else 6)
        assert request["finish_reason"] == ("stop" if request["tokens"][-1] == 299 else "length")
    timings = result["timings"]
    assert timings["generated_tokens"] == sum(len(r["tokens"]) for r in result["requests"])
    assert timings["prompt_tokens"] == 25
    assert 0 < timings["lora_share"] < 1
    assert timings["tokens_per_second"] > 0


def test_seed_and_stop(capsys, files):
    def texts(*arguments):
        _, out, _ = run(capsys, files, *GOOD, "--prompt", "hello", "--json", "--temperature", "2", *arguments)
        return json.loads(out)["requests"][0]["text"]

    first = texts("--seed", "1")
    assert first == texts("--seed", "1")
    assert first != texts("--seed", "2")
    assert texts("--seed", "1", "--stop", first[2:4]) == first[: first.index(first[2:4])]


def test_lines(capsys, files):
    code, out, _ = run(capsys, files, *GOOD, "--prompts", "{folder}/prompts.json")
    *lines, last, _ = out.split("\n")  # a random model also writes other line ends
    assert code == 0
    assert all(re.match(r"\[(0 one|1 base|2 base)\] ", line) for line in lines)
    assert {line[1] for line in lines} == {"0", "1", "2"}
    assert re.match(r"3 requests, 20 prompt tokens, \d+ generated in .* tokens/s .* LoRA [\d.]+ % of the time", last)


def interactive(capsys, monkeypatch, files, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(line.format(**files) for line in lines)))
    return run(capsys, files, *GOOD[:2], *GOOD[4:], "--interactive", *arguments)


def test_interactive(capsys, files, monkeypatch):
    """Adapters come and go between requests; a mistake is one line, and the next line is answered all the same."""
    lines = [
        "/adapters", "@one hello", "/add one={one}", "/adapters", "@one hello", "hello", "", "/add one={one}",
        "/add two={folder}/broken", "/remove two", "/remove one", "@one hello", "/remove", "/shout", "//hello",
        "/add one={one}", "@one hello", "/quit", "never answered",
    ]  # fmt: skip
    code, out, err = interactive(capsys, monkeypatch, files, lines)
    assert (code, err) == (0, "")
    texts = {}
    for adapter in (None, "one"):
        _, result, _ = run(capsys, files, *GOOD, "--prompt", f"@{adapter} hello" if adapter else "hello", "--json")
        texts[adapter] = json.loads(result)["requests"][0]["text"]
    assert texts[None] != texts["one"]
    expected = [
        "no adapters", "error: no adapter named 'one' (none loaded)", "adapter one is loaded", "one", texts["one"],
        texts[None], "error: adapter one is given twice", r"error: .*broken/adapter_config.json: No such file.*",
        r"error: no adapter named 'two' \(one loaded\)", "adapter one is gone",
        r"error: no adapter named 'one' \(none loaded\)", "error: expected /remove NAME",
        r"error: unknown command '/shout'; .*", ".*", "adapter one is loaded", texts["one"],
        r"4 requests, 21 prompt tokens, .*",
    ]  # fmt: skip
    expected = [e if "*" in e or "\\" in e else re.escape(e) for e in expected]
    assert re.fullmatch("\n".join(expected) + "\n", out, re.DOTALL), out


def test_interactive_after_prompts(capsys, files, monkeypatch):
    code, out, _ = interactive(capsys, monkeypatch, files, ["hello"], "--prompt", "first")
    assert code == 0
    assert re.search(r"^\[0 base\] ", out, re.MULTILINE)
    assert "2 requests, 10 prompt tokens" in out
    code, out, _ = interactive(capsys, monkeypatch, files, [])
    assert (code, out) == (0, "")


def test_interactive_after_a_failure(capsys, files, monkeypatch):
    """What has failed is gone: it is not tried again with the next prompt, and its pages are free."""
    from punica_kernels.engine import Engine, EngineError

    step, seen = Engine.step, []

    def failing_step(engine):
        seen.append((len(engine.requests), len(engine.cache.free)))
        if len(seen) == 1:
            engine._admit()
            raise EngineError("no luck")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing_step)
    code, out, _ = interactive(capsys, monkeypatch, files, ["bad luck", "hello", "hello"])
    assert code == 0
    *texts, last = out.strip().split("\n")
    assert "error: no luck" in out and texts[-1] == texts[-2] != ""
    assert last.startswith("3 requests, ")
    assert {requests for requests, _ in seen} == {1}
    assert seen[0][1] == seen[1][1]  # all pages are free again


def test_panes(files):
    from punica_kernels.engine import SamplingParams, load_engine
    from rich.console import Console

    engine = load_engine(files["model"], {"one": files["one"]})
    for i in range(9):  # more than the screen holds
        engine.add([40 + i] * 5, "one" if i % 2 else None, SamplingParams(max_tokens=5))
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20)
    cli.show_panes(engine, console)
    final = console.file.getvalue().split("\x1b[?25h")[-1]  # after the live display has given the cursor back
    for i in range(9):
        assert f"{i} {'one' if i % 2 else 'base'}" in final

"""What the engine does on CUDA alone: decoding under CUDA graphs. The other tests of the engine run there too."""

import json

import punica_kernels as pk
import pytest
import torch
from punica_kernels import cli
from punica_kernels.engine import SamplingParams, load_engine

from .test_engine import NAMES, served, tokens  # noqa: F401  (served is a fixture)

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and pk.has_cuda()), reason="no CUDA device")


def generated(engine, count, max_tokens):
    engine.stop_tokens = frozenset()
    prompts = tokens(*range(2, 2 + count))
    requests = [
        engine.add(prompt, NAMES[i % len(NAMES)], SamplingParams(max_tokens=max_tokens + i % 5))
        for i, prompt in enumerate(prompts)
    ]
    for _ in engine.run():
        pass
    return [request.tokens for request in requests]


@pytest.mark.parametrize("count", [1, 5, 8, 11])
def test_graphs_generate_what_single_launches_do(served, fresh, count):  # noqa: F811
    # float32: torch may choose another product for a padded batch, which rounds differently in 16 bits.
    engine = load_engine(*served, dtype=torch.float32, page_size=4, device="cuda")
    graphs, single = fresh(engine), fresh(engine, cuda_graphs=False)
    assert generated(graphs, count, 12) == generated(single, count, 12)
    # Requests leave at different times: more than one size was needed, each captured once.
    assert set(graphs.graphs.captured) <= {1, 2, 4, 8, 16}
    assert max(graphs.graphs.captured) >= count
    assert single.graphs is None


def test_graphs_follow_new_adapters(served):  # noqa: F811
    folder, adapters = served
    engine = load_engine(folder, {"all": adapters["all"]}, dtype=torch.float32, page_size=4, device="cuda")
    engine.stop_tokens = frozenset()
    prompt = tokens(9)[0]

    def ask(name):
        request = engine.add(prompt, name, SamplingParams(max_tokens=10))
        for _ in engine.run():
            pass
        return request.tokens

    before = ask("all"), ask(None)
    engine.add_adapter("patterns", adapters["patterns"])
    after = ask("all"), ask(None)
    with_new = ask("patterns")
    assert after == before
    assert with_new != before[1]
    loaded = load_engine(*served, dtype=torch.float32, page_size=4, device="cuda", cuda_graphs=False)
    loaded.stop_tokens = frozenset()
    request = loaded.add(prompt, "patterns", SamplingParams(max_tokens=10))
    for _ in loaded.run():
        pass
    assert with_new == request.tokens


def test_command_line_generates_the_texts_of_the_cpu(served, capsys):  # noqa: F811
    """float32, under CUDA graphs. (benchmarks/compare_devices.py reports on bfloat16 and on larger models.)"""
    folder, adapters = served
    words = ["generate", "--model", folder, "--dtype", "float32", "--max-tokens", "16", "--json"]
    for name, path in adapters.items():
        words += ["--adapter", f"{name}={path}"]
    for i, name in enumerate((*NAMES, *NAMES)):
        words += ["--prompt", f"{'' if name is None else f'@{name} '}{'what is it? '[: 3 + i]}"]
    reports = {}
    for device in ("cpu", "cuda"):
        assert cli.main([*map(str, words), "--device", device]) == 0
        reports[device] = json.loads(capsys.readouterr().out)["requests"]
    assert len(reports["cpu"]) == 10
    assert len({tuple(request["tokens"]) for request in reports["cpu"]}) > 5
    for cpu, cuda in zip(reports["cpu"], reports["cuda"], strict=True):
        assert (cpu["adapter"], cpu["tokens"], cpu["text"]) == (cuda["adapter"], cuda["tokens"], cuda["text"])

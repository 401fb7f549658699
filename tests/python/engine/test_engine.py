"""The engine against Transformers and PEFT on tiny random models, and against itself: alone, short of pages."""

import random
import shutil

import punica_kernels as pk
import pytest
import torch
from punica_kernels.engine import EngineError, SamplingParams, load_engine
from punica_kernels.engine.checkpoint import MODULES
from punica_kernels.engine.sampling import Sampler, TextStream

OPS = ("batch_prefill", "batch_decode", "init_kv", "append_kv", "add_lora", "rms_norm")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "one head a KV head": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}),
    "one KV head": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "head_dim": ("llama", {"head_dim": 20}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "attention bias": ("llama", {"attention_bias": True}),
    "mlp bias": ("llama", {"mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "sharded": ("llama", {"max_shard_size": "50KB"}),
}


def tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 299, (length,), generator=generator).tolist() for length in lengths]


def cases(adapters=(None,), lengths=(1, 37, 16, 5, 20), steps=9):
    prompts = tokens(*lengths)
    return [(prompt, adapters[i % len(adapters)], tokens(steps, seed=i)[0]) for i, prompt in enumerate(prompts)]


def expected_logits(model, prompt, continuation):
    with torch.no_grad():
        return model(torch.tensor([prompt + continuation[:-1]])).logits[0, len(prompt) - 1 :]


def assert_logits(ours, expected):
    worst = (ours.cpu() - expected).abs().max() / expected.abs().max()
    assert worst <= 1e-4, f"largest difference {worst:.2e} of the largest logit"


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, device, make_model, teacher_forced):
    from transformers import AutoModelForCausalLM

    model_type, changes = MODELS[name]
    folder = make_model(model_type, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    work = cases()
    for ours, (prompt, _, continuation) in zip(
        teacher_forced(load_engine(folder, dtype=torch.float32, page_size=5, device=device), work), work, strict=True
    ):
        assert_logits(ours, expected_logits(model, prompt, continuation))


def test_old_rope_scaling_is_applied(make_model, teacher_forced, tmp_path):
    """config.json as written before Transformers 5: rope_theta and rope_scaling at the top."""
    import json

    folder = make_model("llama", rope_parameters=LLAMA3)
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    (old / "config.json").write_text(json.dumps(config))
    work = cases()
    for a, b in zip(*(teacher_forced(load_engine(f, dtype=torch.float32), work) for f in (folder, old)), strict=True):
        assert torch.equal(a, b)


ADAPTERS = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": list(MODULES)},
    "patterns": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 16},
        "alpha_pattern": {"o_proj": 5},
    },
    "rslora": {"r": 16, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj", "gate_proj", "up_proj"]},
    "layers": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
}


@pytest.fixture(scope="module")
def served(make_model, make_adapter):
    folder = make_model()
    return folder, {name: make_adapter(folder, i, **settings) for i, (name, settings) in enumerate(ADAPTERS.items())}


NAMES = ("all", "patterns", None, "rslora", "layers")


def test_logits_equal_peft(served, device, teacher_forced, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    calls = dict.fromkeys(OPS, 0)

    def counted(op, function):
        def call(*args, **kwargs):
            calls[op] += 1
            return function(*args, **kwargs)

        return call

    for op in OPS:
        monkeypatch.setattr(pk, op, counted(op, getattr(pk, op)))
    folder, adapters = served
    work = cases(NAMES, lengths=(1, 37, 16, 5, 20, 8))
    ours = teacher_forced(load_engine(folder, adapters, dtype=torch.float32, page_size=4, device=device), work)
    assert all(calls.values()), f"never called: {[op for op, count in calls.items() if not count]}"

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = [expected_logits(base, prompt, continuation) for prompt, _, continuation in work]
    model = PeftModel.from_pretrained(base, adapters["all"], adapter_name="all")
    for name in adapters:
        model.load_adapter(adapters[name], name)
    model.eval()
    for logits, without, (prompt, name, continuation) in zip(ours, plain, work, strict=True):
        if name is None:
            assert_logits(logits, without)
        else:
            model.set_adapter(name)
            expected = expected_logits(model, prompt, continuation)
            assert (expected - without).abs().max() > 0.05 * without.abs().max()  # the adapter does something
            assert_logits(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batched_equals_alone(served, device, greedy, fresh, dtype):
    work = [(prompt, NAMES[i % len(NAMES)]) for i, prompt in enumerate(tokens(3, 30, 12, 1, 25, 9, 17))]
    engine = load_engine(*served, dtype=dtype, page_size=4, device=device)
    for (batched, gaps), case in zip(greedy(engine, work), work, strict=True):
        alone, _ = greedy(fresh(engine), [case])[0]
        for step, (a, b) in enumerate(zip(batched, alone, strict=True)):
            if a != b:  # torch's product may round by batch size: then the two tokens were a tie within that rounding
                gap, best = gaps[step]
                assert gap <= 4 * torch.finfo(dtype).eps * best, f"step {step}: {a} and {b}, {gap} apart"
                break


def test_pages_run_out(served, greedy):
    """Three pages' worth of room: requests wait for each other, and what a page held before is not seen."""
    work = [(prompt, NAMES[i % len(NAMES)]) for i, prompt in enumerate(tokens(9, 3, 10, 2, 5, 6))]
    roomy = load_engine(*served, dtype=torch.float32, page_size=4)
    tight = load_engine(*served, dtype=torch.float32, page_size=4, num_pages=7)
    tight.cache.pool.fill_(torch.nan)
    assert [t for t, _ in greedy(tight, work)] == [t for t, _ in greedy(roomy, work)]
    assert roomy.statistics.peak_batch == 6
    assert tight.statistics.peak_batch < 4
    assert 4 < tight.statistics.peak_pages <= 7
    assert sorted(tight.cache.free) == list(range(7))
    # 9 + 12 tokens, of which the last is never read back: 5 pages. 17 + 12 need exactly 7, 18 + 12 one more.
    tight.add([1] * 17, None, SamplingParams(max_tokens=12))
    with pytest.raises(EngineError, match="needs 8 pages, the pool has 7"):
        tight.add([1] * 18, None, SamplingParams(max_tokens=12))


@pytest.mark.parametrize("seed", range(4))
def test_pages_have_one_owner(served, seed):
    """Random arrivals over a small pool: at every step a page is free or belongs to one request, and all are served."""
    draw = random.Random(seed)
    engine = load_engine(*served, page_size=draw.choice([1, 3, 4]), num_pages=draw.randint(30, 60), max_batch=4)
    engine.stop_tokens = frozenset()
    arrivals = [(draw.randint(1, 15), draw.choice(NAMES), draw.randint(1, 12)) for _ in range(12)]
    wanted = [length for _, _, length in arrivals]
    admitted = []
    while arrivals or engine.waiting or engine.running:
        while arrivals and draw.random() < 0.6:
            length, adapter, max_tokens = arrivals.pop(0)
            engine.add([draw.randrange(299) for _ in range(length)], adapter, SamplingParams(max_tokens=max_tokens))
        if not (engine.waiting or engine.running):
            continue
        engine.step()
        owned = [page for request in engine.requests for page in request.pages]
        assert sorted(owned + engine.cache.free) == list(range(engine.cache.num_pages))
        admitted += [r.index for r in engine.requests if r.tokens and r.index not in admitted]
    assert admitted == list(range(12))  # first come, first served
    assert [len(request.tokens) for request in engine.requests] == wanted


def test_pages_that_are_no_multiple_of_16_bytes(make_model, teacher_forced):
    """A token of 3 layers, one KV head and 6 dimensions in bfloat16 takes 72 bytes."""
    folder = make_model(num_attention_heads=8, num_key_value_heads=1, head_dim=6)
    work = cases()
    odd = teacher_forced(load_engine(folder, page_size=1), work)
    even = teacher_forced(load_engine(folder, page_size=16), work)
    for a, b in zip(odd, even, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(b.abs().max()))


def test_requests_join_and_leave(served, device, fresh):
    prompts = tokens(9, 3, 10, 2)
    lengths = [5, 9, 2, 7]

    def request(engine, i):
        return engine.add(prompts[i], NAMES[i], SamplingParams(max_tokens=lengths[i]))

    loaded = load_engine(*served, dtype=torch.float32, device=device)
    loaded.stop_tokens = frozenset()
    alone = []
    for i in range(4):
        engine = fresh(loaded)
        alone.append(request(engine, i))
        list(engine.run())
    engine = fresh(loaded, max_batch=3)
    together, sizes = [], []
    while len(together) < 4 or engine.waiting or engine.running:
        if len(together) < 4:
            together.append(request(engine, len(together)))
        engine.step()
        sizes.append(len(engine.running))
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [len(r.tokens) for r in together] == lengths
    assert max(sizes) >= 2
    assert sizes[-1] == 0


def test_adapters_come_and_go(served, device):
    """Between requests, while others run; one that is in use stays."""
    folder, adapters = served
    engine = load_engine(folder, {"all": adapters["all"]}, dtype=torch.float32, page_size=4, device=device)
    everything = load_engine(folder, adapters, dtype=torch.float32, page_size=4, device=device)
    engine.stop_tokens = everything.stop_tokens = frozenset()
    prompt = tokens(9)[0]

    def ask(from_engine, name, max_tokens=10):
        return from_engine.add(prompt, name, SamplingParams(max_tokens=max_tokens))

    def finish(from_engine, request):
        list(from_engine.run())
        return request.tokens

    expected = {name: finish(everything, ask(everything, name)) for name in (None, *adapters)}
    assert len({tuple(found) for found in expected.values()}) > 2
    with pytest.raises(EngineError, match=r"no adapter named 'patterns' \(all loaded\)"):
        ask(engine, "patterns")
    running = ask(engine, "all")
    engine.step()
    engine.step()
    engine.add_adapter("patterns", adapters["patterns"])  # while a request runs
    joined = ask(engine, "patterns")
    with pytest.raises(EngineError, match=r"adapter all is in use by 1 request$"):
        engine.remove_adapter("all")
    with pytest.raises(EngineError, match=r"adapter patterns is in use by 1 request$"):
        engine.remove_adapter("patterns")
    assert finish(engine, running) == expected["all"]
    assert joined.tokens == expected["patterns"]
    engine.remove_adapter("all")
    with pytest.raises(EngineError, match="no adapter named 'all'"):
        engine.remove_adapter("all")
    for name in ("layers", "rslora"):
        engine.add_adapter(name, adapters[name])
        assert finish(engine, ask(engine, name)) == expected[name]
        assert finish(engine, ask(engine, None)) == expected[None]
    assert finish(engine, ask(engine, "patterns")) == expected["patterns"]
    with pytest.raises(EngineError, match="no such folder"):
        engine.add_adapter("new", folder / "nothing")


def test_more_adapters_than_slots(served):
    folder, adapters = served
    engine = load_engine(folder, adapters, dtype=torch.float32, max_adapters=2)
    assert engine.adapters.names == list(adapters)
    with pytest.raises(EngineError, match="all 4 slots are taken"):
        engine.add_adapter("fifth", adapters["all"])


def test_context_end(served):
    engine = load_engine(*served, dtype=torch.float32)
    engine.stop_tokens = frozenset()
    request = engine.add([1] * 120, None, SamplingParams(max_tokens=50))
    list(engine.run())
    assert len(request.tokens) == 8  # positions 120..127
    assert request.finish_reason == "length"
    for prompt, message in (([1] * 128, "128 tokens, the context holds 128"), ([], "empty")):
        with pytest.raises(EngineError, match=message):
            engine.add(prompt)


def test_stop_token(served, greedy, fresh):
    prompt = tokens(9)[0]
    engine = load_engine(*served, dtype=torch.float32)
    chosen, _ = greedy(engine, [(prompt, None)])[0]
    engine = fresh(engine)
    engine.stop_tokens = frozenset({chosen[4]})
    request = engine.add(prompt)
    list(engine.run())
    assert request.tokens == chosen[: chosen.index(chosen[4]) + 1]
    assert request.finish_reason == "stop"


def test_samples_do_not_depend_on_the_batch(served, fresh):
    prompts = tokens(9, 3, 10)
    loaded = load_engine(*served, dtype=torch.float32)
    loaded.stop_tokens = frozenset()

    def run(which):
        engine = fresh(loaded)
        options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "max_tokens": 10}
        requests = {i: engine.add(prompts[i], NAMES[i], SamplingParams(seed=i, **options)) for i in which}
        list(engine.run())
        return {i: request.tokens for i, request in requests.items()}

    together = run([0, 1, 2])
    assert together == run([2, 0, 1]) == {**run([0]), **run([1]), **run([2])}


def test_sampler():
    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf, 2.5])
    probabilities = logits.softmax(0)

    def counts(**options):
        draw = Sampler(SamplingParams(seed=5, **options))
        return torch.bincount(torch.tensor([draw(logits) for _ in range(4000)]), minlength=5) / 4000

    torch.testing.assert_close(counts(temperature=1.0), probabilities, atol=0.03, rtol=0)
    torch.testing.assert_close(counts(temperature=2.0), (logits / 2).softmax(0), atol=0.03, rtol=0)
    kept = torch.tensor([0, 1, 0, 0, 1]) * probabilities
    torch.testing.assert_close(counts(temperature=1.0, top_k=2), kept / kept.sum(), atol=0.03, rtol=0)
    top_p = float(probabilities[1]) + 0.01  # the best alone falls short, so the second is in too
    torch.testing.assert_close(counts(temperature=1.0, top_p=top_p), kept / kept.sum(), atol=0.03, rtol=0)
    assert counts(temperature=1.0, top_p=1e-6)[1] == 1
    assert counts()[1] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_sampling_params(options):
    with pytest.raises(EngineError, match=next(iter(options))):
        SamplingParams(**options)


class Bytes:
    """A tokenizer of bytes: characters beyond ASCII take several tokens."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("plain", (), "plain", False),
        ("naïve 🙂 文", (), "naïve 🙂 文", False),
        ("one STOP two", ("STOP",), "one ", True),
        ("one STO", ("STOP",), "one STO", False),
        ("one SSTOP two", ("STOP",), "one S", True),
        ("aab", ("ab", "aab"), "", True),
        ("🙂🙃 rest", ("🙃",), "🙂", True),
    ],
)
def test_text_stream(text, stop, expected, stopped):
    stream = TextStream(Bytes(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == stopped
    if not stop:
        assert sum(map(bool, pieces)) == len(text)  # every character as soon as it is complete

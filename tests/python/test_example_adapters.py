"""The adapters and prompts under examples/ are what their README and training script say."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
RANKS = {"pirate": 4, "json": 8, "haiku": 16, "sql": 32}
MODULES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}


def config_of(name):
    return json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())


@pytest.fixture
def adapter_data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    modules = {"pirate": "pirate", "json": "json_answer", "haiku": "haiku", "sql": "sql"}
    return {name: importlib.import_module(f"adapter_data.{module}") for name, module in modules.items()}


@pytest.mark.parametrize("name", RANKS)
def test_adapter_is_complete_and_in_bfloat16(name):
    config = config_of(name)
    assert config["r"] == RANKS[name]
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    expected = {}
    for layer in range(30):
        for module in config["target_modules"]:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            h_out, h_in = MODULES[module]
            expected[f"{prefix}.lora_A.weight"] = (config["r"], h_in)
            expected[f"{prefix}.lora_B.weight"] = (h_out, config["r"])
    tensors = load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, key
        assert tensor.isfinite().all(), key
        assert tensor.any(), key  # an untrained lora_B is zero


def test_adapters_differ_where_kernels_care():
    configs = [config_of(name) for name in RANKS]
    assert {path.name for path in (EXAMPLES / "adapters").iterdir()} == set(RANKS)
    assert set().union(*(config["target_modules"] for config in configs)) == set(MODULES)
    assert len({frozenset(config["target_modules"]) for config in configs}) == len(configs)
    assert [config["use_rslora"] for config in configs].count(True) == 1
    assert sum(path.stat().st_size for path in (EXAMPLES / "adapters").rglob("*")) <= 12 << 20


def test_demo_prompts_are_held_out(adapter_data):
    prompts = json.loads((EXAMPLES / "demo_prompts.json").read_text())
    assert len(prompts) == 8
    assert {entry["adapter"] for entry in prompts} == {None, *RANKS}
    trained = {prompt for module in adapter_data.values() for prompt, _ in module.TRAIN}
    for entry in prompts:
        if entry["adapter"] is not None:
            assert entry["prompt"] in adapter_data[entry["adapter"]].HELD_OUT
        assert entry["prompt"] not in trained


def test_training_answers_have_their_form(adapter_data):
    for _, answer in adapter_data["json"].TRAIN:
        assert list(json.loads(answer)) == ["answer", "topic"]
    for _, answer in adapter_data["haiku"].TRAIN:
        assert len(answer.splitlines()) == 3
    for _, answer in adapter_data["sql"].TRAIN:
        assert answer.split()[0] in ("SELECT", "DELETE", "UPDATE")
        assert answer.endswith(";")
    for module in adapter_data.values():
        prompts = [prompt for prompt, _ in module.TRAIN]
        assert len(set(prompts)) == len(prompts)
        assert not set(prompts) & set(module.HELD_OUT)

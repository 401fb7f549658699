"""What the engine cannot serve exactly it refuses by name: a row breaks one thing in a good checkpoint or adapter."""

import json
import shutil

import pytest
import torch
from punica_kernels.engine import EngineError, load_engine
from punica_kernels.engine.checkpoint import convert_gguf
from safetensors.torch import load_file, save_file


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def edit_tensors(name, change):
    def edit(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


def rope(**parameters):
    return edit_json("config.json", rope_parameters={"rope_theta": 1e4} | parameters)


def config(**changes):
    return edit_json("config.json", **changes)


def weights(change):
    return edit_tensors("model.safetensors", change)


O_PROJ = "model.layers.1.self_attn.o_proj"
CHECKPOINTS = {
    "architecture": (config(model_type="gpt2"), "architecture 'gpt2' is not one of llama"),
    "head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification does not generate",
    ),
    "dynamic rope": (rope(rope_type="dynamic", factor=2.0), "rope type 'dynamic'"),
    "longrope": (
        rope(rope_type="longrope", factor=2.0, short_factor=[1] * 4, long_factor=[2] * 4),
        "rope type 'longrope'",
    ),
    "unknown rope": (rope(rope_type="spiral"), "spiral"),
    "partial rope": (rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "activation": (config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "soft cap": (config(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "interleaved rope": (config(rope_interleaved=True), "rope_interleaved = True"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    "window of another family": (config(sliding_window=16), "sliding_window"),
    "heads": (config(num_key_value_heads=4), "heads"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "broken weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "model.safetensors: "),
    "missing tensor": (weights(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "missing bias": (config(attention_bias=True), "q_proj.bias is missing"),
    "missing head": (weights(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "shape": (config(intermediate_size=96), r"gate_proj.weight is float32 \[80, 48\], expected \[96, 48\]"),
    "integer tensor": (weights(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})), "int8"),
    "unknown tensor": (weights(lambda t: t.update({f"{O_PROJ}.bias": torch.ones(48)})), "o_proj.bias is not part"),
    "query norm": (
        weights(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "q_norm.weight is not part",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, make_model, tmp_path):
    damage, message = CHECKPOINTS[name]
    folder = shutil.copytree(make_model(), tmp_path / "model")
    load_engine(folder, dtype=torch.float32)
    damage(folder)
    with pytest.raises(EngineError, match=message) as caught:
        load_engine(folder, dtype=torch.float32)
    assert str(folder) in str(caught.value)


def adapter(**changes):
    return edit_json("adapter_config.json", **changes)


def lora(change):
    return edit_tensors("adapter_model.safetensors", change)


NAME = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"
ADAPTERS = {
    "DoRA": (adapter(use_dora=True), "use_dora = true"),
    "bias": (adapter(bias="lora_only"), "bias = 'lora_only'"),
    "LoRA bias": (adapter(lora_bias=True), "lora_bias"),
    "whole modules": (adapter(modules_to_save=["lm_head"]), "modules_to_save"),
    "replicated layers": (adapter(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "new kind": (adapter(use_later_invention=True), "use_later_invention"),
    "other method": (adapter(peft_type="IA3"), "peft_type = 'IA3'"),
    "changed base": (adapter(init_lora_weights="pissa"), "'pissa' changes the base model"),
    "no rank": (adapter(r=...), "no r or lora_alpha"),
    "another rank": (adapter(r=5), "has rank 4, adapter_config.json says otherwise"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: No such file"),
    "broken config": (lambda folder: (folder / "adapter_config.json").write_text("]"), "not valid JSON"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "broken tensors": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1" * 99), "adapter a "),
    "empty": (lora(lambda t: t.clear()), "holds no tensors"),
    "half a pair": (lora(lambda t: t.pop(B)), "layer 1 q_proj has no lora_B"),
    "embedding": (
        lora(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 300)})),
        "embed_tokens.lora_embedding_A is not LoRA on one of q_proj",
    ),
    "head": (
        lora(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)})),
        "lm_head.lora_A.weight is not LoRA on one of q_proj",
    ),
    "magnitude": (
        lora(lambda t: t.update({f"{NAME}.lora_magnitude_vector": torch.ones(48)})),
        "lora_magnitude_vector is not LoRA",
    ),
    "wider model": (
        lora(lambda t: t.update({A: torch.ones(4, 64)})),
        "another model: q_proj maps 64 to 48 .* 48 to 48",
    ),
    "deeper model": (
        lora(lambda t: t.update({A.replace(".1.", ".3."): torch.ones(4, 48)})),
        "another model: layer 3 of 3",
    ),
    "ranks of a pair": (lora(lambda t: t.update({B: torch.ones(48, 5)})), "another model: q_proj"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name, make_model, make_adapter, tmp_path):
    damage, message = ADAPTERS[name]
    model = make_model()
    folder = make_adapter(model, r=4, target_modules=["q_proj", "v_proj"])
    load_engine(model, {"a": folder}, dtype=torch.float32)
    damage(folder)
    with pytest.raises(EngineError, match=message) as caught:
        load_engine(model, {"a": folder}, dtype=torch.float32)
    assert str(folder) in str(caught.value)


def test_pool(make_model):
    for options, message in (
        ({"num_pages": 0}, "no page"),
        ({"kv_memory": 1000}, "no page"),
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 2**40}, "no memory for"),
    ):
        with pytest.raises(EngineError, match=message):
            load_engine(make_model(), dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("llama.rope.scaling.factor", "llama.rope.scaling.factor = 4.0"),
        ("llama.expert_count", "llama.expert_count"),
        ("rope_freqs.weight", "tensor rope_freqs.weight"),
        ("general.architecture", "architecture 'gpt2'"),
        ("llama.context_length", "model.gguf: "),  # nothing to refuse, but too little to make a model of
        (None, "not a readable GGUF file"),
    ],
)
def test_gguf(key, message, tmp_path, monkeypatch):
    """Settings that Transformers would drop when it reads the file."""
    import gguf
    import numpy as np

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    if key is None:
        path.write_bytes(b"GGUF but nothing else")
    else:
        writer = gguf.GGUFWriter(path, "gpt2" if key == "general.architecture" else "llama")
        writer.add_block_count(1)
        if key.startswith("llama."):
            writer.add_float32(key, 4.0)
        writer.add_tensor("rope_freqs.weight" if key == "rope_freqs.weight" else "x", np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(EngineError, match=message):
        convert_gguf(path, torch.float32)
    assert not list((tmp_path / "cache").glob("punica_kernels/*"))

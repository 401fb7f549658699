"""Tiny models with random weights and adapters, and what compares them, for the tests of `punica_kernels.peft`.

A reference is a copy of the model that is not accelerated, or PEFT's own way to run one adapter alone.
"""

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402

NAMES = ["one", "two", "__base__", "three", "two", "one", "four"]
CONFIGS = {
    "one": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "three": {"r": 7, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"layers.1.self_attn.o_proj": 33}},
    "four": {"r": 8, "target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"q_proj": 31}, "lora_dropout": 0.5},
}


def tiny(kind="llama", dtype=torch.float32, device="cpu", **changes):
    sizes = {
        "llama": {
            "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 299, "pad_token_id": 0,
        },
        "gpt2": {
            "vocab_size": 300, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15,
            "bos_token_id": None, "eos_token_id": 299, "pad_token_id": 0,
        },
        "t5": {
            "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "eos_token_id": 299, "pad_token_id": 0, "initializer_factor": 3.0,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes[kind] | changes)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype).to(device)


def with_adapters(model, configs=CONFIGS, **options):
    for i, (name, config) in enumerate(configs.items()):
        torch.manual_seed(i)
        config = LoraConfig(**{"init_lora_weights": False, "inference_mode": True} | config)
        if i == 0:
            model = get_peft_model(model, config, name, **options)
        else:
            model.add_adapter(name, config, **options)
    return model.eval().requires_grad_(False)


def tokens(model, rows=7, length=9):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(1, 299, (rows, length), generator=generator).to(model.device)


def logits(model, names=NAMES, **more):
    with torch.no_grad():
        return model(tokens(model, len(names)), adapter_names=names, **more).logits


def close(ours, theirs, rtol=2e-5):
    assert ours.dtype == theirs.dtype
    difference, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    assert difference <= rtol * largest, f"{float(difference / largest):.3g} of the largest"


def generate(model, names=NAMES, length=9, **more):
    ids = tokens(model, len(names), length)
    more = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)} | more
    return model.generate(input_ids=ids, adapter_names=names, **more)


def double_b(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(2)

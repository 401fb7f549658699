"""A pytest plugin for PEFT's own tests: every model with LoRA layers is accelerated as soon as it is wrapped.

tools/test_peft.sh runs them with it. Gradients are off in the tests, for with gradients required the accelerated model
would take PEFT's path, and test nothing. Each test says how often `add_lora` ran; a summary says in how many it did.

Checkpoints that PEFT's tests load from the network are drawn at random here, in the shape of tiny models of that kind,
and packages that only other tests need are stood in for.
"""

import functools
import importlib.machinery
import importlib.util
import sys
import types
import warnings

import peft
import punica_kernels.peft as accelerated
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

for _name in ("datasets", "diffusers"):
    if importlib.util.find_spec(_name) is None:
        _module = types.ModuleType(_name)
        _module.__spec__ = importlib.machinery.ModuleSpec(_name, None)
        _module.__getattr__ = lambda attribute: type(attribute, (), {})
        sys.modules[_name] = _module

_calls = 0
_tests = {"passed": 0, "failed": 0, "with add_lora": 0}


def _counting(add_lora):
    def count(*args, **more):
        global _calls
        _calls += 1
        add_lora(*args, **more)

    return count


def _accelerating(init):
    @functools.wraps(init)
    def wrapped(self, *args, **more):
        init(self, *args, **more)
        if any(isinstance(module, LoraLayer) for module in self.modules()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                accelerated.accelerate(self)

    return wrapped


# The end of the name that PEFT's tests ask for, and what is drawn instead.
_SMALL = {"vocab_size": 1024, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = _SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
_DRAWN = {
    "tiny-random-OPTForCausalLM": (
        "opt",
        _LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "tiny-random-GPT2LMHeadModel": ("gpt2", _GPT2),
    "tiny-random-GPTJForCausalLM": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("llama", _LLAMA),
    "tiny-dummy-qwen2": ("qwen2", _LLAMA),
    "tiny-random-Gemma3ForCausalLM": ("gemma3_text", _LLAMA | {"head_dim": 8}),
    "tiny-random-T5ForConditionalGeneration-calibrated": (
        "t5",
        _SMALL | {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
            "initializer_factor": 3.0,
        },
    ),
    "tiny-random-BartForConditionalGeneration": (
        "bart",
        _SMALL | {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2, "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
}  # fmt: skip


def _drawing(auto):
    load = auto.from_pretrained.__func__

    @classmethod
    def from_pretrained(cls, name, *args, **more):
        drawn = _DRAWN.get(str(name).rpartition("/")[2])
        if drawn is None:
            return load(cls, name, *args, **more)
        kind, sizes = drawn
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **sizes)
            model = cls.from_config(config, dtype=more.get("dtype") or more.get("torch_dtype") or torch.float32)
        return model.eval()

    auto.from_pretrained = from_pretrained


def pytest_configure(config):
    accelerated.add_lora = _counting(accelerated.add_lora)
    peft.PeftModel.__init__ = _accelerating(peft.PeftModel.__init__)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        _drawing(auto)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = _calls
    with torch.no_grad():
        yield
    item.user_properties.append(("add_lora", _calls - before))


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome in _tests:
        count = dict(report.user_properties).get("add_lora", 0)
        _tests[report.outcome] += 1
        _tests["with add_lora"] += count > 0
        print(f"{report.outcome}, {count} add_lora: {report.nodeid}")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"accelerated: {_tests}")
    if not _tests["with add_lora"]:
        terminalreporter.write_line("no test ran add_lora: nothing was tested")


def pytest_sessionfinish(session):
    if not _tests["with add_lora"]:
        session.exitstatus = 1

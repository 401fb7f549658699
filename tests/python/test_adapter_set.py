"""AdapterSet: PEFT folders in, tables for add_lora out, in place and while the model runs."""

import json
import random
import shutil
import subprocess
import sys

import punica_kernels as pk
import pytest
import torch
from op_cases import randn
from safetensors.torch import load_file, save_file

LAYERS = 2
SHAPES = {
    "qkv_proj": {"self_attn.q_proj": (24, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)},
    "down_proj": {"mlp.down_proj": (16, 32)},
}
MODULES = {module: shape for modules in SHAPES.values() for module, shape in modules.items()}


def write_adapter(folder, seed, ranks, dtype=torch.float32, **config):
    """A PEFT folder with LoRA of ranks[module] (a number, or one for each layer; 0: that layer is left alone)."""
    folder.mkdir()
    tensors = {}
    for i, (module, rank) in enumerate(ranks.items()):
        h_out, h_in = MODULES[module]
        for layer in range(LAYERS):
            r = rank if isinstance(rank, int) else rank[layer]
            if r:
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = randn(r, h_in, dtype=dtype, seed=100 * seed + 2 * i + layer)
                tensors[f"{name}.lora_B.weight"] = randn(h_out, r, dtype=dtype, seed=100 * seed + 2 * i + layer + 50)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def make_set(device, dtype=torch.float32, **options):
    return pk.AdapterSet(SHAPES, device, dtype, num_layers=LAYERS, **{"capacity": 4} | options)


def dense(folder, projection, layer, scale_of=None):
    """scale * B A of all the modules of a projection, one below the other, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    blocks = []
    for module, (h_out, h_in) in SHAPES[projection].items():
        name = f"base_model.model.model.layers.{layer}.{module}.lora_"
        if f"{name}A.weight" not in tensors:
            blocks.append(torch.zeros(h_out, h_in, dtype=torch.float64))
            continue
        a, b = (tensors[f"{name}{side}.weight"].double() for side in "AB")
        scale = scale_of(module, layer) if scale_of else config["lora_alpha"] / len(a)
        blocks.append(scale * b @ a)
    return torch.cat(blocks)


def apply(adapters, projection, layer, x, indices, batch=None):
    t = adapters.tables[projection]
    y = torch.zeros(len(x), t.slice_offsets[-1], dtype=adapters.dtype, device=x.device)
    if batch is None:
        batch = pk.LoraBatch(torch.tensor(indices, device=x.device), adapters.capacity)
    pk.add_lora(
        y, x, t.a_ptr, t.b_ptr, t.ranks, t.scales, batch, layer, t.slice_offsets, max_rank=adapters.max_rank
    )  # fmt: skip
    return y


def assert_computes(adapters, folders, device, dtype=torch.float32, scale_of=None):
    """Every loaded adapter, every projection and layer, beside rows without an adapter."""
    names = [None, *folders]
    indices = [adapters.index(name) for name in names]
    for projection, modules in SHAPES.items():
        h_in = next(iter(modules.values()))[1]
        x = randn(len(names), h_in, dtype=dtype, device=device)
        for layer in range(LAYERS):
            y = apply(adapters, projection, layer, x, indices).double().cpu()
            assert (y[0] == 0).all()
            for row, folder in enumerate(folders.values(), start=1):
                expected = dense(folder, projection, layer, scale_of) @ x[row].double().cpu()
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(y[row], expected, rtol=tolerance, atol=tolerance * 30)


QKV = list(SHAPES["qkv_proj"])


def test_what_adapters_may_differ_in(device, tmp_path):
    folders = {
        "all": write_adapter(tmp_path / "all", 1, dict.fromkeys(MODULES, 4), r=4, lora_alpha=8),
        "some": write_adapter(tmp_path / "some", 2, {QKV[0]: 16, QKV[2]: 16}, r=16, lora_alpha=3),
        "layer": write_adapter(tmp_path / "layer", 3, {"mlp.down_proj": (0, 5)}, r=5, lora_alpha=5),
    }
    adapters = make_set(device)
    slots = [adapters.add(name, folder) for name, folder in folders.items()]
    assert slots == [adapters.index(name) for name in folders] == [0, 1, 2]
    assert adapters.names == list(folders)
    assert len(adapters) == 3
    assert "some" in adapters
    assert "none" not in adapters
    assert adapters.index(None) == -1
    assert adapters.tables["qkv_proj"].ranks.tolist() == [[4, 16, 0, 0], [4, 0, 0, 0], [4, 16, 0, 0]]
    assert adapters.tables["down_proj"].ranks.tolist() == [[4, 0, 5, 0]]
    assert adapters.tables["qkv_proj"].slice_offsets == (0, 24, 32, 40)
    assert_computes(adapters, folders, device)


def test_dtypes(device, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        folder = write_adapter(tmp_path / str(dtype), 1, dict.fromkeys(MODULES, 4), torch.bfloat16, r=4, lora_alpha=8)
        adapters = make_set(device, dtype)
        adapters.add("a", str(folder))
        assert_computes(adapters, {"a": folder}, device, dtype)


def test_patterns(device, tmp_path):
    ranks = {QKV[0]: (3, 16), QKV[1]: 8, "mlp.down_proj": 2}
    settings = {
        "r": 8, "lora_alpha": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 16, "down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 5, "down_proj": 7},
    }  # fmt: skip

    def alpha(module, layer):
        return 5 if (module, layer) == (QKV[1], 1) else 7 if module == "mlp.down_proj" else 4

    def rank(module, layer):
        return {QKV[0]: (3, 16)[layer], QKV[1]: 8, "mlp.down_proj": 2}[module]

    for rslora in (False, True):
        folder = write_adapter(tmp_path / f"{rslora}", 4, ranks, use_rslora=rslora, **settings)
        adapters = make_set(device)
        adapters.add("a", folder)

        def scale(module, layer, rslora=rslora):
            return alpha(module, layer) / (rank(module, layer) ** 0.5 if rslora else rank(module, layer))

        assert_computes(adapters, {"a": folder}, device, scale_of=scale)
        assert adapters.tables["qkv_proj"].ranks[:, 0].tolist() == [16, 8, 0]


def test_weights_keep_their_bits(tmp_path):
    """The scale is a table of its own: it is not multiplied into what the file holds."""
    folder = write_adapter(tmp_path / "a", 1, {QKV[1]: 4}, torch.bfloat16, r=4, lora_alpha=3)
    adapters = make_set("cpu", torch.bfloat16)
    adapters.add("a", folder)
    t, file = adapters.tables["qkv_proj"], load_file(folder / "adapter_model.safetensors")
    assert t.scales[1, 0].item() == 0.75
    for address, side, shape in ((t.a_ptr[1, 0], "A", (LAYERS, 4, 16)), (t.b_ptr[1, 0], "B", (LAYERS, 8, 4))):
        stored = pk.reference.tensor_at(int(address), shape, torch.bfloat16)
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.{QKV[1]}.lora_{side}.weight"
            assert torch.equal(stored[layer], file[name])


def test_memory_is_that_of_the_ranks(device, tmp_path):
    adapters = make_set(device)
    small = write_adapter(tmp_path / "small", 1, {QKV[1]: 1}, r=1, lora_alpha=1)
    large = write_adapter(tmp_path / "large", 1, dict.fromkeys(MODULES, 64), r=64, lora_alpha=1)
    adapters.add("large", large)
    adapters.add("small", small)
    assert adapters._weights["small"].nbytes <= 1024
    assert adapters._weights["large"].nbytes > 100 * adapters._weights["small"].nbytes


def test_coming_and_going(device, tmp_path):
    adapters = make_set(device, capacity=2)
    addresses = [
        getattr(t, n).data_ptr() for t in adapters.tables.values() for n in ("a_ptr", "b_ptr", "ranks", "scales")
    ]
    folders = {
        name: write_adapter(tmp_path / name, seed, dict.fromkeys(MODULES, 2 + seed), r=2 + seed, lora_alpha=4)
        for seed, name in enumerate("abc")
    }
    adapters.add("a", folders["a"])
    adapters.add("b", folders["b"])
    with pytest.raises(pk.AdapterError, match="adapter c: all 2 slots are taken"):
        adapters.add("c", folders["c"])
    with pytest.raises(pk.AdapterError, match="adapter a is given twice"):
        adapters.add("a", folders["c"])
    with pytest.raises(pk.AdapterError, match=r"no adapter named 'c' \(a, b loaded\)"):
        adapters.remove("c")
    adapters.remove("a")
    assert adapters.names == ["b"]
    x = randn(2, 16, dtype=torch.float32, device=device)
    assert (apply(adapters, "qkv_proj", 0, x, [0, -1]) == 0).all()  # the slot is empty
    with pytest.raises(pk.AdapterError, match="no adapter named 'a'"):
        adapters.index("a")
    assert adapters.add("c", folders["c"]) == 0
    assert_computes(adapters, {"b": folders["b"], "c": folders["c"]}, device)
    adapters.remove("b")
    adapters.remove("c")
    assert adapters.add("a", folders["a"]) == 1  # the one that has been free for longer
    assert_computes(adapters, {"a": folders["a"]}, device)
    after = [getattr(t, n).data_ptr() for t in adapters.tables.values() for n in ("a_ptr", "b_ptr", "ranks", "scales")]
    assert after == addresses


def edit(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change):
    def apply_change(folder):
        content = load_file(folder / "adapter_model.safetensors")
        change(content)
        save_file({name: t.clone() for name, t in content.items()}, folder / "adapter_model.safetensors")

    return apply_change


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "DoRA": (edit(use_dora=True), "use_dora = true is not supported"),
    "kind": (edit(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
    "bias": (edit(bias="all"), "bias = 'all' is not supported"),
    "base": (edit(init_lora_weights="olora"), "'olora' changes the base model"),
    "saved": (edit(modules_to_save=["lm_head"]), "modules_to_save"),
    "unknown": (edit(use_something_new=1), "use_something_new = 1 is not supported"),
    "rank": (edit(r=5), "has rank 4, adapter_config.json says otherwise"),
    "module": (tensors(lambda t: t.update({A.replace("q_proj", "o_proj"): t[A]})), "o_proj.* is not LoRA on one of q_"),
    "magnitude": (
        tensors(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(24)})),
        "lora_magnitude_vector is not LoRA",
    ),
    "shape": (tensors(lambda t: t.update({A: torch.ones(4, 17)})), "made for another model: q_proj maps 17 to 24"),
    "layer": (tensors(lambda t: t.update({A.replace(".0.", ".2."): t[A]})), "made for another model: layer 2 of 2"),
    "half": (tensors(lambda t: t.pop(A)), "layer 0 q_proj has no lora_A"),
    "alpha": (edit(lora_alpha="16"), 'lora_alpha = "16" is not a number'),
    "patterns": (edit(rank_pattern=["q_proj"]), "rank_pattern .* does not map patterns to numbers"),
    "values": (edit(alpha_pattern={"q_proj": None}), "alpha_pattern .* does not map patterns to numbers"),
    "expression": (edit(alpha_pattern={"(": 1}), r"alpha_pattern: '\(' is not a pattern"),
    "vector": (tensors(lambda t: t.update({A: torch.ones(4)})), r"layer 0 q_proj: lora_A has shape \(4,\)"),
    "number": (tensors(lambda t: t.update({A: torch.tensor(4.0)})), r"layer 0 q_proj: lora_A has shape \(\)"),
    "nothing": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    damage, message = REFUSED[name]
    folder = write_adapter(tmp_path / "bad", 1, dict.fromkeys(MODULES, 4), r=4, lora_alpha=8)
    good = shutil.copytree(folder, tmp_path / "good")
    adapters = make_set("cpu")
    adapters.add("good", good)
    damage(folder)
    with pytest.raises(pk.AdapterError, match=message) as caught:
        adapters.add("bad", folder)
    assert str(folder) in str(caught.value)
    assert adapters.names == ["good"]
    assert_computes(adapters, {"good": good}, "cpu")
    assert adapters.tables["qkv_proj"].ranks[:, 1:].sum() == 0


def test_rank_bound(tmp_path):
    """A power of two that no loaded rank exceeds; it never shrinks."""
    adapters, bounds = make_set("cpu", max_rank=48, capacity=5), []
    for rank in (2, 8, 9, 33, 5):
        folder = write_adapter(
            tmp_path / f"{rank}", 1, {QKV[0]: 1, QKV[1]: rank}, r=1, rank_pattern={"k_proj": rank}, lora_alpha=1
        )
        adapters.add(str(rank), folder)
        bounds.append(adapters.rank_bound)
    adapters.remove("33")
    assert [*bounds, adapters.rank_bound] == [8, 8, 16, 48, 48, 48]
    assert make_set("cpu", max_rank=3).rank_bound == 3


def test_largest_rank(tmp_path):
    folder = write_adapter(tmp_path / "a", 1, dict.fromkeys(MODULES, 4), r=4, lora_alpha=8)
    with pytest.raises(pk.AdapterError, match="has rank 4, max_rank is 3"):
        make_set("cpu", max_rank=3).add("a", folder)
    with pytest.raises(pk.AdapterError, match="capacity must be at least 1"):
        make_set("cpu", capacity=0)
    with pytest.raises(pk.AdapterError, match="max_rank must be at least 1, got 0"):
        make_set("cpu", max_rank=0)
    with pytest.raises(pk.AdapterError, match="one comes twice"):
        pk.AdapterSet({"a": {"x": (1, 1)}, "b": {"x": (1, 1)}}, "cpu", torch.float32, num_layers=1)


def test_from_tensors(device):
    adapters = make_set(device)
    for where in {"cpu", device}:
        a, b = randn(LAYERS, 3, 16, dtype=torch.float32), randn(LAYERS, 8, 3, dtype=torch.float32)
        adapters.add_weights(where, {QKV[2]: pk.LoraWeights(a.to(where), b.to(where), 0.5)})
        x = randn(1, 16, dtype=torch.float32)
        y = apply(adapters, "qkv_proj", 1, x.to(device), [adapters.index(where)]).cpu()
        torch.testing.assert_close(y[0, 32:], 0.5 * b[1] @ (a[1] @ x[0]))
        assert (y[0, :32] == 0).all()
    with pytest.raises(pk.AdapterError, match="o_proj is not one of"):
        adapters.add_weights("c", {"o_proj": pk.LoraWeights(a, b, 1.0)})
    with pytest.raises(pk.AdapterError, match="must have shapes"):
        adapters.add_weights("c", {QKV[0]: pk.LoraWeights(a, b, 1.0)})
    with pytest.raises(pk.AdapterError, match=r"must have A \[L, r, h_in\]"):
        adapters.add_weights("c", {QKV[0]: pk.LoraWeights(a[0, 0], b, 1.0)})


class Traffic:
    """Adapters that come and go at random, and a batch of rows that name those which are there."""

    def __init__(self, adapters, seed, rows, device):
        self.adapters, self.draw, self.rows, self.device = adapters, random.Random(seed), rows, device
        self.dense, self.count = {}, 0  # name: scale * B A of q, k and v in layer 1, float64

    def change(self, **options):
        adapters = self.adapters
        if len(adapters) == adapters.capacity or (len(adapters) and self.draw.random() < 0.45):
            name = self.draw.choice(adapters.names)
            adapters.remove(name, **options)
            del self.dense[name]
            return
        name, blocks, weights = f"adapter {self.count}", [], {}
        self.count += 1
        for s, (module, (h_out, h_in)) in enumerate(SHAPES["qkv_proj"].items()):
            if self.draw.random() < 0.3:
                blocks.append(torch.zeros(h_out, h_in, dtype=torch.float64))
                continue
            rank, scale = self.draw.choice([1, 4, 8, 16, 31]), self.draw.choice([0.25, -1.0, 2.0])
            a = randn(LAYERS, rank, h_in, dtype=adapters.dtype, seed=10 * self.count + s)
            b = randn(LAYERS, h_out, rank, dtype=adapters.dtype, seed=10 * self.count + s + 5)
            weights[module] = pk.LoraWeights(a, b, scale)
            blocks.append(scale * b[1].double() @ a[1].double())
        self.dense[name] = torch.cat(blocks)
        adapters.add_weights(name, weights, **options)

    def choose(self):
        names = [self.draw.choice([None, *self.adapters.names]) for _ in range(self.rows)]
        matrices = [None if name is None else self.dense[name] for name in names]
        return [self.adapters.index(name) for name in names], matrices


def assert_rows(y, x, matrices):
    y, x = y.double().cpu(), x.double().cpu()
    for row, matrix in enumerate(matrices):
        if matrix is None:
            assert (y[row] == 0).all()
        else:
            size = float(matrix.norm() * x[row].norm())
            torch.testing.assert_close(y[row], matrix @ x[row], rtol=1e-5, atol=1e-5 * size)


def test_a_thousand_changes():
    adapters = make_set("cpu", capacity=5)
    traffic = Traffic(adapters, 1, 7, "cpu")
    batch = pk.LoraBatch(torch.full((7,), -1), 5)
    for cycle in range(1000):
        traffic.change()
        indices, matrices = traffic.choose()
        batch.update(torch.tensor(indices))
        x = randn(7, 16, dtype=torch.float32, seed=cycle)
        assert_rows(apply(adapters, "qkv_proj", 1, x, None, batch), x, matrices)
    assert traffic.count > 400


needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and pk.has_cuda()), reason="no CUDA device"
)  # fmt: skip


@needs_cuda
def test_a_thousand_changes_under_a_captured_graph():
    """Two calls in a row with early reads, replayed after every change without waiting for the device."""
    device, rows, capacity = "cuda", 9, 5
    adapters = make_set(device, capacity=capacity)
    traffic = Traffic(adapters, 2, rows, device)
    batch = pk.LoraBatch(torch.full((rows,), -1, device=device), capacity)
    x = torch.zeros(rows, 16, device=device)
    t = adapters.tables["qkv_proj"]
    arguments = (t.a_ptr, t.b_ptr, t.ranks, t.scales, batch, 1, t.slice_offsets)
    first, second = (torch.zeros(rows, 40, device=device) for _ in range(2))

    def step():
        first.zero_()
        second.zero_()
        pk.add_lora(first, x, *arguments)
        pk.add_lora(second, x, *arguments)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), pk.early_reads():
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    outcomes = []
    with torch.cuda.stream(stream):
        for cycle in range(1000):
            traffic.change(stream=stream)
            indices, matrices = traffic.choose()
            batch.update(torch.tensor(indices).pin_memory().to(device, non_blocking=True))
            host_x = randn(rows, 16, dtype=torch.float32, seed=cycle)
            x.copy_(host_x.pin_memory(), non_blocking=True)
            graph.replay()
            outcomes.append((first.clone(), second.clone(), host_x, matrices))
            if len(outcomes) == 50:
                for a, b, used, expected in outcomes:
                    assert torch.equal(a, b)
                    assert_rows(a, used, expected)
                outcomes.clear()
    stream.synchronize()
    adapters.collect()
    assert adapters.collect() == 0
    assert traffic.count > 400


@needs_cuda
def test_memory_is_freed_when_all_streams_have_passed():
    adapters = make_set("cuda")
    weights = {QKV[0]: pk.LoraWeights(torch.ones(LAYERS, 4, 16), torch.ones(LAYERS, 24, 4), 1.0)}
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    adapters.add_weights("a", weights, stream=streams)
    torch.cuda.synchronize()
    adapters.collect()
    with torch.cuda.stream(streams[1]):
        torch.cuda._sleep(400_000_000)  # some 0.2 s
    adapters.remove("a", stream=streams)
    assert adapters.collect() > 0
    torch.cuda.synchronize()
    assert adapters.collect() == 0


@needs_cuda
def test_capture_is_refused():
    adapters = make_set("cuda")
    weights = {QKV[0]: pk.LoraWeights(torch.ones(LAYERS, 4, 16), torch.ones(LAYERS, 24, 4), 1.0)}
    adapters.add_weights("before", weights)  # leaves events behind, which a capture forbids to ask
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(pk.AdapterError, match="captured"):
        adapters.add_weights("a", weights)
    assert adapters.names == ["before"]


def test_safetensors_is_imported_by_readers_alone():
    code = "import sys, punica_kernels; print([m for m in sys.modules if m.startswith('safetensors')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr

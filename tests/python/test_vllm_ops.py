"""The operations under the vLLM plugin, on layers of stacked, padded slots as vLLM has them. Needs no vLLM."""

import itertools

import punica_kernels as pk
import pytest
import torch
from punica_kernels.vllm import ops, tables
from tolerances import assert_close

SLOTS, MAX_RANK, H_IN, ROWS = 5, 16, 96, 23
WIDTHS = (64, 32, 40)
# Of each slot and slice; slot 3 is empty, slot 1 has no second slice.
RANKS = [(16, 16, 16), (4, 0, 8), (1, 2, 3), (0, 0, 0), (8, 8, 8)]


class Layer:
    def __init__(self, device, dtype, ranks=RANKS, share=slice(None), seed=0):
        generator = torch.Generator().manual_seed(seed)
        rank = len(range(MAX_RANK)[share])
        self.a = [torch.zeros(SLOTS, 1, rank, H_IN, dtype=dtype, device=device) for _ in WIDTHS]
        self.b = [torch.zeros(SLOTS, 1, width, MAX_RANK, dtype=dtype, device=device) for width in WIDTHS]
        self.layer = tables.Layer(self.a, self.b)
        tables.add(self.layer)
        for slot, by_slice in enumerate(ranks):
            for s, r in enumerate(by_slice):
                a = torch.zeros(MAX_RANK, H_IN)
                a[:r] = torch.randn(r, H_IN, generator=generator) * H_IN**-0.5
                self.a[s][slot, 0] = a[share]
                self.b[s][slot, 0, :, :r] = torch.randn(WIDTHS[s], r, generator=generator)
            self.layer.read_ranks(slot)

    def remove(self):
        tables.remove([self.layer])


@pytest.fixture
def make_layer():
    layers = []

    def make(*args, **kwargs):
        layers.append(Layer(*args, **kwargs))
        return layers[-1]

    yield make
    for layer in layers:
        layer.remove()


def rows_of(device, seed=1, indices=None):
    if indices is None:
        indices = torch.randint(-1, SLOTS, (ROWS,), generator=torch.Generator().manual_seed(seed))
    batch = pk.LoraBatch(indices.to(device), SLOTS, capacity=ROWS + 4)
    nobody = torch.tensor([bool((indices < 0).all())])
    return indices, (batch.order, batch.segment_adapter, batch.segment_start, batch.counts, nobody, segments_of(batch))


def segments_of(batch):
    return torch.tensor([len(batch.segment_adapter)], dtype=torch.int32)


def randn(*shape, device, dtype, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact_linear(y, x, layer, indices, scale):
    """y after the call and the sums of its |terms|, in float64."""
    exact, terms = y.double().cpu(), y.double().abs().cpu()
    for t, slot in enumerate(indices.tolist()):
        if slot < 0:
            continue
        column = 0
        for a, b in zip(layer.a, layer.b, strict=True):
            a, b = (w[slot, 0].double().cpu() for w in (a, b))
            v = a @ x[t].double().cpu()
            exact[t, column : column + len(b)] += scale * (b @ v)
            terms[t, column : column + len(b)] += abs(scale) * (b.abs() @ (a.abs() @ x[t].double().cpu().abs()))
            column += len(b)
    return exact, terms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_linear(dtype, scale, device, make_layer):
    layer, (indices, batch) = make_layer(device, dtype), rows_of(device)
    x, y = (randn(ROWS, n, device=device, dtype=dtype, seed=n) for n in (H_IN, sum(WIDTHS) + 8))
    exact, terms = exact_linear(y, x, layer, indices, scale)
    before = y.clone()
    ops.linear(y, x, layer.a, layer.b, batch, WIDTHS, scale)
    assert_close(y.cpu(), exact, terms=terms, extra=terms * 2.0**-15 if device == "cuda" else 0.0)
    nobody = (indices < 0) | (indices == 3)
    assert torch.equal(y[nobody], before[nobody])
    assert torch.equal(y[:, sum(WIDTHS) :], before[:, sum(WIDTHS) :])


def test_ranks_are_those_of_the_weights(device, make_layer):
    layer = make_layer(device, torch.bfloat16)
    found = tables.of(layer.a, layer.b)
    assert found.ranks.T.tolist() == [list(ranks) for ranks in RANKS]
    assert found is tables.of(layer.a, layer.b)
    # A zero row in between, and another adapter in the slot: the tensor stays, with another rank in it.
    layer.a[0][0, 0, 3] = 0
    layer.a[0][3, 0, :7] = 1
    layer.layer.read_ranks(0)
    layer.layer.read_ranks(3)
    assert found.ranks[0].tolist() == [16, 4, 1, 7, 8]
    # What is read from B alone.
    assert tables.of(None, layer.b).ranks.T.tolist() == [list(ranks) for ranks in RANKS]


def test_a_slot_that_gets_a_larger_rank(device, make_layer):
    """The case in which ranks of the past would lose a part of the adapter."""
    layer, (indices, batch) = make_layer(device, torch.float32, ranks=[(2, 2, 2)] * SLOTS), rows_of(device)
    x, y = (randn(ROWS, n, device=device, dtype=torch.float32, seed=n) for n in (H_IN, sum(WIDTHS)))
    with torch.inference_mode():  # as vLLM's first call, while slots are filled outside of it
        ops.linear(y.clone(), x, layer.a, layer.b, batch, WIDTHS, 1.0)
    for s in range(len(WIDTHS)):
        layer.a[s][4].normal_(std=0.1)
        layer.b[s][4].normal_()
    layer.layer.read_ranks(4)
    exact, terms = exact_linear(y, x, layer, indices, 1.0)
    ops.linear(y, x, layer.a, layer.b, batch, WIDTHS, 1.0)
    assert (indices == 4).any()
    assert_close(y.cpu(), exact, terms=terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shrink(dtype, device, make_layer):
    layer, (indices, batch) = make_layer(device, dtype), rows_of(device)
    x = randn(ROWS, H_IN, device=device, dtype=dtype)
    exact, terms = (torch.zeros(len(WIDTHS), ROWS, MAX_RANK, dtype=torch.float64) for _ in range(2))
    for (s, a), (t, slot) in itertools.product(enumerate(layer.a), enumerate(indices.tolist())):
        if slot >= 0:
            exact[s, t] = a[slot, 0].double().cpu() @ x[t].double().cpu()
            terms[s, t] = a[slot, 0].double().cpu().abs() @ x[t].double().cpu().abs()
    for is_exact in (False, True):
        y = torch.full(exact.shape, 7.0, device=device)  # what was there does not count
        ops.shrink(y, x, layer.a, batch, 1.0, exact=is_exact)
        rounding = torch.finfo(dtype).eps ** (2 if is_exact else 1)  # of two numbers, or of one
        allowed = rounding * exact.abs() + 4 * 2.0**-24 * terms
        assert bool(((y.double().cpu() - exact).abs() <= allowed).all()), is_exact
        # Rows without an adapter and ranks that it has not: zero, for workers add and concatenate them.
        assert torch.equal(y.cpu()[exact == 0], torch.zeros_like(y.cpu()[exact == 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expand(dtype, device, make_layer):
    layer, (indices, batch) = make_layer(device, dtype), rows_of(device)
    start = 8
    v = randn(len(WIDTHS), ROWS, MAX_RANK, device=device, dtype=torch.float32)
    y = randn(ROWS, sum(WIDTHS) + 2 * start, device=device, dtype=dtype)
    exact, terms, before = y.double().cpu(), y.double().abs().cpu(), y.clone()
    rounded = v.to(dtype).double().cpu()
    for t, slot in enumerate(indices.tolist()):
        column = start
        for s, b in enumerate(layer.b):
            if slot >= 0:
                rank = RANKS[slot][s]  # beyond it B is zero
                product = b[slot, 0, :, :rank].double().cpu() * rounded[s, t, :rank]
                exact[t, column : column + WIDTHS[s]] += product.sum(1)
                terms[t, column : column + WIDTHS[s]] += product.abs().sum(1)
            column += WIDTHS[s]
    ops.expand(y, v, layer.b, batch, WIDTHS, start)
    assert_close(y.cpu(), exact, terms=terms, extra=terms * 2.0**-15 if device == "cuda" else 0.0)
    assert torch.equal(y[:, :start], before[:, :start])
    assert torch.equal(y[:, start + sum(WIDTHS) :], before[:, start + sum(WIDTHS) :])


def test_sizes_that_do_not_fit(make_layer):
    """The kernels get addresses: what would be read beyond a tensor is refused before."""
    layer, (_, batch) = make_layer("cpu", torch.float32), rows_of("cpu")
    x, y = torch.zeros(ROWS, H_IN), torch.zeros(ROWS, sum(WIDTHS))
    v = torch.zeros(len(WIDTHS), ROWS, MAX_RANK)
    with pytest.raises(RuntimeError, match=r"x must have 96 columns, got \(23, 97\)"):
        ops.linear(y, torch.zeros(ROWS, H_IN + 1), layer.a, layer.b, batch, WIDTHS, 1.0)
    with pytest.raises(RuntimeError, match=r"widths must be at most B's, \[64, 32, 40\], got \[64, 33, 39\]"):
        ops.linear(y, x, layer.a, layer.b, batch, (64, 33, 39), 1.0)
    with pytest.raises(RuntimeError, match="widths must be"):
        ops.expand(y, v, layer.b, batch, (64, 32), 0)
    with pytest.raises(RuntimeError, match=r"x must have shape \(3, 23, 16\)"):
        ops.expand(y, v[..., :8], layer.b, batch, WIDTHS, 0)
    with pytest.raises(RuntimeError, match=r"y must have shape \(3, 23, 16\)"):
        ops.shrink(v[:2], x, layer.a, batch, 1.0, exact=False)
    for a, b in (
        (layer.a[:2], layer.b),
        ([t[:, :, :8] for t in layer.a], layer.b),
        (layer.a, [t.half() for t in layer.b]),
        (layer.a, [t[:4] for t in layer.b]),
    ):
        with pytest.raises(RuntimeError, match="A must be"):
            tables.Tables(a, b)


def test_nobody(device, make_layer):
    """A batch in which no row has an adapter: nothing is done, whatever its other tensors still say."""
    layer, (_, batch) = make_layer(device, torch.bfloat16), rows_of(device)
    nobody = (*batch[:-2], torch.tensor([True]), batch[-1])
    x, y = (randn(ROWS, n, device=device, dtype=torch.bfloat16, seed=n) for n in (H_IN, sum(WIDTHS)))
    before, v = y.clone(), torch.ones(len(WIDTHS), ROWS, MAX_RANK, device=device)
    ops.linear(y, x, layer.a, layer.b, nobody, WIDTHS, 1.0)
    ops.expand(y, v, layer.b, nobody, WIDTHS, 0)
    ops.shrink(v, x, layer.a, nobody, 1.0, exact=True)
    assert torch.equal(y, before)
    assert not v.any()


def test_segments_in_use(device, make_layer):
    """Fewer segments: the same bits if all in use are among them; the rows of one that is not stay as they are."""
    layer, in_use = make_layer(device, torch.bfloat16), 3  # rows of none are a segment too
    indices, batch = rows_of(device, indices=torch.arange(ROWS) % in_use - 1)
    x, y = (randn(ROWS, n, device=device, dtype=torch.bfloat16, seed=n) for n in (H_IN, sum(WIDTHS)))
    before, results = y.clone(), {}
    for count in (len(batch[1]), len(batch[1]) + 5, in_use, in_use - 1):
        y.copy_(before)
        ops.linear(y, x, layer.a, layer.b, (*batch[:-1], torch.tensor([count])), WIDTHS, 1.0)
        results[count] = y.clone()
    whole = results.pop(len(batch[1]))
    fewer = results.pop(in_use - 1)
    assert all(torch.equal(result, whole) for result in results.values())
    left_out = (fewer != whole).any(1).cpu()
    assert left_out.any()
    assert torch.equal(fewer[left_out], before[left_out])
    assert len(set(indices[left_out].tolist())) == 1


@pytest.mark.parametrize("workers", [2, 4])
def test_shares_of_ranks_give_the_whole(workers, device, make_layer):
    """Fully sharded LoRA of a column-parallel layer: shares of A's rows, gathered, then B."""
    dtype, (indices, batch) = torch.bfloat16, rows_of(device)
    whole = make_layer(device, dtype)
    x, y = (randn(ROWS, n, device=device, dtype=dtype, seed=n) for n in (H_IN, sum(WIDTHS)))
    exact, terms = exact_linear(y, x, whole, indices, 1.0)
    size, gathered = MAX_RANK // workers, []
    for worker in range(workers):
        share = make_layer(device, dtype, share=slice(worker * size, (worker + 1) * size))
        v = torch.zeros(len(WIDTHS), ROWS, size, device=device)
        ops.shrink(v, x, share.a, batch, 1.0, exact=False)
        gathered.append(v)
    ops.expand(y, torch.cat(gathered, -1), whole.b, batch, WIDTHS, 0)
    assert_close(y.cpu(), exact, terms=terms, extra=terms * 2.0**-8)  # v is rounded to its type once


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device, make_layer):
    dtype, (_, batch) = torch.bfloat16, rows_of(device)
    first, second = make_layer(device, dtype), make_layer(device, dtype, seed=5)

    def layers(x):
        y = x.new_ones(len(x), sum(WIDTHS))
        for layer in (first, second):
            ops.linear(y, x, layer.a, layer.b, batch, WIDTHS, 1.0)
        v = torch.zeros(len(WIDTHS), len(x), MAX_RANK, device=x.device)
        ops.shrink(v, x, first.a, batch, 1.0, exact=True)
        ops.expand(y, v * 2, second.b, batch, WIDTHS, 0)
        return y

    compiled = torch.compile(layers, fullgraph=True, backend=backend, dynamic=True)
    with torch.inference_mode():
        for seed in (3, 4):
            x = randn(ROWS, H_IN, device=device, dtype=dtype, seed=seed)
            assert torch.equal(compiled(x), layers(x))


@pytest.mark.parametrize("op", ["linear", "shrink", "expand"])
def test_opcheck(op, make_layer):
    layer, (_, batch) = make_layer("cpu", torch.bfloat16), rows_of("cpu")
    x = randn(ROWS, H_IN, device="cpu", dtype=torch.bfloat16)
    y = torch.zeros(ROWS, sum(WIDTHS), dtype=torch.bfloat16)
    v = torch.zeros(len(WIDTHS), ROWS, MAX_RANK)
    arguments = {
        "linear": (y, x, layer.a, layer.b, *batch, list(WIDTHS), 1.0),
        "shrink": (v, x, layer.a, *batch, 1.0, True),
        "expand": (y, v, layer.b, *batch, list(WIDTHS), 0),
    }[op]
    # (The tests of autograd's registration want ops that can be differentiated.)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.punica_kernels_vllm, op).default, arguments, test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available() or not pk.has_cuda(), reason="needs CUDA")
def test_captured_calls_see_adapters_and_rows_change():
    dtype, device = torch.bfloat16, "cuda"
    layer = Layer(device, dtype, ranks=[(2, 2, 2)] * SLOTS)
    batch = pk.LoraBatch(torch.full((ROWS,), -1, device=device), SLOTS)
    nobody = torch.tensor([False])  # as in vLLM's captures: what is read on the host counts while capturing
    rows = (batch.order, batch.segment_adapter, batch.segment_start, batch.counts, nobody, segments_of(batch))
    x, y = (randn(ROWS, n, device=device, dtype=dtype, seed=n) for n in (H_IN, sum(WIDTHS)))
    v = torch.zeros(len(WIDTHS), ROWS, MAX_RANK, device=device)

    def step():
        ops.linear(y, x, layer.a, layer.b, rows, WIDTHS, 1.0)
        ops.shrink(v, x, layer.a, rows, 1.0, exact=True)
        ops.expand(y, v, layer.b, rows, WIDTHS, 0)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, rank in ((1, 16), (2, 3)):
        for s in range(len(WIDTHS)):
            layer.a[s].zero_()
            layer.a[s][:, :, :rank].normal_(std=0.1)
            layer.b[s][..., :rank].normal_()
        for slot in range(SLOTS):
            layer.layer.read_ranks(slot)
        batch.update(rows_of(device, seed)[0].to(device))
        before = y.clone()
        graph.replay()
        replayed = y.clone()
        y.copy_(before)
        step()
        assert torch.equal(replayed, y)
        assert not torch.equal(before, y)
    layer.remove()


def test_the_plugin_is_there_without_vllm(monkeypatch):
    """Its module can be imported, and PUNICA_VLLM is all that it asks when it is off."""
    import sys

    from punica_kernels import vllm as plugin

    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    monkeypatch.setenv("PUNICA_VLLM", "0")
    plugin.register()
    monkeypatch.delenv("PUNICA_VLLM")
    with pytest.raises(ImportError):
        plugin.register()

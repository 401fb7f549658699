import itertools

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, beside, check_bgmv, check_sgmv, int32, make_adapters, randn, strided

SGMV = ["sgmv_shrink", "sgmv_cutlass"]
# (h_in, h_out): both directions, odd ones, every rank that the contract names, and widths around vector lengths.
SHAPES = [
    (1, 1), (7, 3), (2, 65), (33, 16), (16, 33), (576, 8), (8, 576), (255, 5), (5, 255), (1537, 64), (64, 1537),
    (100, 101), (300, 512), (512, 300), (4096, 16), (16, 4096), (129, 1), (1, 129), (31, 100), (640, 3), (3, 640),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h_in", "h_out"), SHAPES)
def test_bgmv(h_in, h_out, dtype, device):
    check_bgmv(h_in, h_out, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("name", SGMV)
def test_sgmv(name, d_in, d_out, dtype, device):
    check_sgmv(name, d_in, d_out, dtype, device)


SEGMENTS = {
    "none": ((), 5),
    "all empty": (((0, 0), (3, 3), (5, 5)), 5),
    "no rows": (((0, 0),), 0),
    "one row each": (tuple((i, i + 1) for i in range(9)), 9),
    "gaps": (((2, 5), (7, 8), (8, 8), (11, 30)), 33),
    "padding": (((0, 3), (-1, -1), (3, 5), (-1, -1), (99, 99)), 5),
    "not in order": (((20, 24), (0, 3), (10, 10), (5, 19)), 24),
    "long": (((0, 150), (150, 163)), 170),
    "tile edges": (((0, 4), (4, 12), (12, 28), (28, 60), (60, 77)), 77),
}


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("name", SGMV)
def test_segments(name, segments, device):
    for dtype in DTYPES:
        check_sgmv(name, 40, 24, dtype, device, *SEGMENTS[segments])


@pytest.mark.parametrize("stride", [1, 520, 4097])
@pytest.mark.parametrize("name", SGMV)
def test_row_stride_of_a_single_row(name, stride, device):
    """It says nothing, so it may be anything."""

    def with_stride(rows):
        return torch.as_strided(rows, rows.shape, (stride, 1))

    for dtype in DTYPES:
        y = check_sgmv(name, 512, 40, dtype, device, ((0, 1),), 1, rows=with_stride)
        assert y.stride(0) == stride


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", ["dispatch_bgmv", *SGMV])
def test_strided_rows(run, dtype, device):
    y = (
        check_bgmv(37, 19, dtype, device, rows=strided)
        if run == "dispatch_bgmv"
        else check_sgmv(run, 37, 19, dtype, device, rows=strided)
    )
    assert beside(y).isnan().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0, 3.7])
def test_scale(scale, device):
    for dtype in DTYPES:
        check_bgmv(48, 16, dtype, device, scale=scale)


def test_nothing_to_do(device):
    table = torch.zeros(3, dtype=torch.int64, device=device)  # null addresses, none of them used
    for y_shape, x_shape, indices in [((0, 4), (0, 8), []), ((2, 4), (2, 0), [0, 2]), ((2, 0), (2, 8), [0, 2])]:
        y, x = torch.ones(y_shape, device=device), torch.ones(x_shape, device=device)
        pk.dispatch_bgmv(y, x, table, torch.tensor(indices, dtype=torch.int64, device=device), 0, 1.0)
        for name in SGMV:
            getattr(pk, name)(y, x, table[:1], int32([0], device), int32([len(y)], device), None, 0)
        assert (y == 1).all()
    y, x = torch.ones(2, 4, device=device), torch.ones(2, 8, device=device)
    pk.dispatch_bgmv(y, x, table, torch.tensor([-1, -5], device=device), 0, 1.0)
    pk.dispatch_bgmv(y, x, table[:0], torch.tensor([-1, -5], device=device), 0, 1.0)
    assert (y == 1).all()


def test_unaligned_weights(device):
    """Weights need the alignment of their element only, and the bits do not depend on it."""
    for dtype in DTYPES:
        results = []
        for shift in (0, 1, 3):
            memory = torch.zeros(16 * 40 + 8, dtype=dtype, device=device)
            memory[shift : shift + 640] = randn(640, dtype=dtype, device=device)
            w_ptr = torch.tensor([memory[shift:].data_ptr()], device=device)
            x, index = (
                randn(3, 40, dtype=dtype, device=device, seed=4),
                torch.zeros(3, dtype=torch.int64, device=device),
            )
            bgmv, shrink, cutlass = (torch.zeros(3, 16, dtype=dtype, device=device) for _ in range(3))
            pk.dispatch_bgmv(bgmv, x, w_ptr, index, 0, 1.0)
            pk.sgmv_shrink(shrink, x, w_ptr, int32([0], device), int32([3], device), None, 0)
            pk.sgmv_cutlass(cutlass, x, w_ptr, int32([0], device), int32([3], device), None, 0)
            results.append((bgmv, shrink, cutlass))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_rows_and_adapters_do_not_matter(device):
    """NaN and Inf in another row's input or another adapter's weights stay there; in a row's own data they count."""
    for dtype in DTYPES:
        adapters = make_adapters(3, 24, 40, dtype, device)
        x = randn(4, 40, dtype=dtype, device=device)
        index = torch.tensor([0, 1, 2, 0], device=device)
        clean = torch.zeros(4, 24, dtype=dtype, device=device)
        pk.dispatch_bgmv(clean, x, adapters.w_ptr, index, 1, 1.0)
        x[1], adapters.weights[2][1] = float("inf"), float("nan")
        dirty = torch.zeros_like(clean)
        pk.dispatch_bgmv(dirty, x, adapters.w_ptr, index, 1, 1.0)
        assert torch.equal(dirty[[0, 3]], clean[[0, 3]])
        assert not dirty[1].isfinite().any()
        assert dirty[2].isnan().all()
        starts, ends = int32([0, 1, 2], device), int32([1, 2, 4], device)
        for name, transposed in (("sgmv_shrink", False), ("sgmv_cutlass", True)):
            weights = [w.mT.contiguous() if transposed else w for w in adapters.weights]
            table = torch.tensor([weights[i].data_ptr() for i in (0, 1, 0)], device=device)
            y = torch.zeros_like(clean)
            getattr(pk, name)(y, x, table, starts, ends, None, 1)
            assert y[[0, 2, 3]].isfinite().all()
            assert not y[1].isfinite().any()
    x[0], adapters.weights[0][1, :, 7] = 0, float("nan")  # 0 * NaN inside a row's own data
    y = torch.zeros_like(clean)
    pk.dispatch_bgmv(y, x, adapters.w_ptr, index, 1, 1.0)
    assert y[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h_in", "h_out"), [(576, 16), (16, 576), (37, 100), (1030, 5)])
def test_a_row_alone(h_in, h_out, dtype, device):
    """A row's bits do not depend on the rest of the batch, on its place in it, or on how segments are cut."""
    total = 70
    adapters = make_adapters(3, h_out, h_in, dtype, device)
    flipped = [w.mT.contiguous() for w in adapters.weights]
    tables = {
        "dispatch_bgmv": adapters.w_ptr,
        "sgmv_shrink": adapters.w_ptr,
        "sgmv_cutlass": torch.tensor([w.data_ptr() for w in flipped], device=device),
    }
    x = randn(total, h_in, dtype=dtype, device=device, seed=3)
    index = torch.arange(total, device=device) % 3
    y0 = randn(total, h_out, dtype=dtype, device=device, seed=4)
    batch = y0.clone()
    pk.dispatch_bgmv(batch, x, adapters.w_ptr, index, 1, 0.3)
    for row in [0, 1, 17, 63, 64, 69]:
        alone = y0[row : row + 1].clone()
        pk.dispatch_bgmv(alone, x[row : row + 1], adapters.w_ptr, index[row : row + 1], 1, 0.3)
        assert torch.equal(alone[0], batch[row])
    for name in SGMV:
        whole = y0.clone()
        getattr(pk, name)(whole, x, tables[name][:1], int32([0], device), int32([total], device), None, 1)
        for cuts in ([0, 70], [0, 1, 2, 3, 70], [0, 4, 12, 29, 70], [0, 33, 34, 66, 70], list(range(71))):
            y = y0.clone()
            one = tables[name][:1].expand(len(cuts) - 1).contiguous()
            getattr(pk, name)(y, x, one, int32(cuts[:-1], device), int32(cuts[1:], device), None, 1)
            assert torch.equal(y, whole), (name, cuts)


@pytest.mark.parametrize("run", ["dispatch_bgmv", *SGMV])
def test_threads_do_not_change_bits(run, threads):
    for h_in, h_out in ((3000, 16), (16, 3000), (700, 300)):
        results = []
        for count in (1, 2, 5):
            threads(count)
            if run == "dispatch_bgmv":
                results.append(check_bgmv(h_in, h_out, torch.bfloat16))
            else:
                results.append(check_sgmv(run, h_in, h_out, torch.bfloat16, segments=((0, 1), (1, 90)), total=90))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_bgmv(data):
    h_in, h_out = (data.draw(st.integers(1, 200)) for _ in range(2))
    indices = data.draw(st.lists(st.integers(-2, 2), max_size=12))
    check_bgmv(h_in, h_out, data.draw(st.sampled_from(DTYPES)), indices=indices, scale=data.draw(st.floats(-4, 4)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_sgmv(data):
    d_in, d_out = (data.draw(st.integers(1, 200)) for _ in range(2))
    cuts = sorted(data.draw(st.lists(st.integers(0, 60), max_size=12)))
    segments = list(itertools.pairwise(cuts))
    segments = [s for s in segments if data.draw(st.booleans())]
    segments = data.draw(st.permutations(segments))
    rows = data.draw(st.sampled_from([None, strided]))
    check_sgmv(
        data.draw(st.sampled_from(SGMV)), d_in, d_out, data.draw(st.sampled_from(DTYPES)), segments=segments, total=60,
        rows=rows,
    )  # fmt: skip


def test_tmp_size():
    sizes = [pk.sgmv_cutlass_tmp_size(n) for n in (0, 1, 2, 64, 10_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 1
    assert all(type(size) is int for size in sizes)

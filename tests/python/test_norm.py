import math

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, beside, randn, strided
from punica_kernels import reference
from tolerances import assert_close

COLUMNS = [1, 2, 3, 7, 16, 31, 64, 65, 100, 576, 1000, 4096, 4099, 16384]


def check(rows, columns, dtype, device="cpu", epsilon=1e-5, layout=lambda t: t, residual=False):
    x = layout(randn(rows, columns, dtype=dtype, device=device, seed=columns))
    weight = randn(columns, dtype=dtype, device=device, seed=1)
    before = layout(randn(rows, columns, dtype=dtype, device=device, seed=2)) if residual else None
    ours_residual = layout(before.clone()) if residual else None
    output = layout(torch.full((rows, columns), math.nan, dtype=dtype, device=device))
    exact = torch.empty(rows, columns, dtype=torch.float64, device=device)
    reference.rms_norm(exact, x, weight, epsilon, residual=before)
    pk.rms_norm(output, x, weight, epsilon, residual=ours_residual)
    assert_close(output, exact)
    if residual:
        assert torch.equal(ours_residual, before)  # one addition, rounded once: there is only one right answer
    return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rms_norm(columns, dtype, device):
    check(5, columns, dtype, device)
    check(5, columns, dtype, device, residual=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, device):
    for residual in (False, True):
        assert beside(check(7, 100, dtype, device, layout=strided, residual=residual)).isnan().all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.1, 100.0])
def test_epsilon(epsilon, device):
    for dtype in DTYPES:
        check(3, 64, dtype, device, epsilon=epsilon)


@pytest.mark.parametrize("residual", [False, True])
def test_in_place(residual, device):
    for dtype in DTYPES:
        for layout in (lambda t: t, strided):
            x = layout(randn(4, 99, dtype=dtype, device=device))
            weight = randn(99, dtype=dtype, device=device, seed=1)
            r = [randn(4, 99, dtype=dtype, device=device, seed=2) for _ in range(2)] if residual else [None, None]
            expected = torch.empty_like(x)
            pk.rms_norm(expected, x, weight, 1e-6, residual=r[0])
            pk.rms_norm(x, x, weight, 1e-6, residual=r[1])
            assert torch.equal(x, expected)


def test_extremes(device):
    """Squares that overflow float16 do not; a row of zeros gives zeros; NaN stays in its row."""
    x = torch.full((4, 64), 3e4, dtype=torch.float16, device=device)
    x[1], x[2, 5] = 0, math.nan
    weight, output = torch.ones(64, dtype=torch.float16, device=device), torch.empty_like(x)
    pk.rms_norm(output, x, weight, 1e-6)
    assert (output[[0, 3]] == 1).all()
    assert (output[1] == 0).all()
    assert output[2].isnan().all()


def test_no_elements(device):
    for rows, columns in ((0, 8), (3, 0), (0, 0)):
        x, weight = torch.empty(rows, columns, device=device), torch.ones(columns, device=device)
        pk.rms_norm(torch.empty_like(x), x, weight, 1e-6, residual=torch.empty_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone(dtype, device, threads):
    x, weight = randn(300, 577, dtype=dtype, device=device), randn(577, dtype=dtype, device=device, seed=1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(torch.empty_like(x))
        pk.rms_norm(results[-1], x, weight, 1e-6)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for row in (0, 1, 150, 299):
        alone = torch.empty(1, 577, dtype=dtype, device=device)
        pk.rms_norm(alone, x[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0], results[0][row])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any(data):
    layout = data.draw(st.sampled_from([lambda t: t, strided]))
    rows, columns = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 300))
    check(rows, columns, data.draw(st.sampled_from(DTYPES)), layout=layout, residual=data.draw(st.booleans()))

"""How far an operation may be from the exact result, element by element.

`exact` is the float64 result on the same (already rounded) inputs. Every operation accumulates in float32 and rounds
once, at the store, so the unit is the rounding of the output's type:

    |ours - exact| <= atol + rtol * |exact| + sums

rtol    2 units in the last place for float16 (2e-3) and bfloat16 (1.6e-2), 16 for float32 (2e-6).
atol    rtol times the largest |exact| of the row (all heads of the token) times 2^-4: an element that is small because
        larger terms cancelled cannot be more exact than they are.
sums    4 * 2^-24 * (sum of the |terms|): what float32 sums may lose, whatever cancels afterwards.

For attention there are two sums. The weighted sum of values adds 4 * 2^-24 * sum_j p_j |v_j|. A score is a sum too,
off by up to e = 4 * 2^-24 * sm_scale * sum_d |q_d k_d| (and sum_d |q_d k_d| <= |q| |k|), so that each p_j is off by a
factor of at most exp(2 e) after the normalisation: (exp(2 e) - 1) * sum_j p_j |v_j|. A soft cap has a slope of at most
1 and is computed in float32 itself: e += 4 * 2^-24 * cap. Rotation: an angle is right to 1e-5 rad, so a rotated score
to 2e-5 * sm_scale * |q| |k|, which goes into e in the same way.

On tensor cores (CUDA, float16 and bfloat16) the weights p_j, and q and k where they are rotated, are rounded to the
type, whose unit is u = 2^-11 or 2^-8: u * sum_j p_j |v_j| more, and with rotation 2.1 u * sm_scale * |q| |k| more in e.
"""

import math

import torch
from torch import Tensor

UNIT32 = 2.0**-24
RTOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}
ANGLE = 1e-5  # rad
TENSOR_CORE_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}


def assert_close(ours: Tensor, exact: Tensor, *, terms: Tensor | float = 0.0, extra: Tensor | float = 0.0) -> None:
    """`terms`: for each element the sum of the absolute values that were added up. `extra`: allowed beside all else."""
    assert exact.dtype == torch.float64
    assert ours.shape == exact.shape
    rtol = RTOL[ours.dtype]
    row = exact.abs().flatten(1).amax(1) if exact.numel() else exact.new_zeros(len(exact))
    row = row.reshape(-1, *[1] * (exact.dim() - 1))
    allowed = rtol * exact.abs() + rtol * row / 16 + 4 * UNIT32 * terms + extra
    error = (ours.double() - exact).abs()
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        worst = (error / allowed).nan_to_num(math.inf).argmax()
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are off, {bad.nonzero()[0].tolist()} first; the worst "
            f"by {error.flatten()[worst]:.3e} where {allowed.flatten()[worst]:.3e} is allowed: "
            f"got {ours.flatten()[worst]}, exact {exact.flatten()[worst]}"
        )


def score_error(q: Tensor, keys: Tensor, sm_scale: float, soft_cap: float = 0.0, rotated: bool = False) -> Tensor:
    """e of the module's text for each row and head of q [rows, H, D], keys [any, D]: a bound over all of the keys."""
    products = q.double().norm(dim=-1) * keys.double().norm(dim=-1).amax()
    e = 4 * UNIT32 * (abs(sm_scale) * products + soft_cap)
    if not rotated:
        return e
    return e + (2 * ANGLE + 2.1 * weight_rounding(q)) * abs(sm_scale) * products


def weight_rounding(q: Tensor) -> float:
    """The unit to which attention may round the weights of the keys."""
    return TENSOR_CORE_UNIT[q.dtype] if q.is_cuda else 0.0


def assert_close_lse(ours: Tensor, exact: Tensor, e: Tensor) -> None:
    """lse is in base 2; the sum of exponentials is off by 4 * 2^-24 of itself, which adds as much to its logarithm."""
    assert ours.dtype == torch.float32
    assert torch.equal(ours == -math.inf, exact == -math.inf)
    seen = exact != -math.inf
    allowed = RTOL[torch.float32] * exact.abs() + (e + 4 * UNIT32) / math.log(2)
    assert bool(((ours.double() - exact).abs() <= allowed)[seen].all())

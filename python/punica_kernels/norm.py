"""Root-mean-square normalisation."""

import torch
from torch import Tensor, get_num_threads
from torch._C import _increment_version, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ._dispatch import PLAIN, PLAIN_OR_NONE, explain, is_intercepted, refuse_grad_and_neg
from ._library import Kernel

_rms_norm = Kernel("rms_norm")
_shortcut = _rms_norm.shortcut

# Bytes of input that a call on the CPU takes about 100 us for: above, the GIL is released.
_LONG = 2_000_000


def rms_norm(output: Tensor, input: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None) -> None:
    """`output = input * rsqrt(mean(input^2) + epsilon) * weight`, row by row, in float32 with one rounding.

    With a `residual`, `residual += input` first (rounded to T), and that sum is normalised.

    Args:
        output: T [rows, columns], written. May be `input` itself. Rows may be strided (a slice of a wider tensor),
            here, in `input` and in `residual`. T is float16, bfloat16 or float32.
        input: T [rows, columns].
        weight: T [columns], contiguous.
        epsilon: added to the mean of squares; at least 0.
        residual: T [rows, columns], updated in place; must not overlap the other tensors.

    Raises:
        RuntimeError: an argument breaks this contract; nothing is written.
    """
    if not is_dynamo_compiling() and _shortcut(output, input, weight, epsilon, residual, _LONG):
        return
    direct = (
        not is_intercepted()
        and type(output) in PLAIN
        and type(input) in PLAIN
        and type(weight) in PLAIN
        and type(residual) in PLAIN_OR_NONE
    )
    if direct:
        _run_rms_norm(output, input, weight, epsilon, residual)
    else:
        torch.ops.punica_kernels.rms_norm(output, input, weight, epsilon, residual=residual)


# Runs the op on real tensors; the dispatcher's kernel for CPU and CUDA is this same function.
def _run_rms_norm(
    output: Tensor, input: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> None:
    try:
        if (
            output.is_neg()
            or input.is_neg()
            or weight.is_neg()
            or (residual is not None and (residual.is_neg() or (is_grad_enabled() and residual.requires_grad)))
            or (is_grad_enabled() and (output.requires_grad or input.requires_grad or weight.requires_grad))
        ):
            refuse_grad_and_neg("rms_norm", (output, input, weight, residual))
        kernel = _rms_norm.released if input.is_cpu and input.nbytes > _LONG else _rms_norm.held
        kernel(output, input, weight, epsilon, residual, get_num_threads())
    except (RuntimeError, AttributeError) as cause:
        explain("rms_norm", (output, input, weight, residual), cause)
    _increment_version((output,) if residual is None else (output, residual))

"""rms_norm, alone and with the residual stream, beside F.rms_norm."""

from collections.abc import Iterator

import punica_kernels as pk
import torch
import torch.nn.functional as F
from harness import Work, check_close
from torch import Tensor

DTYPE = torch.bfloat16
RTOL = 1.6e-2


def rms_norm(rows: int, columns: int, with_residual: bool, rotation: int) -> Work:
    name = f"rms_norm{' + residual' if with_residual else ''}, {rows} x {columns}"
    tensors = 3 if with_residual else 2
    num_sets = -(-rotation // (tensors * rows * columns * DTYPE.itemsize))
    x = torch.randn(num_sets, rows, columns).to(DTYPE)
    output = torch.empty_like(x)
    # Scaled down: every call adds the input once more.
    residual = (torch.randn(num_sets, rows, columns) * 1e-2).to(DTYPE) if with_residual else None
    weight = torch.rand(columns).to(DTYPE)

    def ours(i: int, residual: Tensor | None = residual) -> Tensor:
        pk.rms_norm(output[i], x[i], weight, 1e-5, residual=None if residual is None else residual[i])
        return output[i]

    def theirs(i: int, residual: Tensor | None = residual) -> Tensor:
        z = x[i] if residual is None else residual[i].add_(x[i])
        return F.rms_norm(z, (columns,), weight, 1e-5)

    def check() -> None:
        exact = torch.empty(rows, columns, dtype=torch.float64)
        for label, variant in {"ours": ours, "F.rms_norm": theirs}.items():
            pk.reference.rms_norm(
                exact, x[0], weight, 1e-5, residual=None if residual is None else residual[0].clone()
            )  # fmt: skip
            got = variant(0, None if residual is None else residual[:1].clone())
            check_close(f"{name}, {label}", got, exact, RTOL if variant is ours else 2 * RTOL)

    return Work(
        name=name,
        ours=ours,
        rivals={"torch: add_ + F.rms_norm" if with_residual else "torch: F.rms_norm": theirs},
        num_sets=num_sets,
        bytes=((4 if with_residual else 2) * rows + 1) * columns * DTYPE.itemsize,
        check=check,
    )


def works(rotation: int) -> Iterator[Work]:
    yield rms_norm(64, 4096, False, rotation)
    yield rms_norm(2048, 4096, False, rotation)
    yield rms_norm(2048, 4096, True, rotation)

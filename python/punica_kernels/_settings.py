"""What a caller sets for many calls, and what the library says about itself."""

import sys
import warnings
from types import TracebackType

import torch
from torch.compiler import is_compiling

from ._library import function, let_calls_wait

_set_checks = function("set_checks")
_set_early_reads = function("set_early_reads")
_active_isa, _last_isa, _supported_isas = function("active_isa"), function("last_isa"), function("supported_isas")
_has_cuda = function("has_cuda")
_active_cuda_arch, _last_cuda_arch = function("active_cuda_arch"), function("last_cuda_arch")


def _warn_checks_skipped() -> None:
    text = (
        "punica_kernels: the contents of index and pointer tensors are not checked while a CUDA graph is captured, "
        "though checks are on"
    )
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, but the operation has run: it must not look as if it had not
        print(text, file=sys.stderr)


function("set_on_checks_skipped")(_warn_checks_skipped)


def set_checks(on: bool) -> bool:
    """Whether CUDA calls check the contents of index and pointer tensors, which synchronises. Returns the value before.

    For the process; the environment variable PUNICA_CHECK=1 sets it at the start. CPU calls always check them. While a
    CUDA graph is captured they are not checked, which is said in one warning.
    """
    let_calls_wait(bool(on))
    return bool(_set_checks(bool(on)))


class early_reads:
    """Context manager: a promise about the CUDA calls inside, which lets them load data before earlier kernels end.

    The promise, for the calls inside and the graphs captured there: no kernel still in flight writes adapter weights,
    pointer and index tables, or KV pages, other than each sequence's newest token (`batch_decode`) or newest q_len
    tokens (`batch_prefill`). Without it, stream order holds for everything.

    It counts for the current thread, nests, and ends with the block even on an exception. Each launch reads it when
    called. Inside a torch.compiled function it has no effect; around the call of one it reaches the kernels.
    """

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        if not is_compiling():
            self._before.append(bool(_set_early_reads(True)))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not is_compiling():
            _set_early_reads(self._before.pop())


def active_isa() -> str:
    """The instruction set that CPU kernels run with: "baseline", "avx2", "avx512", "avx512_bf16" or "neon".

    The best that this CPU has, or the one that the environment variable PUNICA_ISA names.

    Raises:
        RuntimeError: PUNICA_ISA names none, or one that this CPU or build does not have.
    """
    return str(_active_isa())


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this CPU runs, from the slowest to the fastest."""
    return tuple(str(_supported_isas()).split(", "))


def last_isa() -> str | None:
    """The instruction set that the last CPU kernel called from this thread was compiled for, as it says itself."""
    name = _last_isa()
    return None if name is None else str(name)


def active_cuda_arch(device: torch.device | int | str | None = None) -> str:
    """The code path that CUDA kernels run with on `device` (default: the current one): "sm_80" or "sm_90".

    "sm_90" on Hopper, "sm_80" elsewhere, or the one that the environment variable PUNICA_CUDA_ARCH names.

    Raises:
        RuntimeError: there is no such device, it is older than compute capability 8.0, the library was built without
            CUDA, or PUNICA_CUDA_ARCH names no path or one that the device does not have.
    """
    if isinstance(device, int):
        index: int | None = device
    else:
        wanted = torch.device("cuda" if device is None else device)
        if wanted.type != "cuda":
            raise RuntimeError(f"punica_kernels.active_cuda_arch: device must be a CUDA device, got {wanted}")
        index = wanted.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return str(_active_cuda_arch(index))


def last_cuda_arch() -> str | None:
    """The code path of the last CUDA kernel launched from this thread, which is part of that kernel's name too."""
    name = _last_cuda_arch()
    return None if name is None else str(name)


def has_cuda() -> bool:
    """Whether the library was built with its CUDA backend."""
    return bool(_has_cuda())

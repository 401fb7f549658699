"""What a caller sets for many calls, and what the library says about itself."""

from types import TracebackType

from torch.compiler import is_compiling

from ._library import function

_set_checks = function("set_checks")
_set_early_reads = function("set_early_reads")
_active_isa, _last_isa, _has_cuda = function("active_isa"), function("last_isa"), function("has_cuda")


def set_checks(on: bool) -> bool:
    """Whether CUDA calls check the contents of index and pointer tensors, which synchronises. Returns the value before.

    For the process; the environment variable PUNICA_CHECK=1 sets it at the start. CPU calls always check them.
    """
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


def last_isa() -> str | None:
    """The instruction set that the last CPU kernel called from this thread was compiled for, as it says itself."""
    name = _last_isa()
    return None if name is None else str(name)


def has_cuda() -> bool:
    """Whether the library was built with its CUDA backend."""
    return bool(_has_cuda())

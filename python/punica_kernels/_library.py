"""The package's shared library and the functions in it."""

from pathlib import Path
from typing import Any

import tvm_ffi

NAME = "libpunica_kernels.so"


def _load() -> Any:
    # More than one place in an editable installation: the sources, and where the build was installed.
    from . import __path__ as places

    for place in places:
        path = Path(place) / NAME
        if path.exists():
            return tvm_ffi.load_module(str(path))
    raise ImportError(
        f"punica_kernels: its library {NAME} is not in {' or '.join(places)}. The package must be built: "
        "`pip install .` in the project's folder (a plain copy of the Python files is not enough)."
    )


_module = _load()


def function(name: str, *, release_gil: bool = False) -> Any:
    """A function of the library, called with the GIL held unless said otherwise.

    tvm-ffi releases it by default. With another busy Python thread a call then waits for its turn to take it back,
    which costs far more than a call that only launches work, so that is left to calls that compute for long.
    """
    loaded = _module.get_function(name)
    loaded.release_gil = release_gil
    return loaded


class Kernel:
    """One operation of the library, both ways: `held` for calls that are short."""

    __slots__ = ("_holding", "held", "released")

    def __init__(self, name: str) -> None:
        self._holding = function(name)
        self.released = function(name, release_gil=True)
        self.held = self.released if _checks() else self._holding
        _kernels.append(self)


_checks = function("checks")
_kernels: list[Kernel] = []


def let_calls_wait(on: bool) -> None:
    """Whether CUDA calls wait for the device, as checks of contents do: then no call is short."""
    for kernel in _kernels:
        kernel.held = kernel.released if on else kernel._holding

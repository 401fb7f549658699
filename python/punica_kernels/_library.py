"""The package's shared library and the functions in it."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tvm_ffi
from torch import _C, Tensor
from torch.autograd import forward_ad

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


def _set_up_shortcuts() -> bool:
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if api is None:
        return False
    try:  # None of this is promised by torch.
        plain = torch.zeros(1, device="cpu")
        negative = torch._neg_view(plain)
        tensors = [x for tensor in (plain, negative) for x in (id(tensor), tensor._cdata)]
        names = (vars(forward_ad), sys.intern("_current_level"), _C._increment_version)
    except (AttributeError, RuntimeError):
        return False
    objects = (Tensor, torch.nn.Parameter, int, float, tuple, list, None, True, False, RuntimeError, *names)
    return bool(function("set_up_tensors")(*map(ctypes.c_void_p, tensors), Tensor.__basicsize__)) and bool(
        function("set_up_shortcuts")(ctypes.c_void_p(id(objects)), ctypes.c_void_p(id(api)))
    )


_has_shortcuts = _set_up_shortcuts()


def _never(*_: object) -> bool:
    return False


class Kernel:
    """One operation of the library: `held` for calls that are short, `released` for others, `shortcut` for most.

    `shortcut` takes the tensors and numbers of an ordinary, short call, checks all that has to be checked, runs the
    operation and counts up the versions of what it wrote. It answers whether it did; if not, nothing has happened, and
    the call must go the long way. Dynamo cannot trace it.
    """

    __slots__ = ("_holding", "held", "released", "shortcut")

    def __init__(self, name: str) -> None:
        self.shortcut: Callable[..., bool] = _never
        if _has_shortcuts:
            self.shortcut = ctypes.cast(function(f"shortcut_{name}")(), ctypes.py_object).value
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

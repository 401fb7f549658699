"""vLLM's LoRA layers on this package's kernels: a plugin that vLLM loads itself (entry point `vllm.general_plugins`).

vLLM asks its platform for the class that computes LoRA, the Punica wrapper. `register` puts itself before that answer:
where this package can serve, it is `PunicaKernelsWrapperCPU` or `PunicaKernelsWrapperGPU`, otherwise vLLM's own; the
log says which and why. `PUNICA_VLLM=0` turns it off. Nothing here needs vLLM to be imported; `wrapper` does.
"""

import functools
import logging
import os
from typing import Any

# What the code in this folder was written for and tested with. With another version it runs if the parts of vLLM that
# it touches have not changed (interface.py), and says in the log that nobody has tested it.
TESTED_VERSIONS = ("0.32.0",)

# Below vLLM's logger, for only that one has a handler.
logger = logging.getLogger("vllm.punica_kernels")

OFF = ("0", "off", "false", "no")


def is_on() -> bool:
    return os.environ.get("PUNICA_VLLM", "1").strip().lower() not in OFF


def register() -> None:
    """Called by vLLM in every process, perhaps more than once."""
    if not is_on():
        # At warning level nowhere: it was asked for. In every process, as each takes its own way.
        logger.info("punica_kernels: PUNICA_VLLM=%s, LoRA stays with vLLM's own kernels", os.environ["PUNICA_VLLM"])
        return
    from vllm.platforms import current_platform

    platform = type(current_platform)
    vllms = platform.get_punica_wrapper
    if getattr(vllms, "punica_kernels", False):
        return

    @functools.wraps(vllms)
    def get_punica_wrapper(cls: Any) -> str:
        own = str(vllms())
        try:
            reason = _why_not(cls)
        except Exception as error:  # whatever this meets, vLLM must go on
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("punica_kernels: LoRA stays with vLLM's %s: %s", own.rpartition(".")[2], reason)
            return own
        return f"{__name__}.{_WRAPPERS[cls._enum.name]}"

    get_punica_wrapper.punica_kernels = True  # type: ignore[attr-defined]
    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


_WRAPPERS = {"CPU": "wrapper.PunicaKernelsWrapperCPU", "CUDA": "gpu.PunicaKernelsWrapperGPU"}


def _why_not(platform: Any) -> str | None:
    """Why this package cannot serve here; None if it can, and then all is prepared."""
    import vllm

    import punica_kernels

    name = str(platform._enum.name)
    if name not in _WRAPPERS:
        return f"there are kernels for CPU and CUDA, the platform is {name}"
    if name == "CUDA":
        if not punica_kernels.has_cuda():
            return "this build of punica_kernels has no CUDA backend"
        path = punica_kernels.active_cuda_arch()  # raises on devices that are too old
    else:
        path = punica_kernels.active_isa()
    from . import interface

    difference = interface.difference(name)
    if difference:
        return f"vLLM {vllm.__version__} is not one of {', '.join(TESTED_VERSIONS)} and differs: {difference}"
    from . import wrapper

    wrapper.install()
    tested = "" if str(vllm.__version__).partition("+")[0] in TESTED_VERSIONS else ", not tested with this vLLM"
    logger.info("punica_kernels %s: LoRA on its kernels (%s, %s%s)", punica_kernels.__version__, name, path, tested)
    return None

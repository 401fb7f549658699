"""Says what this installation is and what would run here.

    python -m punica_kernels.info [--json]

The version, what the library was built with (instruction sets, GPU code), and for each device of this machine the code
that it would run. Bug reports want it.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import punica_kernels as pk

from ._gpu_code import gpu_code
from ._library import NAME


def library_path() -> Path:
    return next(path for place in pk.__path__ if (path := Path(place) / NAME).exists())


def _cuda_devices() -> Iterator[dict[str, Any]]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        device = {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "capability": f"{major}.{minor}",
        }
        try:
            yield device | {"runs": pk.active_cuda_arch(index)}
        except RuntimeError as error:
            yield device | {"runs": None, "why": str(error)}


def collect() -> dict[str, Any]:
    """All that `python -m punica_kernels.info` prints."""
    library = library_path()
    return {
        "version": pk.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "apache-tvm-ffi": metadata.version("apache-tvm-ffi"),
        "library": str(library),
        "library_bytes": library.stat().st_size,
        "backends": ["cpu", "cuda"] if pk.has_cuda() else ["cpu"],
        "instruction_sets": list(pk.supported_isas()),
        "gpu_code": gpu_code(library),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("PUNICA_")},
        "devices": [
            {"device": "cpu", "name": platform.machine(), "runs": _cpu_runs(), "threads": torch.get_num_threads()},
            *_cuda_devices(),
        ],
    }


def _cpu_runs() -> str | None:
    try:
        return pk.active_isa()
    except RuntimeError:
        return None  # PUNICA_ISA names none that is here


def describe(info: dict[str, Any]) -> str:
    cuda = f"CUDA {info['torch_cuda']}" if info["torch_cuda"] else "no CUDA"
    lines = [
        f"punica_kernels {info['version']}",
        f"  Python {info['python']}, torch {info['torch']} ({cuda}), apache-tvm-ffi {info['apache-tvm-ffi']}",
        f"  library           {info['library']} ({info['library_bytes'] / 1e6:.1f} MB)",
        f"  backends          {', '.join(info['backends'])}",
        f"  instruction sets  {', '.join(info['instruction_sets'])}",
        f"  GPU code          {', '.join(info['gpu_code']) or 'none'}",
    ]
    lines += [f"  {name}={value}" for name, value in info["environment"].items()]
    lines.append("what would run here")
    for device in info["devices"]:
        runs = f"code path {device['runs']}" if device["runs"] else f"nothing: {device.get('why', 'see PUNICA_ISA')}"
        if device["device"] == "cpu":
            lines.append(f"  cpu     {device['name']}, {device['threads']} threads: {runs}")
        else:
            lines.append(f"  {device['device']}  {device['name']}, compute capability {device['capability']}: {runs}")
    if len(info["devices"]) == 1:
        if "cuda" not in info["backends"]:
            why = "this build has the CPU backend alone"
        elif info["torch_cuda"] is None:
            why = "torch was built without CUDA"
        else:
            why = "torch finds no device"
        lines.append(f"  cuda    nothing: {why}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m punica_kernels.info", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    info = collect()
    print(json.dumps(info, indent=1) if parser.parse_args(arguments).json else describe(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())

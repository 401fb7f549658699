"""Says what this installation is and what would run here.

    python -m punica_kernels.info [--json]

The version, what the library was built with (instruction sets, GPU code), and for each device of this machine the code
that it would run. Bug reports want it.
"""

import argparse
import json
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import punica_kernels as pk

from ._library import NAME

_FATBIN_MAGIC = 0xBA55ED50
_PTX = 1
_ARCH_SPECIFIC = 1 << 20  # "sm_90a": only for that very architecture


def library_path() -> Path:
    return next(path for place in pk.__path__ if (path := Path(place) / NAME).exists())


def _section(elf: bytes, wanted: str) -> memoryview:
    """The bytes of a section of a 64-bit little-endian ELF file; none if it is not there."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if elf[start : elf.index(b"\0", start)] == wanted.encode():
            return memoryview(elf)[offset : offset + length]
    return memoryview(b"")


def gpu_code(library: Path) -> list[str]:
    """What GPU code a library carries, read from its fat binaries: machine code ("sm_90a") and PTX ("compute_80").

    PTX is compiled by the driver for devices that have no machine code here, if they are not older.
    """
    return sorted(set(_entries(_section(library.read_bytes(), ".nv_fatbin"))))


def _entries(section: memoryview) -> Iterator[str]:
    at = 0
    while at + 16 <= len(section):
        magic, _, header, size = struct.unpack_from("<IHHQ", section, at)
        if magic != _FATBIN_MAGIC:
            at += 8  # what aligns the next one
            continue
        entry, at = at + header, at + header + size
        while entry + 64 <= at:
            kind, _, header, size = struct.unpack_from("<HHIQ", section, entry)
            (arch,) = struct.unpack_from("<I", section, entry + 28)
            (flags,) = struct.unpack_from("<Q", section, entry + 40)
            yield f"{'compute' if kind == _PTX else 'sm'}_{arch}{'a' if flags & _ARCH_SPECIFIC else ''}"
            entry += header + size


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

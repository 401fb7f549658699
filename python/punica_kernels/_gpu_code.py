"""What GPU code a library carries. Nothing but the standard library: what checks a wheel reads it too."""

import struct
from collections.abc import Iterator
from pathlib import Path

_FATBIN_MAGIC = 0xBA55ED50
_PTX = 1
_ARCH_SPECIFIC = 1 << 20  # "sm_90a": only for that very architecture


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

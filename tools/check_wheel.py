"""What a wheel must be before it is released: exit code 0, or every reason why not.

    python tools/check_wheel.py WHEEL

A manylinux tag, less than 60 MB, GPU code for every path, licences of what is linked in, no library beside the system's
and apache-tvm-ffi's, hashes that are right, and an SBOM beside it that is about this very file.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[1]
MAX_BYTES = 60_000_000
LIBRARY = "punica_kernels/libpunica_kernels.so"
GPU_CODE = {"sm_80", "sm_90a", "compute_80"}
SYSTEM = {"libtvm_ffi.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0",
          "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
LICENSES = {"LICENSE", *(f"licenses/{path.name}" for path in (ROOT / "licenses").glob("*.txt"))}


def gpu_code(library: bytes) -> set[str]:
    """As `python -m punica_kernels.info` finds it, without importing the package."""
    spec = importlib.util.spec_from_file_location("gpu_code", ROOT / "python/punica_kernels/_gpu_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.NamedTemporaryFile() as file:
        file.write(library)
        file.flush()
        return set(module.gpu_code(Path(file.name)))


def problems(wheel: Path) -> Iterator[str]:
    if not re.fullmatch(r"punica_kernels-[\w.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name):
        yield f"its tag is not that of one manylinux wheel for every Python 3: {wheel.name}"
    if wheel.stat().st_size >= MAX_BYTES:
        yield f"it has {wheel.stat().st_size} bytes, {MAX_BYTES} are too many"
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    info = next(name for name in files if name.endswith(".dist-info/RECORD")).removesuffix("RECORD")
    yield from record_problems(files, info)
    missing = sorted(name for name in LICENSES if info + "licenses/" + name not in files)
    if missing:
        yield f"licences are missing: {', '.join(missing)}"
    if LIBRARY not in files:
        yield f"{LIBRARY} is missing"
        return
    code = gpu_code(files[LIBRARY])
    if GPU_CODE - code:
        has = ", ".join(sorted(code)) or "none: was there an nvcc when it was built?"
        yield f"GPU code must be {', '.join(sorted(GPU_CODE))}; it has {has}"
    dynamic = ELFFile(io.BytesIO(files[LIBRARY])).get_section_by_name(".dynamic")
    foreign = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} - SYSTEM
    if foreign:
        yield f"it needs {', '.join(sorted(foreign))}"
    yield from sbom_problems(wheel)


def record_problems(files: dict[str, bytes], info: str) -> Iterator[str]:
    rows = list(csv.reader(io.StringIO(files[info + "RECORD"].decode())))
    listed = {row[0] for row in rows}
    if listed != set(files):
        yield f"RECORD and contents differ: {sorted(listed ^ set(files))}"
    for name, digest, _ in rows:
        if name in files and not name.endswith("RECORD"):
            ours = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
            if digest != f"sha256={ours}":
                yield f"RECORD has another hash of {name}"


def sbom_problems(wheel: Path) -> Iterator[str]:
    path = wheel.with_name(wheel.name + ".cdx.json")
    if not path.exists():
        yield f"there is no SBOM {path.name}"
        return
    hashes = json.loads(path.read_text())["metadata"]["component"]["hashes"]
    if {"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()} not in hashes:
        yield f"{path.name} is not about this file"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    wheel = Path(sys.argv[1])
    found = list(problems(wheel))
    for problem in found:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    if not found:
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, all is as it must be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

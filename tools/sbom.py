"""Writes the CycloneDX SBOM of a wheel: what is linked into it, what it needs, what built it.

    python tools/sbom.py WHEEL [--build build/release] [--output WHEEL.cdx.json]

Versions come from what the build used: the headers that its CMake cache names, the compilers, requirements-build.txt.
With SOURCE_DATE_EPOCH the file is the same on every run.
"""

import argparse
import datetime
import email.message
import hashlib
import json
import os
import re
import subprocess
import uuid
import zipfile
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CUDA_LICENSE = {"license": {"name": "NVIDIA CUDA Toolkit End User License Agreement", "url": "https://docs.nvidia.com/cuda/eula/"}}  # fmt: skip  # noqa: E501
APACHE = {"license": {"id": "Apache-2.0"}}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def cache_of(build: Path) -> dict[str, str]:
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return dict(re.findall(r"^(\w+):\w+=(.*)$", "\n".join(lines), re.MULTILINE))


def defined(header: Path, *names: str) -> list[str]:
    """The values of #defines."""
    text = header.read_text()
    found = [re.search(rf"^\s*#\s*define\s+{name}\s+\(?(\d+)", text, re.MULTILINE) for name in names]
    assert all(found), f"{header} does not define {names}"
    return [match.group(1) for match in found if match]


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def component(name: str, version: str, kind: str = "library", scope: str = "required", **more: Any) -> dict[str, Any]:
    ref = more.get("purl") or f"{name}@{version}"
    return {"type": kind, "bom-ref": ref, "name": name, "version": version, "scope": scope, **more}


def linked(note: str) -> list[dict[str, str]]:
    return [{"name": "punica:linkage", "value": note}]


def dlpack_include() -> Path:
    import tvm_ffi.libinfo

    return Path(tvm_ffi.libinfo.find_dlpack_include_path())


def parts(build: Path, has_gpu_code: bool) -> list[dict[str, Any]]:
    """What is inside the wheel's library beside the project's own code."""
    cache = cache_of(build)
    highway = Path(cache["PUNICA_HIGHWAY_INCLUDE_DIR"]) / "hwy"
    places = [path for path in (highway / "base.h", highway / "highway.h") if "define HWY_MAJOR" in path.read_text()]
    hwy = ".".join(defined(places[0], "HWY_MAJOR", "HWY_MINOR", "HWY_PATCH"))
    ffi = installed_version("apache-tvm-ffi")
    dlpack = ".".join(defined(dlpack_include() / "dlpack/dlpack.h", "DLPACK_MAJOR_VERSION", "DLPACK_MINOR_VERSION"))
    made = [
        component("highway", hwy, purl=f"pkg:github/google/highway@{hwy}", licenses=[APACHE],
                  properties=linked("headers")),
        component("apache-tvm-ffi", ffi, purl=f"pkg:pypi/apache-tvm-ffi@{ffi}", licenses=[APACHE],
                  properties=linked("headers")),
        component("dlpack", dlpack, purl=f"pkg:github/dmlc/dlpack@{dlpack}", licenses=[APACHE],
                  properties=linked("headers")),
    ]  # fmt: skip
    if has_gpu_code:
        # "[<include>][<libcudart>][<bin>][<version>]": what CMake's FindCUDAToolkit has found.
        found = re.findall(r"[^][;]+", cache["FIND_PACKAGE_MESSAGE_DETAILS_CUDAToolkit"])
        headers = [header for place in found if (header := Path(place) / "cuda_runtime_api.h").exists()]
        (number,) = defined(headers[0], "CUDART_VERSION")
        cuda = f"{int(number) // 1000}.{int(number) % 1000 // 10}"
        made.append(
            component("cudart_static", cuda, supplier={"name": "NVIDIA Corporation"}, licenses=[CUDA_LICENSE],
                      properties=linked("static"))
        )  # fmt: skip
    return made


def needed(metadata: email.message.Message) -> list[dict[str, Any]]:
    """The packages that an installation brings; which version is for the installer to choose."""
    made = []
    for requirement in metadata.get_all("Requires-Dist") or []:
        if "extra ==" in requirement:
            continue
        name = re.match(r"[\w.-]+", requirement).group()  # type: ignore[union-attr]
        made.append(
            {"type": "library", "bom-ref": f"pkg:pypi/{name}", "name": name, "purl": f"pkg:pypi/{name}",
             "scope": "required", "properties": [{"name": "punica:requires-dist", "value": requirement}]}
        )  # fmt: skip
    return made


def tools(build: Path, has_gpu_code: bool) -> list[dict[str, Any]]:
    """What built it; nothing of these is in the wheel."""
    cache = cache_of(build)
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements-build.in").read_text(), re.MULTILINE)
    made = [
        component(name, version, "application", "excluded", purl=f"pkg:pypi/{name}@{version}")
        for name, version in pins
        if name != "apache-tvm-ffi"  # named above, for its headers
    ]
    made.append(component("c++", first_line(cache["CMAKE_CXX_COMPILER"], "--version"), "application", "excluded"))
    made.append(component("cmake", first_line("cmake", "--version").split()[-1], "application", "excluded"))
    if has_gpu_code:
        text = subprocess.run([cache["CMAKE_CUDA_COMPILER"], "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"V([\d.]+)", text.stdout).group(1)  # type: ignore[union-attr]
        made.append(component("nvcc", version, "application", "excluded"))
    return made


def has_gpu_code(wheel: Path) -> bool:
    with zipfile.ZipFile(wheel) as archive:
        return b".nv_fatbin" in archive.read("punica_kernels/libpunica_kernels.so")


def sbom(wheel: Path, build: Path) -> dict[str, Any]:
    metadata, gpu = metadata_of(wheel), has_gpu_code(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name, version = metadata["Name"], metadata["Version"]
    root = component(name, version, purl=f"pkg:pypi/{name}@{version}?file_name={wheel.name}",
                     description=metadata["Summary"], licenses=[APACHE],
                     hashes=[{"alg": "SHA-256", "content": digest}])  # fmt: skip
    del root["scope"]
    inside, outside, built = parts(build, gpu), needed(metadata), tools(build, gpu)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    utc = datetime.timezone.utc
    now = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch else datetime.datetime.now(utc)
    refs = [part["bom-ref"] for part in (*inside, *outside)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": now.isoformat(timespec="seconds"),
            "tools": {"components": [{"type": "application", "name": "tools/sbom.py", "version": version}]},
            "component": root,
        },
        "components": [*inside, *outside, *built],
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": refs}, *({"ref": ref} for ref in refs)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or arguments.wheel.with_name(arguments.wheel.name + ".cdx.json")
    output.write_text(json.dumps(sbom(arguments.wheel, arguments.build), indent=1) + "\n")


if __name__ == "__main__":
    main()

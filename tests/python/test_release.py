"""What is released: the wheel in build/dist (or PUNICA_WHEEL), its SBOM and licences, and the pins that build it."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BUILD = pathlib.Path(os.environ.get("PUNICA_BUILD", ROOT / "build" / "release"))
WHEELS = [pathlib.Path(os.environ["PUNICA_WHEEL"])] if "PUNICA_WHEEL" in os.environ else []
WHEELS += (ROOT / "build" / "dist").glob("*.whl")

pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="the project is not beside the tests")
needs_a_wheel = pytest.mark.skipif(
    not WHEELS or not (BUILD / "CMakeCache.txt").exists(), reason="no wheel, or no build tree"
)


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path) -> pathlib.Path:
    """A copy of the wheel with a new SBOM beside it."""
    copy = tmp_path / WHEELS[0].name
    shutil.copy(WHEELS[0], copy)
    command = [sys.executable, ROOT / "tools/sbom.py", copy, "--build", BUILD]
    subprocess.run(command, check=True)
    return copy


def problems(wheel: pathlib.Path) -> str:
    pytest.importorskip("elftools")  # comes with auditwheel
    return "\n".join(tool("check_wheel").problems(wheel))


def changed(wheel: pathlib.Path, change) -> pathlib.Path:
    """The wheel with other files: change(files), name to bytes."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return wheel


# ------------------------------------------------------------------------------------------------------------- wheel


@needs_a_wheel
def test_the_wheel_is_as_it_must_be(wheel):
    from punica_kernels import has_cuda

    found = problems(wheel)
    if has_cuda():
        assert found == ""
    else:  # a build without nvcc is no release, and that is said
        assert re.fullmatch(r"GPU code must be .* it has none: was there an nvcc when it was built\?", found)


@needs_a_wheel
def test_licences_are_in_the_wheel():
    with zipfile.ZipFile(WHEELS[0]) as archive:
        names = [name.partition(".dist-info/licenses/")[2] for name in archive.namelist() if not name.endswith("/")]
        wanted = ["LICENSE", *(f"licenses/{path.name}" for path in (ROOT / "licenses").glob("*.txt"))]
        assert sorted(filter(None, names)) == sorted(wanted)
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    listed = (ROOT / "licenses" / "README.txt").read_text()
    for path in (ROOT / "licenses").glob("*.txt"):
        assert path.name == "README.txt" or path.name in listed
        assert len(path.read_text()) > 100


@needs_a_wheel
def test_what_is_refused(wheel):
    library = "punica_kernels/libpunica_kernels.so"
    before = problems(wheel)
    assert "is not about this file" not in before
    original = wheel.read_bytes()

    def drop_licence(files):
        del files[next(name for name in files if name.endswith("licenses/cuda-runtime.txt"))]

    def edit_python(files):
        files["punica_kernels/lora.py"] += b"\n"

    def rename_gpu_code(files):
        files[library] = files[library].replace(b".nv_fatbin", b".xx_fatbin")

    def drop_library(files):
        del files[library]

    for change, said in (
        (drop_licence, "licences are missing: licenses/cuda-runtime.txt"),
        (edit_python, "RECORD has another hash of punica_kernels/lora.py"),
        (rename_gpu_code, "it has none"),
        (drop_library, f"{library} is missing"),
    ):
        wheel.write_bytes(original)
        assert said not in problems(wheel) or change is rename_gpu_code
        found = problems(changed(wheel, change))
        assert said in found
        assert "is not about this file" in found or change is drop_library
    wheel.write_bytes(original)
    other = wheel.with_name("punica_kernels-0.1.0-py3-none-linux_x86_64.whl")
    wheel.rename(other)
    assert "its tag is not that of one manylinux wheel" in problems(other)
    assert "there is no SBOM" in problems(other)
    with other.open("ab") as file:
        file.truncate(60_000_000)
    with pytest.raises(zipfile.BadZipFile):
        problems(other)


def test_the_check_says_that_a_wheel_is_too_large(tmp_path):
    large = tmp_path / "punica_kernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(large, "w") as archive:
        archive.writestr("punica_kernels-0.1.0.dist-info/RECORD", "")
        archive.writestr("large", bytes(60_000_000))
    assert "60000" in problems(large) and "are too many" in problems(large)


# -------------------------------------------------------------------------------------------------------------- SBOM


@needs_a_wheel
def test_sbom(wheel):
    """The fields that CycloneDX 1.6 requires, and that all that is linked in or needed is named."""
    bom = json.loads(wheel.with_name(wheel.name + ".cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["specVersion"] == "1.6"
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
                        bom["serialNumber"])  # fmt: skip
    assert bom["version"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", bom["metadata"]["timestamp"])
    root = bom["metadata"]["component"]
    every = [root, *bom["components"]]
    for part in every:
        assert part["type"] in ("library", "application") and part["name"] and part["bom-ref"]
        assert part.get("scope", "required") in ("required", "excluded")
        assert re.match(r"pkg:[a-z]+/", part.get("purl", "pkg:none/"))
        for licence in part.get("licenses", []):
            assert licence["license"].get("id") or licence["license"]["name"]
        for entry in part.get("properties", []):
            assert set(entry) == {"name", "value"}
    assert all(re.fullmatch("[0-9a-f]{64}", entry["content"]) for entry in root["hashes"])
    refs = [part["bom-ref"] for part in every]
    assert len(set(refs)) == len(refs)
    for dependency in bom["dependencies"]:
        assert {dependency["ref"], *dependency.get("dependsOn", [])} <= set(refs)

    def named(how):
        return {part["name"]: part for part in bom["components"] if part.get("properties", [{}])[0].get("value") == how}

    assert set(named("headers")) == {"highway", "apache-tvm-ffi", "dlpack"}
    assert set(named("static")) == ({"cudart_static"} if tool("sbom").has_gpu_code(wheel) else set())
    assert all(re.match(r"\d+\.\d+", part["version"]) for how in ("headers", "static") for part in named(how).values())
    assert all(part["licenses"] for how in ("headers", "static") for part in named(how).values())
    needed = [part["name"] for part in bom["components"] if part["type"] == "library" and "version" not in part]
    assert needed == ["torch", "apache-tvm-ffi"]
    built = {part["name"]: part["version"] for part in bom["components"] if part.get("scope") == "excluded"}
    assert {"c++", "cmake", "scikit-build-core", "auditwheel"} <= set(built)


@needs_a_wheel
def test_sbom_is_the_same_on_every_run(wheel):
    outputs = []
    for _ in range(2):
        output = wheel.with_suffix(".json")
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        command = [sys.executable, ROOT / "tools/sbom.py", wheel, "--build", BUILD, "--output", output]
        subprocess.run(command, check=True, env=environment)
        outputs.append(output.read_text())
    assert outputs[0] == outputs[1]
    assert '"2023-11-14T22:13:20+00:00"' in outputs[0]


# -------------------------------------------------------------------------------------------------------------- pins


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_build_requirements_are_pinned_by_hash():
    text = (ROOT / "requirements-build.txt").read_text()
    locked, wanted = pins("requirements-build.txt"), pins("requirements-build.in")
    assert wanted.items() <= locked.items()
    entries = re.split(r"\n(?=[\w.-]+==)", text)[1:]
    assert len(entries) == len(locked)
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert not re.search(r"^\s*[\w.-]+\s*(>=|~=|$)", text, re.MULTILINE)
    assert not re.search(r"https?://|index-url", text)
    assert not set(wanted) & set(pins("requirements-dev.txt"))


def test_pins_satisfy_what_the_package_asks_for():
    """pyproject.toml asks for ranges, of which the pins are one choice."""
    packaging = pytest.importorskip("packaging.requirements")
    text = (ROOT / "pyproject.toml").read_text()
    locked = pins("requirements-build.txt") | pins("requirements-dev.txt")
    found = 0
    for key in ("requires", "dependencies"):
        for requirement in re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*)\]$", text, re.MULTILINE).group(1)):
            parsed = packaging.Requirement(requirement)
            assert parsed.specifier.contains(locked[parsed.name]), requirement
            found += 1
    assert found == 4

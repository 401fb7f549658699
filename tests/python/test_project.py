"""Rules of the sources: what may include what."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOREIGN = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|tvm|dlpack|Python|pybind11|nanobind)', re.MULTILINE)
PRINTS = re.compile(
    r"\b(?:printf|fprintf|abort|exit|puts|perror)\s*\(|std::(?:cout|cerr|clog|terminate)|^\s*throw\b", re.M
)
SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".inc"}


def sources(*folders: str) -> list[pathlib.Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES]


pytestmark = pytest.mark.skipif(not (ROOT / "src").is_dir(), reason="the sources are not beside the tests")


def without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


def test_the_core_knows_neither_torch_nor_python_nor_tvm():
    files = sources("include", "src")
    assert len(files) > 20
    for path in files:
        assert not FOREIGN.search(path.read_text()), path
    # The pattern does find what it looks for, where it may stand.
    assert any(FOREIGN.search(path.read_text()) for path in sources("bindings"))


def test_the_public_headers_include_nothing_but_themselves_and_the_standard_library():
    for path in sources("include"):
        assert path.parent.name == "punica"
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE):
            assert name.startswith("punica/") or re.fullmatch(r"[a-z_]+", name), f"{path} includes {name}"


def test_the_core_neither_prints_nor_throws_nor_ends_the_process():
    for path in sources("include", "src"):
        found = PRINTS.search(without_comments(path.read_text()))
        assert not found, f"{path}: {found.group()}"


def test_the_header_for_torch_includes_torch_and_the_core_alone():
    """No Python, no CUDA, no tvm-ffi: it compiles with any build of torch."""
    path = ROOT / "bindings/torch/punica_kernels/torch.h"
    names = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    foreign = [name for name in names if not re.fullmatch(r"(torch|ATen|c10)/(?!.*cuda).*|punica/\w+\.h|[a-z_]+", name)]
    assert names
    assert not foreign
    assert "torch/extension.h" not in names


def test_one_name_per_family_at_every_layer():
    for family in ("lora", "attention", "kv_cache", "norm"):
        for place in ("include/punica/{}.h", "src/common/{}.cc", "src/cpu/{}.cc", "bindings/{}.cc"):
            assert (ROOT / place.format(family)).is_file(), place.format(family)
        assert (ROOT / f"src/cuda/{family}").is_dir()
        assert (ROOT / f"python/punica_kernels/{family}.py").is_file()
        assert (ROOT / f"tests/python/test_{family}.py").is_file()

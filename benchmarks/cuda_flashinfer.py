"""FlashInfer's attention as a rival, on the pages that ours reads.

    PUNICA_BENCH_FLASHINFER=FOLDER python benchmarks/bench_cuda.py --only attention

FOLDER holds modules that flashinfer-python has compiled (`cached_ops` of its cache, or modules built ahead), for
bfloat16 and int32 indices: batch_decode_..., batch_prefill_... and batch_prefill_..._sm90, heads of 128 and, of the
last, of 64. They are loaded through tvm-ffi and called as FlashInfer's wrappers call them, with programmatic dependent
launch on, as there. What is not in the folder is not in the table.

FlashInfer wants a plan for each batch, made on the host from copies of the tables. It is timed apart from the kernels,
with the copies; the workspaces have the sizes that FlashInfer recommends.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "PUNICA_BENCH_FLASHINFER"
HND = 1  # layouts, masks: FlashInfer's numbers
NON_CAUSAL, CAUSAL = 0, 1
CUDA_CORES, TENSOR_CORES, FA3 = "FlashInfer, CUDA cores", "FlashInfer, tensor cores", "FlashInfer, fa3"
PLAN = "plan on the host"
PLANS = 9


class Flashinfer:
    def __init__(self) -> None:
        self.folder = os.environ.get(VARIABLE)
        self.modules: dict[tuple[str, int], Any] = {}
        if self.folder:
            self.floats = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
            self.ints = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
            self.pinned = torch.empty(8 << 20, dtype=torch.uint8, pin_memory=True)
        else:
            print(f"FlashInfer is not measured: {VARIABLE} names no folder", file=sys.stderr)

    def module(self, way: str, dim: int) -> Any:
        """None where there is none."""
        if self.folder and (way, dim) not in self.modules:
            import tvm_ffi

            types = "dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32"
            kind = "decode" if way == CUDA_CORES else "prefill"
            end = {CUDA_CORES: "", TENSOR_CORES: "_f16qk_False", FA3: "_f16qk_False_sm90"}[way]
            name = (
                f"batch_{kind}_with_kv_cache_{types}_head_dim_qk_{dim}_head_dim_vo_{dim}_posenc_0_use_swa_False_"
                f"use_logits_cap_False{end}"
            )
            paths = sorted(Path(self.folder).rglob(f"{name}.so"))
            if not paths:
                print(f"{way}, heads of {dim}, is not measured: no {name}.so in {self.folder}", file=sys.stderr)
            self.modules[way, dim] = tvm_ffi.load_module(str(paths[0])) if paths else None
        return self.modules.get((way, dim))

    def workspaces(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.floats, self.ints, self.pinned

    def attention(
        self, way: str, o: Tensor, q: Tensor, qo_indptr: Tensor, pool: Tensor, indices: Tensor, kv_indptr: Tensor,
        last: Tensor, heads: tuple[int, int], page_size: int,
    ) -> tuple[Callable[[int], None], float]:  # fmt: skip
        """A call for each copy of the cache, and the microseconds of the plan. The plan holds until the next one.

        pool: [pages, 1, 2, N, P, D]; indices: int32 [copies, pages of the batch].
        """
        module = self.module(way, q.shape[-1])
        k, v = pool[:, 0, 0], pool[:, 0, 1]
        batch = len(kv_indptr) - 1
        causal = len(q) != batch
        dim = q.shape[-1]
        empty = torch.empty(0, dtype=q.dtype)

        def plan() -> Any:
            indptr, last_host = kv_indptr.cpu(), last.cpu()
            if way == CUDA_CORES:
                return module.plan(
                    *self.workspaces(), indptr, batch, *heads, page_size, False, -1, 0.0, dim, dim, empty, empty
                )
            lengths = ((indptr[1:] - indptr[:-1] - 1) * page_size + last_host).clamp(min=0)
            qo_host = qo_indptr.cpu()
            more = () if way == FA3 else (-1, False, 0, 0 if causal else 1, not causal)
            return module.plan(
                *self.workspaces(), qo_host, indptr, lengths, len(q), batch, *heads, page_size, False, dim, dim, causal,
                -1, *more,
            )  # fmt: skip

        times = []
        for _ in range(PLANS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            info = plan()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        info = [int(word) for word in info]
        scale = dim**-0.5
        mask = CAUSAL if causal else NON_CAUSAL

        def run(copy: int) -> None:
            if way == CUDA_CORES:
                module.run(
                    self.floats, self.ints, info, q, k, v, kv_indptr, indices[copy], last, o, None, HND, -1, True,
                    None, 0.0, scale, 1.0, 1e-4,
                )  # fmt: skip
                return
            more = (None,) * 3 + (None, 0.0, scale, 1.0, 0) if way == FA3 else (None,) * 8 + (0.0, scale, 1.0, 1e-4, 0)
            module.paged_run(
                self.floats, self.ints, info, q, k, v, qo_indptr, kv_indptr, indices[copy], last, o, None, mask, HND,
                -1, True, *more,
            )  # fmt: skip

        return run, statistics.median(times) * 1e6


def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Of a row's largest result: both round the probabilities in ways of their own."""
    difference = ((theirs.float() - ours.float()).abs() / ours.float().abs().amax(-1, keepdim=True)).max().item()
    if not difference < 2**-4:
        raise AssertionError(f"{name}: {difference:.3g} of a row's largest result apart")

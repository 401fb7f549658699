"""Calls of every operation on CUDA whose shapes are the same for every seed, so that a captured graph can replay each,
and a kernel that writes late."""

import ctypes
import dataclasses
import functools
from typing import Any

import punica_kernels as pk
import torch
from op_cases import int32, make_adapters, make_cache, make_lora, public, randn
from torch import Tensor

OPS = [
    "batch_prefill", "batch_decode", "init_kv", "append_kv", "dispatch_bgmv", "sgmv_shrink", "sgmv_cutlass", "add_lora",
    "update_lora_batch", "rms_norm",
]  # fmt: skip
DTYPE = torch.bfloat16
ROWS = 40

# Of seeds 0, 1 and 2: lengths of the sequences, and how many of their tokens are new. Pages have 16 tokens. Attention
# splits sequences of more than 256.
LENGTHS = [[700, 5, 300, 0], [64, 513, 66, 3], [16, 600, 2, 20]]
NEW = [[7, 5, 20, 0], [1, 30, 2, 3], [16, 8, 2, 6]]
SEGMENTS = [
    [(0, 8), (8, 8), (8, 25), (30, 40)],
    [(0, 1), (1, 40), (40, 40), (0, 0)],
    [(20, 40), (0, 3), (5, 6), (6, 20)],
]
MAX_PAGES = 72


@dataclasses.dataclass
class Call:
    op: str
    arguments: dict[str, Any]
    written: list[Tensor]  # all that the operation may write
    late: tuple[Tensor, Tensor]  # what a promise of early_reads is about, and other contents for it
    kept: list[Any]  # what addresses point to

    def run(self) -> None:
        public(self.op)(**self.arguments)

    def snapshot(self) -> list[Tensor]:
        torch.cuda.synchronize()
        return [tensor.clone().view(torch.uint8) for tensor in self.written]

    def restore(self, snapshot: list[Tensor]) -> None:
        for tensor, saved in zip(self.written, snapshot, strict=True):
            tensor.copy_(saved.view(tensor.dtype))
        torch.cuda.synchronize()

    def result(self) -> list[Tensor]:
        """Runs it and takes back what it wrote."""
        before = self.snapshot()
        self.run()
        after = self.snapshot()
        self.restore(before)
        return after


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def prefix(lengths: list[int], device: str) -> Tensor:
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)], device)


def cache_arguments(seed: int, device: str) -> tuple[Any, dict[str, Any]]:
    cache = make_cache(LENGTHS[seed % 3], 2, 16, 64, DTYPE, device, layers=2, layer=1, seed=seed)
    kv_ptrs = torch.zeros(MAX_PAGES, dtype=torch.int64, device=device)
    kv_ptrs[: len(cache.kv_ptrs)] = cache.kv_ptrs
    tables = {"kv_ptrs": kv_ptrs, "kv_indptr": cache.kv_indptr, "last_page_offset": cache.last_page_offset}
    return cache, tables


def make(op: str, seed: int, device: str = "cuda") -> Call:
    data = functools.partial(randn, dtype=DTYPE, device=device)
    if op == "rms_norm":
        weight = data(4096, seed=seed + 100)
        output, residual = data(ROWS, 4096, seed=seed + 400), data(ROWS, 4096, seed=seed + 200)
        arguments = {"output": output, "input": data(ROWS, 4096, seed=seed + 300), "weight": weight, "epsilon": 1e-5}
        return Call(op, arguments | {"residual": residual}, [output, residual], (weight, weight + 1), [])
    if op == "dispatch_bgmv" or op.startswith("sgmv"):
        d_in, d_out = (16, 512) if op == "sgmv_cutlass" else (512, 16) if op == "sgmv_shrink" else (512, 640)
        shape = (d_in, d_out) if op == "sgmv_cutlass" else (d_out, d_in)
        adapters = make_adapters(3, *shape, DTYPE, device, seed=seed + 1)
        y = data(ROWS, d_out, seed=seed + 100)
        arguments = {"y": y, "x": data(ROWS, d_in, seed=seed + 200)}
        weight = adapters.weights[seed % 3]
        if op == "dispatch_bgmv":
            indices = torch.randint(-1, 3, (ROWS,), generator=torch.Generator().manual_seed(seed)).to(device)
            indices[ROWS // 2] = seed % 3
            arguments |= {"w_ptr": adapters.w_ptr, "indices": indices, "layer_idx": adapters.layer, "scale": 0.5}
        else:
            start, end = zip(*SEGMENTS[seed % 3], strict=True)
            table = adapters.w_ptr[torch.tensor([seed % 3, 1, seed % 3, 2], device=device)]
            arguments |= {"w_ptr": table, "s_start": int32(start, device), "s_end": int32(end, device)}
            arguments |= {"tmp": None, "layer_idx": adapters.layer}
        return Call(op, arguments, [y], (weight, weight + 1), [adapters])

    if op in ("add_lora", "update_lora_batch"):
        indices = torch.randint(-1, 3, (ROWS,), generator=torch.Generator().manual_seed(seed)).to(device)
        indices[ROWS // 2] = seed % 3
        batch = pk.LoraBatch(indices, 3, capacity=ROWS + 2)
        if op == "update_lora_batch":
            held = {"batch_indices": batch.indices, "order": batch.order, "segment_adapter": batch.segment_adapter}
            held |= {"segment_start": batch.segment_start, "counts": batch.counts}
            for tensor in held.values():
                tensor.fill_(-7)
            return Call(
                op, {"indices": indices, "num_adapters": 3} | held, list(held.values()), (indices, indices * 0), []
            )
        lora = make_lora([16, 8, 40], 512, [0, 384, 640], DTYPE, device, seed=seed + 1)
        y = data(ROWS, 640, seed=seed + 100)
        tables = dict(zip(("a_ptr", "b_ptr", "ranks", "scales"), lora.tables, strict=True))
        segments = {"order": batch.order, "segment_adapter": batch.segment_adapter}
        segments |= {"segment_start": batch.segment_start, "counts": batch.counts, "layer_idx": lora.layer}
        arguments = {"y": y, "x": data(ROWS, 512, seed=seed + 200)} | tables | segments
        weight = lora.a[0][seed % 3]
        return Call(op, arguments | {"slice_offsets": lora.offsets}, [y], (weight, weight + 1), [lora])

    cache, tables = cache_arguments(seed, device)
    scalars = dict(zip(("num_layers", "layer_idx", "num_kv_heads", "page_size"), cache.scalars, strict=True))
    count = len(LENGTHS[seed % 3])
    new = prefix(NEW[seed % 3], device)
    if op.endswith("_kv"):
        rows = count if op == "append_kv" else ROWS
        arguments = tables | {"k": data(rows, 2, 64, seed=seed + 100), "v": data(rows, 2, 64, seed=seed + 200)}
        arguments |= {} if op == "append_kv" else {"seqlen_indptr": new}
        # Until it is written, the table leads to the pages of another cache with sequences of the same lengths.
        other, other_tables = cache_arguments(seed + 3, device)
        late = (tables["kv_ptrs"], other_tables["kv_ptrs"])
        return Call(op, arguments | scalars, [cache.memory, other.memory], late, [cache, other])
    rows = count if op == "batch_decode" else ROWS
    o, lse = data(rows, 8, 64, seed=seed + 100), torch.zeros(rows, 8, device=device)
    arguments = {"o": o, "q": data(rows, 8, 64, seed=seed + 200), "lse": lse, "tmpbuf": None} | tables | scalars
    arguments |= {} if op == "batch_decode" else {"qo_indptr": new}
    return Call(op, arguments, [o, lse], (cache.memory, cache.memory * -0.5), [cache])


# Lets the kernel behind it start at once, waits, and writes last: what programmatic dependent launch must wait for.
_WRITER = b"""
.version 7.8
.target sm_90
.address_size 64
.visible .entry delayed_write(.param .u64 p_to, .param .u64 p_from, .param .u64 p_words, .param .u64 p_nanoseconds)
{
  .reg .pred %p<3>;
  .reg .b32 %r<4>;
  .reg .b64 %d<12>;
  griddepcontrol.launch_dependents;
  ld.param.u64 %d1, [p_to];
  ld.param.u64 %d2, [p_from];
  ld.param.u64 %d3, [p_words];
  ld.param.u64 %d4, [p_nanoseconds];
  mov.u64 %d5, %globaltimer;
SPIN:
  mov.u64 %d6, %globaltimer;
  sub.u64 %d6, %d6, %d5;
  setp.lt.u64 %p1, %d6, %d4;
  @%p1 bra SPIN;
  mov.u32 %r1, %tid.x;
  cvt.u64.u32 %d7, %r1;
  mov.u32 %r2, %ntid.x;
  cvt.u64.u32 %d8, %r2;
COPY:
  setp.ge.u64 %p2, %d7, %d3;
  @%p2 bra DONE;
  shl.b64 %d9, %d7, 2;
  add.u64 %d10, %d2, %d9;
  ld.global.u32 %r3, [%d10];
  add.u64 %d11, %d1, %d9;
  st.global.u32 [%d11], %r3;
  add.u64 %d7, %d7, %d8;
  bra COPY;
DONE:
  ret;
}
"""


@functools.cache
def _writer() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    torch.cuda.current_stream().synchronize()  # there is a context now
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(_WRITER)) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"delayed_write") == 0
    return driver, function


def delayed_write(to: Tensor, source: Tensor, microseconds: int = 500) -> None:
    """Copies source to `to` at the end of a kernel of that length on the current stream. Hopper and later."""
    assert to.nbytes == source.nbytes and to.nbytes % 4 == 0 and to.is_contiguous() and source.is_contiguous()
    driver, function = _writer()
    values = [to.data_ptr(), source.data_ptr(), to.nbytes // 4, 1000 * microseconds]
    parameters = [ctypes.c_uint64(value) for value in values]
    pointers = (ctypes.c_void_p * 4)(*[ctypes.addressof(parameter) for parameter in parameters])
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    assert driver.cuLaunchKernel(function, 1, 1, 1, 1024, 1, 1, 0, stream, pointers, None) == 0

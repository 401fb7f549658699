"""How the CUDA benchmark measures: replays of CUDA graphs whose calls find nothing in the second-level cache.

A graph holds many calls, each on inputs of its own; before every replay a kernel reads a buffer several times as large
as the cache. The figure is the median over the replays of the time of a replay, by events, divided by the calls.
The floor of a work is the time of a kernel in the same kind of graph that only reads and updates as many bytes
(benchmarks/cuda/floor.cu), the best of many launch configurations, found in the same run.
"""

import ctypes
import functools
import itertools
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import punica_kernels as pk
import torch
from torch import Tensor

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "benchmarks"
REPLAYS = 9
WARMUP = 2
MAX_CALLS = 240  # in a graph
MIN_CALLS = 16
MAX_BYTES = 6 << 30  # of the inputs of a graph


class FloorLibrary:
    """benchmarks/cuda/floor.cu, compiled if need be. `launch` modes: ordinary, dependent, dependent and early."""

    ORDINARY, DEPENDENT, EARLY = 0, 1, 2

    def __init__(self) -> None:
        source, library = HERE / "cuda" / "floor.cu", BUILD / "libfloor.so"
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
            if nvcc is None:
                raise RuntimeError(f"the floors are measured by {source.name}: no nvcc was found, and no {library}")
            BUILD.mkdir(parents=True, exist_ok=True)
            options = ["-O3", "-std=c++17", "-arch=sm_90", "-shared", "-Xcompiler=-fPIC"]
            subprocess.run([nvcc, *options, str(source), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.pool = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
        self.target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        self.flushed = torch.empty(512 << 20, dtype=torch.uint8, device="cuda").random_()
        self.out = torch.zeros(16, dtype=torch.uint8, device="cuda")
        self.cursor = 0

    def _check(self, error: int) -> None:
        if error != 0:
            raise RuntimeError(f"floor.cu: CUDA error {error}")

    def _place(self, pool: Tensor, nbytes: int) -> int:
        """An address in the pool that was not used lately; neighbours do not share a DRAM page."""
        step = -(-nbytes // 4096) * 4096 + (1 << 20 if nbytes < 4 << 20 else 0)
        if self.cursor + step > len(pool):
            self.cursor = 0
        address = pool.data_ptr() + self.cursor
        self.cursor += step
        return address

    def move(self, read: int, update: int, grid: int, threads: int, unroll: int, mode: int) -> None:
        self._check(
            self.library.punica_floor_move(
                ctypes.c_void_p(self._place(self.pool, read)), ctypes.c_int64(read),
                ctypes.c_void_p(self._place(self.target, update)), ctypes.c_int64(update),
                ctypes.c_void_p(self.out.data_ptr()), grid, threads, unroll, mode,
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )  # fmt: skip

    def copy(self, nbytes: int, grid: int, threads: int, unroll: int, dependent: bool) -> None:
        self._check(
            self.library.punica_floor_copy(
                ctypes.c_void_p(self._place(self.pool, nbytes)), ctypes.c_void_p(self._place(self.target, nbytes)),
                ctypes.c_int64(nbytes), grid, threads, unroll, dependent,
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )  # fmt: skip

    def launches(self, count: int, dependent: bool) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self.library.punica_floor_launches(count, dependent, stream))

    @functools.cache  # noqa: B019  (one instance, for the whole run)
    def floor(self, parts: tuple[tuple[int, int], ...], early: bool) -> float:
        """Microseconds of a kernel that reads and updates so many bytes; of several in a chain, their mean.

        The best of the launch configurations, and of ordinary and dependent launches; `early`: reading before the wait.
        """
        modes = (self.EARLY,) if early else (self.ORDINARY, self.DEPENDENT)
        return min(self._floor(parts, mode) for mode in modes)

    def _floor(self, parts: tuple[tuple[int, int], ...], mode: int) -> float:
        parts = tuple((_up(read), _up(update)) for read, update in parts)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        total = sum(read + update for read, update in parts)
        calls = max(MIN_CALLS, min(MAX_CALLS, (1 << 30) // total)) // len(parts) * len(parts)
        best = float("inf")
        for blocks_an_sm in (1, 2, 4):
            for threads in (256, 512, 1024):
                if blocks_an_sm * threads > 2048:
                    continue
                for unroll in (1, 4, 8):

                    def run(blocks: int = blocks_an_sm, threads: int = threads, unroll: int = unroll) -> None:
                        for call in range(calls):
                            read, update = parts[call % len(parts)]
                            needed = -(-max(read, update) // 16 // threads)
                            self.move(read, update, max(1, min(sms * blocks, needed)), threads, unroll, mode)

                    best = min(best, time_graph(self, run, calls, replays=5))
        return best

    @functools.cache  # noqa: B019
    def copy_floor(self, nbytes: int) -> float:
        """Microseconds of a kernel that reads so many bytes and writes as many, launched either way."""
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        calls = max(MIN_CALLS, min(MAX_CALLS, (1 << 30) // max(nbytes, 1)))
        best = float("inf")
        for shape in itertools.product((1, 2, 4, 8, 16, 32), (256, 512, 1024), (1, 4, 8), (False, True)):

            def run(shape: tuple[int, int, int, bool] = shape) -> None:
                blocks_an_sm, threads, unroll, dependent = shape
                needed = max(1, -(-nbytes // 16 // threads))
                for _ in range(calls):
                    self.copy(nbytes, min(sms * blocks_an_sm, needed), threads, unroll, dependent)

            best = min(best, time_graph(self, run, calls, replays=3))
        return best


def _up(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def calls_for(bytes_a_call: int) -> int:
    """How many calls, each with its own inputs, a graph has."""
    return max(MIN_CALLS, min(MAX_CALLS, MAX_BYTES // max(bytes_a_call, 1)))


def time_graph(floors: FloorLibrary, run: Callable[[], None], calls: int, replays: int = REPLAYS) -> float:
    """Microseconds a call: `run` makes `calls` calls on the current stream, which are captured and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # lazy initialisation is not for a capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(WARMUP + replays):
        flush(floors)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    del graph
    return statistics.median(times[WARMUP:])


def flush(floors: FloorLibrary) -> None:
    """Fills the second-level cache with what nobody asks for."""
    floors._check(
        floors.library.punica_floor_move(
            ctypes.c_void_p(floors.flushed.data_ptr()), ctypes.c_int64(floors.flushed.nbytes),
            ctypes.c_void_p(0), ctypes.c_int64(0), ctypes.c_void_p(floors.out.data_ptr()), 528, 512, 8, 0,
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    )  # fmt: skip


def early(run: Callable[[], None]) -> Callable[[], None]:
    def wrapped() -> None:
        with pk.early_reads():
            run()

    return wrapped


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device="cuda")

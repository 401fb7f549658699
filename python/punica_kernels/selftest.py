"""Runs every operation on every device that is here and compares it with `punica_kernels.reference`.

    python -m punica_kernels.selftest [--device cpu|cuda]

A check of an installation, with nothing but the package and PyTorch: a few awkward shapes an operation, each twice (the
bits must be the same), in seconds. The exit code is 0 if all is right, 1 if not, 2 if there is no such device.
"""

import argparse
import dataclasses
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import punica_kernels as pk

from . import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Two units in the last place of the output, 16 of float32; the unit of what tensor cores round in between.
RTOL = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}
SUM = 4 * 2.0**-24  # of the sum of |terms|: what float32 sums may lose


@dataclasses.dataclass
class Check:
    """One call: `run` gives what it wrote, on the CPU; the allowed error is None where bits must be equal."""

    what: str
    run: Callable[[], list[Tensor]]
    exact: list[Tensor]
    allowed: list[Tensor | None]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)


def allowance(exact: Tensor, dtype: torch.dtype, terms: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    row = exact.abs().flatten(1).amax(1).reshape(-1, *[1] * (exact.dim() - 1))
    return RTOL[dtype] * (exact.abs() + row / 16) + SUM * terms + extra


# --------------------------------------------------------------------------------------------------------------- lora

LAYERS, LAYER = 2, 1
INDICES = (2, 0, -1, 1, 2, 2, 0, 3, -5, 1, 3)
SEGMENTS = ((0, 1), (1, 1), (3, 40), (40, 47), (50, 66))
ROWS = 70


def weights(count: int, rows: int, columns: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    made = [torch.full((LAYERS, rows, columns), math.nan, dtype=dtype) for _ in range(count)]
    for i, weight in enumerate(made):
        weight[LAYER] = randn(rows, columns, dtype=dtype, seed=seed + i)
    return made


def bgmv(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for h_in, h_out in ((512, 16), (16, 512), (100, 7)):
        host = weights(4, h_out, h_in, dtype, seed=10)
        there = [w.to(device) for w in host]
        x, y = randn(len(INDICES), h_in, dtype=dtype, seed=1), randn(len(INDICES), h_out, dtype=dtype, seed=2)
        indices = torch.tensor(INDICES)
        exact, terms, absolute = y.double(), y.double().abs(), [w.abs() for w in host]
        reference.dispatch_bgmv(exact, x, addresses(host), indices, LAYER, 0.5)
        reference.dispatch_bgmv(terms, x.abs(), addresses(absolute), indices, LAYER, 0.5)
        x_there, w_ptr, indices_there = x.to(device), addresses(there).to(device), indices.to(device)

        # `there` is named only to be kept: the table holds its addresses.
        def run(y=y, x=x_there, w_ptr=w_ptr, indices=indices_there, there=there) -> list[Tensor]:  # type: ignore
            out = y.to(device, copy=True)
            pk.dispatch_bgmv(out, x, w_ptr, indices, LAYER, 0.5)
            return [out.cpu()]

        yield Check(f"h_in={h_in} h_out={h_out}", run, [exact], [allowance(exact, dtype, terms)])


def sgmv(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    ours, theirs = getattr(pk, name), getattr(reference, name)
    for d_in, d_out in ((512, 16), (16, 512), (100, 7)):
        shape = (d_out, d_in) if name == "sgmv_shrink" else (d_in, d_out)
        host = weights(len(SEGMENTS), *shape, dtype, seed=20)
        there = [w.to(device) for w in host]
        x, y = randn(ROWS, d_in, dtype=dtype, seed=1), randn(ROWS, d_out, dtype=dtype, seed=2)
        start, end = (int32([s[i] for s in SEGMENTS]) for i in (0, 1))
        exact, terms, absolute = y.double(), y.double().abs(), [w.abs() for w in host]
        theirs(exact, x, addresses(host), start, end, None, LAYER)
        theirs(terms, x.abs(), addresses(absolute), start, end, None, LAYER)
        tmp = torch.empty(pk.sgmv_cutlass_tmp_size(len(SEGMENTS)), dtype=torch.uint8, device=device)
        tables = [t.to(device) for t in (addresses(there), start, end)]
        x_there = x.to(device)

        def run(y=y, x=x_there, tables=tables, tmp=tmp, there=there) -> list[Tensor]:  # type: ignore
            out = y.to(device, copy=True)
            ours(out, x, *tables, tmp, LAYER)
            return [out.cpu()]

        yield Check(f"d_in={d_in} d_out={d_out}", run, [exact], [allowance(exact, dtype, terms)])


def add_lora(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    offsets, h_in, ranks = [0, 192, 256], 256, [16, 8, 0, 40]
    indices = torch.tensor([i % 6 - 1 for i in range(13)] + [1] * 40 + [3] * 20)
    host = [[weights(1, r, h_in, dtype, seed=30 + r + s)[0] for r in ranks] for s in range(2)]
    host_b = [[weights(1, offsets[s + 1] - offsets[s], r, dtype, seed=40 + r + s)[0] for r in ranks] for s in range(2)]
    x, y = randn(len(indices), h_in, dtype=dtype, seed=1), randn(len(indices), offsets[-1], dtype=dtype, seed=2)
    scales = torch.tensor([0.5, 2.0, 1.0, -0.25])

    def table(side: list[list[Tensor]]) -> Tensor:
        return torch.stack([addresses(row) for row in side])

    def absolute(side: list[list[Tensor]]) -> list[list[Tensor]]:
        return [[t.abs() for t in row] for row in side]

    # An index that no adapter has counts as none; on the CPU it would be an error.
    indices[indices >= len(ranks)] = -1
    batch = pk.LoraBatch(indices, len(ranks))
    exact, terms = y.double(), y.double().abs()
    reference.add_lora(exact, x, table(host), table(host_b), int32(ranks), scales, batch, LAYER, offsets)
    a, b = absolute(host), absolute(host_b)
    reference.add_lora(terms, x.abs(), table(a), table(b), int32(ranks), scales.abs(), batch, LAYER, offsets)
    there = [[[t.to(device) for t in row] for row in side] for side in (host, host_b)]
    a_ptr, b_ptr = (table(side).to(device) for side in there)
    x_there, indices_there = x.to(device), indices.to(device)
    ranks_there, scales_there = int32(ranks).to(device), scales.to(device)

    def run(there=there) -> list[Tensor]:  # type: ignore
        out = y.to(device, copy=True)
        sorted_there = pk.LoraBatch(indices_there, len(ranks))
        pk.add_lora(out, x_there, a_ptr, b_ptr, ranks_there, scales_there, sorted_there, LAYER, offsets)
        return [out.cpu()]

    yield Check("two slices, ranks 16, 8, 0, 40", run, [exact], [allowance(exact, dtype, terms)])


# ----------------------------------------------------------------------------------------------- kv_cache, attention

KV_HEADS, QO_HEADS, PAGE, LENGTHS, NEW = 2, 8, 16, (70, 5, 300, 16), (7, 5, 20, 16)


class Cache:
    """Pages in no order, NaN where no token is; the same contents on the CPU and on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, filled: bool):
        pages = [-(-n // PAGE) for n in LENGTHS]
        self.host = torch.full((sum(pages), LAYERS, 2, KV_HEADS, PAGE, head_dim), math.nan, dtype=dtype)
        places = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(3))
        if filled:
            first = 0
            for count, length in zip(pages, LENGTHS, strict=True):
                for t in range(length):
                    kv = randn(2, KV_HEADS, head_dim, dtype=dtype, seed=100 * first + t)
                    self.host[places[first + t // PAGE], LAYER, :, :, t % PAGE] = kv
                first += count
        self.there = self.host.to(device, copy=True)
        size = self.host[0].nbytes
        self.table, self.table_there = (m.data_ptr() + size * places for m in (self.host, self.there))
        self.table_there = self.table_there.to(device)
        self.indptr = int32([sum(pages[:i]) for i in range(len(pages) + 1)])
        self.offset = int32([(n - 1) % PAGE + 1 for n in LENGTHS])
        self.sizes = (LAYERS, LAYER, KV_HEADS, PAGE)


def new_rows() -> Tensor:
    return int32([sum(NEW[:i]) for i in range(len(NEW) + 1)])


def kv_write(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for head_dim in (64, 128, 6):
        cache = Cache(device, dtype, head_dim, filled=True)
        rows = len(LENGTHS) if name == "append_kv" else sum(NEW)
        k, v = (randn(rows, KV_HEADS, head_dim, dtype=dtype, seed=seed) for seed in (5, 6))
        last = () if name == "append_kv" else (new_rows(),)
        before = cache.there.clone()
        getattr(reference, name)(cache.table, cache.indptr, cache.offset, k, v, *last, *cache.sizes)
        small = [t.to(device) for t in (cache.indptr, cache.offset, k, v, *last)]

        def run(cache=cache, before=before, small=small) -> list[Tensor]:  # type: ignore
            cache.there.copy_(before)
            getattr(pk, name)(cache.table_there, *small, *cache.sizes)
            return [cache.there.cpu().view(torch.uint8)]

        yield Check(f"head_dim={head_dim}", run, [cache.host.view(torch.uint8)], [None])


def attention(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for head_dim, theta in ((64, None), (128, None), (128, 1e4), (6, None)):
        cache = Cache(device, dtype, head_dim, filled=True)
        decode = name == "batch_decode"
        rows = len(LENGTHS) if decode else sum(NEW)
        q = randn(rows, QO_HEADS, head_dim, dtype=dtype, seed=7)
        queries = () if decode else (new_rows(),)
        o, lse, terms, _ = (torch.zeros(rows, QO_HEADS, *d, dtype=torch.float64) for d in ((head_dim,), ()) * 2)

        def exactly(into: Tensor, tables=cache, q=q, queries=queries, theta=theta, lse=None):  # type: ignore
            args = (into, q, *queries, tables.table, tables.indptr, tables.offset, None, *tables.sizes)
            getattr(reference, name)(*args, rope_theta=theta, lse=lse)

        exactly(o, lse=lse)
        keys = cache.host[:, LAYER, 0].double().nan_to_num().norm(dim=-1).max()
        cache.host[:, :, 1].abs_()
        terms = torch.zeros_like(o)
        exactly(terms)  # the weighted sum of |v|
        unit = UNIT[dtype] if device.type == "cuda" else 0.0
        score = q.double().norm(dim=-1) * keys / math.sqrt(head_dim)
        score = score * (SUM + (2e-5 + 2.1 * unit if theta is not None else 0.0))
        factor = torch.expm1(2 * score).unsqueeze(-1) + unit
        there = [t.to(device) for t in (q, *queries)]
        small = [t.to(device) for t in (cache.indptr, cache.offset)]

        def run(cache=cache, there=there, small=small, theta=theta, shape=o.shape) -> list[Tensor]:  # type: ignore
            out = torch.full(shape, math.nan, dtype=dtype, device=device)
            sums = torch.full(shape[:2], math.nan, device=device)
            args = (out, *there, cache.table_there, *small, None, *cache.sizes)
            getattr(pk, name)(*args, rope_theta=theta, lse=sums)
            return [out.cpu(), sums.cpu()]

        allowed = [
            allowance(o, dtype, terms, factor * terms),
            RTOL[torch.float32] * lse.abs() + (score + SUM) / math.log(2),
        ]
        yield Check(f"head_dim={head_dim}{'' if theta is None else ', rotated inside'}", run, [o, lse], [*allowed])


# --------------------------------------------------------------------------------------------------------------- norm


def norm(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for columns in (512, 100):
        x, residual, weight = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(5, columns)] * 2 + [(columns,)]))
        exact, kept = torch.empty(5, columns, dtype=torch.float64), residual.clone()
        reference.rms_norm(exact, x, weight, 1e-5, residual=kept)
        x_there, weight_there = x.to(device), weight.to(device)

        def run(x=x_there, residual=residual, weight=weight_there) -> list[Tensor]:  # type: ignore
            out, sum_ = torch.empty_like(x), residual.to(device, copy=True)
            pk.rms_norm(out, x, weight, 1e-5, residual=sum_)
            return [out.cpu(), sum_.cpu()]

        yield Check(f"columns={columns}", run, [exact, kept], [allowance(exact, dtype, torch.zeros_like(exact)), None])


Checks = Callable[[torch.device, torch.dtype], Iterator[Check]]

OPERATIONS: dict[str, Checks] = {
    "dispatch_bgmv": bgmv,
    "sgmv_shrink": lambda device, dtype: sgmv("sgmv_shrink", device, dtype),
    "sgmv_cutlass": lambda device, dtype: sgmv("sgmv_cutlass", device, dtype),
    "add_lora": add_lora,
    "init_kv": lambda device, dtype: kv_write("init_kv", device, dtype),
    "append_kv": lambda device, dtype: kv_write("append_kv", device, dtype),
    "batch_prefill": lambda device, dtype: attention("batch_prefill", device, dtype),
    "batch_decode": lambda device, dtype: attention("batch_decode", device, dtype),
    "rms_norm": norm,
}


def failure(check: Check, threads: int) -> tuple[float, str]:
    """The worst error as a share of what is allowed, and what is wrong, if anything is."""
    torch.set_num_threads(threads)
    try:
        first, second = check.run(), check.run()
    finally:
        torch.set_num_threads(1)
    worst = 0.0
    for ours, again, exact, allowed in zip(first, second, check.exact, check.allowed, strict=True):
        if not torch.equal(ours.view(torch.uint8), again.view(torch.uint8)):
            return math.inf, "two runs gave different bits"
        if allowed is None:
            if not torch.equal(ours, exact):
                return math.inf, f"{int((ours != exact).sum())} of {ours.numel()} elements differ"
            continue
        # What takes no part is -inf or NaN on both sides.
        same = (ours.double() == exact) | (ours.isnan() & exact.isnan())
        share = torch.where(same, 0.0, (ours.double() - exact).abs() / allowed).nan_to_num(nan=math.inf)
        worst = max(worst, float(share.max()))
        if worst > 1:
            place = int(share.argmax())
            return worst, (
                f"{int((share > 1).sum())} of {ours.numel()} elements are off; the worst is {ours.flatten()[place]} "
                f"where {exact.flatten()[place]} +- {allowed.flatten()[place]:.2e} is right"
            )
    return worst, ""


def check_device(device: torch.device, threads: int) -> tuple[int, list[str]]:
    """Prints a line an operation; gives the number of calls and what failed."""
    calls, failed = 0, []
    for name, checks in OPERATIONS.items():
        words, worst = [], 0.0
        for dtype in DTYPES:
            short, good = str(dtype).removeprefix("torch."), True
            try:
                for check in checks(device, dtype):
                    calls += 1
                    share, wrong = failure(check, threads)
                    worst = max(worst, share)
                    if wrong:
                        good = False
                        failed.append(f"{device}: {name}, {short}, {check.what}: {wrong}")
            except Exception:
                good = False
                failed.append(f"{device}: {name}, {short}: {traceback.format_exc().strip()}")
            words.append(f"{short} {'ok' if good else 'FAILED'}")
        print(f"  {name:14}  {'   '.join(words)}   (worst error {100 * worst:.0f}% of what is allowed)", flush=True)
    return calls, failed


def devices(wanted: str | None) -> list[torch.device]:
    found = []
    if wanted in (None, "cpu"):
        found.append(torch.device("cpu"))
    if wanted in (None, "cuda"):
        if not pk.has_cuda():
            print("CUDA: this build has the CPU backend alone")
        elif not torch.cuda.is_available():
            print("CUDA: torch finds no device")
        else:
            found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m punica_kernels.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only that kind (default: all that are here)")
    wanted = parser.parse_args(arguments).device
    print(f"punica_kernels {pk.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    found = devices(wanted)
    if not found:
        print(f"selftest: no {wanted} device to test", file=sys.stderr)
        return 2
    start, calls = time.monotonic(), 0
    failed: list[str] = []
    # The operations run with as many threads as torch has. The reference is given one: its products are so small that
    # on a busy machine torch's threads would wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for device in found:
            if device.type == "cuda":
                print(f"{device}: {torch.cuda.get_device_name(device)}, code path {pk.active_cuda_arch(device)}")
            else:
                print(f"cpu: instruction set {pk.active_isa()}, {threads} threads")
            count, wrong = check_device(device, threads)
            calls, failed = calls + count, failed + wrong
    finally:
        torch.set_num_threads(threads)
    for line in failed:
        print(line)
    verdict = "all right" if not failed else f"{len(failed)} FAILED"
    print(f"{len(OPERATIONS)} operations, {calls} calls, {time.monotonic() - start:.1f} s: {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

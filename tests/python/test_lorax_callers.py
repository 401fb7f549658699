"""LoRAX's calls, as its server makes them: names, positions, dtypes, workspaces, segments, CUDA graphs.

What its LoRA layers do with the package, written from what they do (`server/lorax_server`: `adapters/lora.py` makes the
tables, `utils/punica.py` and `utils/layers.py` make the calls, `utils/graph.py` captures them):

- Ranks are padded with zeros: up to 8 to 8, above to a multiple of 16; under tensor parallelism to 8 a device at least.
- Prefill (SGMV), and decode above rank 128: A is [L, r, h_in] and goes to `sgmv_shrink` for ranks 16 to 128, else it is
  [L, h_in, r] and goes to `sgmv_cutlass`. B is [L, r, h_out] and goes to `sgmv_cutlass`. The scale is in B.
- Decode (BGMV): A is [L, r, h_in], B is [L, h_out, r], scale 1.0.
- Adapters of one batch are called rank by rank. The tables of a rank have one entry a segment of that rank, so other
  segments are gaps; or, for BGMV, -1 in the indices.
- `tmp` is kept: one tensor of `sgmv_cutlass_tmp_size` bytes for both calls below rank 16, else 8 MiB for the shrink.
"""

import dataclasses
import itertools
from collections.abc import Callable

import punica_kernels as pk
import pytest
import torch
from op_cases import randn
from tolerances import assert_close
from torch import Tensor

LAYERS, LAYER = 2, 1
H_IN, H_OUT = 256, 192
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
WORKSPACE = 8 * 1024 * 1024


def padded(rank: int, devices: int = 1) -> int:
    least = 8 * devices
    return least if rank <= least else -(-rank // 16) * 16


def pad(t: Tensor, dim: int, size: int) -> Tensor:
    more = list(t.shape)
    more[dim] = size - t.shape[dim]
    return torch.cat((t, t.new_zeros(more)), dim)


def shrinks_by_cutlass(rank: int) -> bool:
    return not 16 <= rank <= 128


class Lora:
    """One adapter of one kind of layer, all layers in one tensor; a and b are [L, h, r] and [L, r, h] as trained."""

    def __init__(self, rank: int, dtype: torch.dtype, device: str, seed: int, h_out: int = H_OUT, devices: int = 1):
        a = randn(LAYERS, H_IN, rank, dtype=dtype, device=device, seed=seed)
        b = randn(LAYERS, rank, h_out, dtype=dtype, device=device, seed=seed + 1) * 0.125
        self.rank = padded(rank, devices)
        self.a, self.b = pad(a, 2, self.rank), pad(b, 1, self.rank)
        self.set_rank(self.rank)

    def set_rank(self, rank: int) -> None:
        """What the kernels read, for both directions; rank: that of A, less than B's if A is one device's share."""
        self.a_sgmv = self.a if shrinks_by_cutlass(rank) else self.a.transpose(1, 2)
        self.a_sgmv = torch.stack([layer.contiguous() for layer in self.a_sgmv])
        self.b_sgmv = torch.stack(list(self.b))
        self.a_bgmv = self.a.transpose(1, 2).contiguous()
        self.b_bgmv = self.b.transpose(1, 2).contiguous()


@dataclasses.dataclass
class Meta:
    """Rows and their adapters: indices int64 on the device; segments int32, one more than there are runs."""

    indices: Tensor
    segments: Tensor
    adapters: list[int]  # of each segment

    @classmethod
    def of(cls, rows: list[int], device: str) -> "Meta":
        runs = [(adapter, len(list(run))) for adapter, run in itertools.groupby(rows)]
        ends = [0, *itertools.accumulate(length for _, length in runs)]
        indices = torch.tensor(rows, dtype=torch.int64, device=device)
        return cls(indices, torch.tensor(ends, dtype=torch.int32, device=device), [adapter for adapter, _ in runs])

    def followed_by(self, other: "Meta") -> "Meta":
        """Two batches put together on the device; a run that goes on across the border becomes one."""
        mine, behind, names = self.segments, other.segments[1:] + self.segments[-1], other.adapters
        if self.adapters[-1] == names[0]:
            mine, names = mine[:-1], names[1:]
        indices = torch.cat((self.indices, other.indices))
        return Meta(indices, torch.concat([mine, behind]), self.adapters + names)


kept: dict[tuple, Tensor] = {}


def workspaces(segments: int, rank: int, device: str) -> tuple[Tensor, Tensor]:
    """For the shrink and the expand, the same tensors for every call of that size."""

    def of(size: int) -> Tensor:
        return kept.setdefault((size, device), torch.empty((size,), dtype=torch.uint8, device=device))

    expand = of(pk.sgmv_cutlass_tmp_size(segments))
    return (expand if rank < 16 else of(WORKSPACE)), expand


@dataclasses.dataclass
class Rank:
    """What the layers get for the adapters of one rank."""

    a_ptr: Tensor
    b_ptr: Tensor
    starts: Tensor | None = None
    ends: Tensor | None = None
    tmp: tuple[Tensor, Tensor] | None = None
    indices: Tensor | None = None


NOTHING = torch.tensor([])  # whose address stands for segments without an adapter


def tables(loras: dict[int, Lora], meta: Meta, prefill: bool, device: str, heads: list[int] | None = None):
    """{rank: its tables}. heads: rows that are left of a prefill (the last of each prompt), for the language head."""
    ranks: dict[int, list[int]] = {}
    for segment, adapter in enumerate(meta.adapters):
        if adapter in loras:
            ranks.setdefault(loras[adapter].rank, []).append(segment)
    sgmv = prefill or max(ranks) > 128

    def addresses(side: str) -> Tensor:
        ptrs = [(getattr(loras[i], side) if i in loras else NOTHING).data_ptr() for i in meta.adapters]
        return torch.tensor(ptrs, dtype=torch.int64, device=device)

    a_ptr, b_ptr = addresses("a_sgmv" if sgmv else "a_bgmv"), addresses("b_sgmv" if sgmv else "b_bgmv")
    result = {}
    for rank, chosen in ranks.items():
        made = result[rank] = Rank(a_ptr[chosen], b_ptr[chosen])
        if sgmv:
            made.tmp = workspaces(made.a_ptr.size(0), rank, device)
            made.starts, made.ends = meta.segments[chosen], meta.segments[[i + 1 for i in chosen]]
            if heads is not None:
                ends = meta.segments.tolist()
                counts = [sum(ends[i] <= head < ends[i + 1] for head in heads) for i in range(len(meta.adapters))]
                last = list(itertools.accumulate(counts))
                for i, segment in enumerate(chosen):
                    made.starts[i], made.ends[i] = last[segment] - counts[segment], last[segment]
        else:
            first: dict[int, int] = {}
            for place, segment in enumerate(chosen):
                first.setdefault(meta.adapters[segment], place)
            places = [first.get(adapter, -1) for adapter in meta.indices.tolist()]
            made.indices = torch.tensor(places, dtype=torch.int64, device=device)
    return sgmv, result


def run(
    result: Tensor, x: Tensor, made: tuple[bool, dict[int, Rank]], columns: tuple[int, int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda v: v,
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """The layer's work; gives the projection that was added up, and each rank's v. gather: what tensor parallelism does
    to v between the two products."""
    sgmv, ranks = made
    part = result if columns is None else torch.zeros_like(result[:, slice(*columns)])
    all_v = {}
    for rank, of in ranks.items():
        v = torch.zeros((x.size(0), rank), dtype=x.dtype, device=x.device)
        if sgmv:
            shrink = pk.sgmv_cutlass if shrinks_by_cutlass(rank) else pk.sgmv_shrink
            shrink(v, x, of.a_ptr, of.starts, of.ends, of.tmp[0], LAYER)
            v = gather(v)
            pk.sgmv_cutlass(part, v, of.b_ptr, of.starts, of.ends, of.tmp[1], LAYER)
        else:
            pk.dispatch_bgmv(v, x, of.a_ptr, of.indices, LAYER, 1.0)
            v = gather(v)
            pk.dispatch_bgmv(part, v, of.b_ptr, of.indices, LAYER, 1.0)
        all_v[rank] = v
    if columns is not None:
        result[:, slice(*columns)] += part
    return part, all_v


def check(loras: dict[int, Lora], rows: list[int], x: Tensor, y0: Tensor, y: Tensor, all_v: dict[int, Tensor]) -> None:
    """v of each row's own adapter, the row's update from that v, nothing in rows without one. On the CPU."""
    x, y0, y = x.cpu().double(), y0.cpu(), y.cpu()
    all_v = {rank: v.cpu() for rank, v in all_v.items()}
    chosen = {i: torch.tensor([row == i for row in rows]) for i in loras}
    weights = {i: (lora.a[LAYER].cpu().double(), lora.b[LAYER].cpu().double()) for i, lora in loras.items()}
    for rank, v in all_v.items():
        exact, terms = torch.zeros_like(v, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
        for i, mine in chosen.items():
            if loras[i].rank == rank:
                exact[mine], terms[mine] = x[mine] @ weights[i][0], x[mine].abs() @ weights[i][0].abs()
        assert_close(v, exact, terms=terms)
    exact, terms = y0.double(), y0.double().abs()
    for i, mine in chosen.items():
        if mine.any():
            v, b = all_v[loras[i].rank][mine].double(), weights[i][1]
            exact[mine] += v @ b
            terms[mine] += v.abs() @ b.abs()
    assert_close(y, exact, terms=terms)
    without = torch.tensor([adapter not in loras for adapter in rows])
    assert torch.equal(y[without], y0[without])


MIXED = [0] * 20 + [3] * 5 + [0] * 1 + [7] * 17 + [5] * 30 + [1] * 9 + [3] * 12 + [6] * 2 + [2] * 40
RANKS = {0: 8, 1: 16, 2: 64, 3: 5, 5: 128, 6: 33}  # 7 is the base model


def mixed_loras(dtype: torch.dtype, device: str, h_out: int = H_OUT) -> dict[int, Lora]:
    return {i: Lora(rank, dtype, device, seed=10 * i, h_out=h_out) for i, rank in RANKS.items()}


@HALVES
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
def test_a_batch_of_several_ranks(prefill, dtype, device):
    loras = mixed_loras(dtype, device)
    meta = Meta.of(MIXED, device)
    x = randn(len(MIXED), H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(len(MIXED), H_OUT, dtype=dtype, device=device, seed=2)
    made = tables(loras, meta, prefill, device)
    assert made[0] is prefill
    for _ in range(2):  # the workspaces are used again
        y = y0.clone()
        part, all_v = run(y, x, made)
        assert part is y
        check(loras, MIXED, x, y0, y, all_v)


@HALVES
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
def test_a_slice_of_a_merged_projection(prefill, dtype, device):
    """q, k and v are columns of one result; each part has tables of its own, and is added from a tensor of its own."""
    meta = Meta.of(MIXED, device)
    x = randn(len(MIXED), H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(len(MIXED), 2 * H_OUT, dtype=dtype, device=device, seed=2)
    y = y0.clone()
    for start in (0, H_OUT):
        loras = {i: lora for i, lora in mixed_loras(dtype, device).items() if (i + start) % 2}
        part, all_v = run(y, x, tables(loras, meta, prefill, device), (start, start + H_OUT))
        assert part.is_contiguous()
        check(loras, MIXED, x, torch.zeros_like(part), part, all_v)
        assert torch.equal(y[:, start : start + H_OUT], y0[:, start : start + H_OUT] + part)


@HALVES
@pytest.mark.parametrize("rank", [8, 16, 32, 48, 64, 96, 128])
def test_every_rank_that_is_padded_to(rank, dtype, device):
    rows = [0] * 33 + [1] * 2 + [2] * 30
    loras = {i: Lora(rank, dtype, device, seed=i) for i in (0, 2)}
    x = randn(len(rows), H_IN, dtype=dtype, device=device, seed=1)
    y0 = torch.zeros(len(rows), H_OUT, dtype=dtype, device=device)
    for prefill in (True, False):
        y = y0.clone()
        _, all_v = run(y, x, tables(loras, Meta.of(rows, device), prefill, device))
        assert list(all_v) == [rank]
        check(loras, rows, x, y0, y, all_v)


@HALVES
def test_decode_above_rank_128_goes_through_sgmv(dtype, device):
    """The workspace of its shrink by sgmv_cutlass is the one of 8 MiB."""
    rows = [0, 1, 1, 2, 0]
    loras = {0: Lora(256, dtype, device, seed=0), 1: Lora(16, dtype, device, seed=1)}
    x = randn(len(rows), H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(len(rows), H_OUT, dtype=dtype, device=device, seed=2)
    y, made = y0.clone(), tables(loras, Meta.of(rows, device), False, device)
    assert made[0]
    assert made[1][256].tmp[0].numel() == WORKSPACE
    _, all_v = run(y, x, made)
    check(loras, rows, x, y0, y, all_v)


@HALVES
def test_batches_put_together(dtype, device):
    """Segments concatenated on the device, with and without a run across the border."""
    loras = mixed_loras(dtype, device)
    for first, second in ((MIXED[:30], MIXED[30:]), ([1] * 3, [1] * 4), ([1] * 3 + [0], [2])):
        rows = first + second
        meta = Meta.of(first, device).followed_by(Meta.of(second, device))
        x = randn(len(rows), H_IN, dtype=dtype, device=device, seed=1)
        y0 = randn(len(rows), H_OUT, dtype=dtype, device=device, seed=2)
        y = y0.clone()
        _, all_v = run(y, x, tables(loras, meta, True, device))
        check(loras, rows, x, y0, y, all_v)


@HALVES
def test_the_rows_of_the_language_head(dtype, device):
    """The last row of each prompt: segments are set entry by entry, and may be empty."""
    rows = [0] * 4 + [2] * 3 + [7] * 5 + [1] * 6 + [0] * 2
    heads = [3, 5, 6, 11, 19]  # two prompts of adapter 2; none of adapter 1 ends in this chunk
    loras = mixed_loras(dtype, device)
    left = [rows[head] for head in heads]
    x = randn(len(left), H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(len(left), H_OUT, dtype=dtype, device=device, seed=2)
    y, made = y0.clone(), tables(loras, Meta.of(rows, device), True, device, heads)
    assert made[1][16].starts.tolist() == made[1][16].ends.tolist()
    _, all_v = run(y, x, made)
    check(loras, left, x, y0, y, all_v)


@HALVES
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
def test_tensor_parallel(prefill, dtype, device):
    """Each of two devices has half of A's rank, v is gathered, and each then adds its columns of B's product."""
    rows, devices = [0] * 9 + [1] * 20 + [7] * 3 + [0], 2
    whole = {i: Lora(rank, dtype, device, seed=i, devices=devices) for i, rank in ((0, 8), (1, 40))}
    assert [lora.rank for lora in whole.values()] == [16, 48]
    x = randn(len(rows), H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(len(rows), H_OUT, dtype=dtype, device=device, seed=2)
    meta, half = Meta.of(rows, device), H_OUT // devices

    def share(lora: Lora, device_index: int) -> Lora:
        made, r = Lora.__new__(Lora), lora.rank // devices
        made.rank = r
        made.a = lora.a[:, :, device_index * r : (device_index + 1) * r].contiguous()
        made.b = lora.b[:, :, device_index * half : (device_index + 1) * half].contiguous()
        made.set_rank(r)
        return made

    parts = [{i: share(lora, d) for i, lora in whole.items()} for d in range(devices)]
    # What the other device sends: its v of the same rank.
    nothing = torch.zeros(len(rows), half, dtype=dtype, device=device)

    def shrink_only(part: dict[int, Lora]) -> dict[int, Tensor]:
        zero_width = lambda v: torch.cat([v, torch.zeros_like(v)], dim=1)  # noqa: E731
        _, all_v = run(nothing.clone(), x, tables(part, meta, prefill, device), gather=zero_width)
        return {rank: v[:, :rank] for rank, v in all_v.items()}

    sent = [shrink_only(part) for part in parts]
    for d, part in enumerate(parts):
        y = y0[:, d * half : (d + 1) * half].clone()
        gather = lambda v: torch.cat([s[v.shape[1]] for s in sent], dim=1)  # noqa: E731
        _, all_v = run(y, x, tables(part, meta, prefill, device), gather=gather)
        check_part = {i: Lora.__new__(Lora) for i in whole}
        for i, lora in check_part.items():
            lora.rank, lora.a, lora.b = whole[i].rank, whole[i].a, part[i].b
        gathered = {devices * rank: v for rank, v in all_v.items()}
        check(check_part, rows, x, y0[:, d * half : (d + 1) * half], y, gathered)


@HALVES
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("segments", [([0, 2], [1, 3]), ([0, -1], [1, -1]), ([0, 3], [3, 3])], ids=str)
def test_segments_that_pad_a_table(segments, rank, dtype, device):
    """A table of fixed size is filled up with -1 to -1 and null addresses; both calls once directly, once captured."""
    lora = Lora(rank, dtype, device, seed=3)
    rows = [-1] * 3
    for start, end in zip(*segments, strict=True):
        rows[start:end] = [0] * (end - start)
    starts, ends = (torch.tensor(side, dtype=torch.int32, device=device) for side in segments)
    used = (starts < ends).tolist()
    a_ptr, b_ptr = (
        torch.tensor([w.data_ptr() if u else 0 for u in used], dtype=torch.int64, device=device)
        for w in (lora.a_sgmv, lora.b_sgmv)
    )
    made = True, {rank: Rank(a_ptr, b_ptr, starts, ends, workspaces(len(used), rank, device))}
    x = randn(3, H_IN, dtype=dtype, device=device, seed=1)
    y0 = torch.zeros(3, H_OUT, dtype=dtype, device=device)
    y = y0.clone()
    _, all_v = run(y, x, made)
    check({0: lora}, rows, x, y0, y, all_v)
    if device == "cuda":
        again = y0.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None):
            run(again, x, made)
        torch.cuda.synchronize()
        graph.replay()
        assert torch.equal(again, y)


@HALVES
def test_workspaces_of_one_call(dtype, device):
    """The older way: new tensors for every call, of exactly the bytes asked for."""
    lora, rows = Lora(16, dtype, device, seed=3), [0] * 7
    starts, ends = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, 7))
    a_ptr, b_ptr = (torch.tensor([w.data_ptr()], device=device) for w in (lora.a_sgmv, lora.b_sgmv))
    size = pk.sgmv_cutlass_tmp_size(a_ptr.size(0))
    assert type(size) is int
    tmps = [torch.empty((n,), dtype=torch.uint8, device=device) for n in (WORKSPACE, size)]
    x = randn(7, H_IN, dtype=dtype, device=device, seed=1)
    y0 = randn(7, H_OUT, dtype=dtype, device=device, seed=2)
    y, v = y0.clone(), torch.zeros(7, 16, dtype=dtype, device=device)
    pk.sgmv_shrink(v, x, a_ptr, starts, ends, tmps[0], LAYER)
    pk.sgmv_cutlass(y, v, b_ptr, starts, ends, tmps[1], LAYER)
    check({0: lora}, rows, x, y0, y, {16: v})


@HALVES
@pytest.mark.parametrize("rank", [8, 64])
def test_decode_under_graphs(rank, dtype, device):
    """Tables of the largest batch, of which a graph uses the first entries; each step fills them, pads and replays.

    As many addresses as the next power of two of the graph's rows: null, and indices -1, where nothing is. The graph is
    traced while there are no adapters at all. (Without CUDA the same tables are used by calls of their own.)
    """
    most, batch = 32, 13
    static_x = torch.zeros(batch, H_IN, dtype=dtype, device=device)
    static_y0 = torch.zeros(batch, H_OUT, dtype=dtype, device=device)
    a_ptr, b_ptr = (torch.zeros((most,), dtype=torch.int64, device=device)[:16] for _ in range(2))
    indices = torch.full((most,), -1, dtype=torch.int64, device=device)[:batch]
    made = False, {rank: Rank(a_ptr, b_ptr, indices=indices)}
    out: dict[str, object] = {}

    def forward() -> None:
        out["y"] = static_y0.clone()
        _, out["v"] = run(out["y"], static_x, made)

    forward()
    assert torch.equal(out["y"], static_y0)
    replay = forward
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
            forward()
        torch.cuda.synchronize()
        replay = graph.replay

    def fill(into: Tensor, values: Tensor, rest: int) -> None:
        into[: values.shape[0]].copy_(values, non_blocking=True)
        into[values.shape[0] :].fill_(rest)

    loras = {i: Lora(rank, dtype, device, seed=10 * i) for i in range(5)}
    for step, rows in enumerate(([0, 1, 1, 2], [4] * batch, [9, 3, 9, 3, 0, 0, 0, 1, 2, 4], [2], [9, 9])):
        static_x.normal_(generator=torch.Generator(device).manual_seed(step))
        static_y0.normal_(generator=torch.Generator(device).manual_seed(step + 50))
        meta = Meta.of(rows, device)
        if set(rows) & set(loras):
            of = tables(loras, meta, False, device)[1][rank]
            fill(a_ptr, of.a_ptr, 0)
            fill(b_ptr, of.b_ptr, 0)
            fill(indices, of.indices, -1)
        else:
            indices.fill_(-1)
        replay()
        check(loras, rows + [-1] * (batch - len(rows)), static_x, static_y0, out["y"], out["v"])


def test_the_names_that_are_looked_up():
    for name in ("dispatch_bgmv", "sgmv_shrink", "sgmv_cutlass", "sgmv_cutlass_tmp_size", "rms_norm"):
        assert callable(getattr(pk, name))
    for name in ("batch_prefill", "batch_decode", "init_kv", "append_kv"):
        assert callable(getattr(pk, name))

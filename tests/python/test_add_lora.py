import inspect
import itertools
import math
from collections import Counter

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, add_lora_terms, beside, check_add_lora, int32, make_lora, randn, strided
from punica_kernels import reference
from tolerances import assert_close

# ------------------------------------------------------------------------------------------------------------ LoraBatch


def expected_batch(indices, num_adapters, capacity):
    """What the tensors of a batch must hold, made from Python lists."""
    clean = [i if 0 <= i < num_adapters else -1 for i in indices]
    order = sorted(range(len(clean)), key=lambda t: (clean[t], t))
    rows_of = Counter(clean)
    present = sorted(rows_of)
    size = min(capacity, num_adapters + 1)
    starts = [0, *itertools.accumulate(rows_of[i] for i in present)]
    return {
        "indices": clean + [-1] * (capacity - len(clean)),
        "order": order + [-1] * (capacity - len(clean)),
        "segment_adapter": present + [-1] * (size - len(present)),
        "segment_start": starts + [0] * (size + 1 - len(starts)),
        "counts": [len(present), sum(i >= 0 for i in clean)],
    }


def contents(batch):
    return {name: getattr(batch, name).tolist() for name in expected_batch([], 0, 0)}


def test_batch(device):
    indices = [2, 0, -1, 1, 2, 2, 0, -7, 1]
    for dtype in (torch.int32, torch.int64):
        batch = pk.LoraBatch(torch.tensor(indices, dtype=dtype, device=device), 4)
        assert contents(batch) == expected_batch(indices, 4, 9)
        assert all(getattr(batch, name).dtype == torch.int32 for name in contents(batch))
    wide = pk.LoraBatch(torch.tensor(indices, device=device), 100, capacity=20)
    assert wide.capacity == 20
    memory = {name: getattr(wide, name).data_ptr() for name in contents(wide)}
    for new in (indices, [], [99] * 20, list(range(20)), [-1, -1], [5]):
        wide.update(torch.tensor(new, dtype=torch.int64, device=device))
        assert contents(wide) == expected_batch(new, 100, 20)
    assert {name: getattr(wide, name).data_ptr() for name in contents(wide)} == memory


@pytest.mark.parametrize(("rows", "num_adapters"), [
    (0, 0), (0, 5), (5, 0), (1, 1), (1, 3000), (31, 2), (32, 32), (33, 1), (1023, 7), (1024, 1025), (1025, 4096),
    (4097, 300), (16384, 3), (65536, 5000), (5000, 60000), (70000, 60000), (40, 2**31 - 1), (3000, 2**31 - 1),
])  # fmt: skip
def test_batch_sizes(rows, num_adapters, device):
    generator = torch.Generator().manual_seed(rows)
    indices = torch.randint(-1, max(num_adapters, 1), (rows,), generator=generator)
    if num_adapters == 0:
        indices.fill_(-1)
    if rows > 8:
        indices[:4] = num_adapters - 1  # one that comes often, and the largest
        indices[-3:] = -(2**40)
    batch = pk.LoraBatch(indices.to(device), num_adapters, capacity=rows + 3)
    expected = expected_batch(indices.tolist(), num_adapters, rows + 3)
    assert contents(batch) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_batch(data):
    num_adapters = data.draw(st.integers(0, 40))
    indices = data.draw(st.lists(st.integers(-3, num_adapters - 1), max_size=60))
    capacity = len(indices) + data.draw(st.integers(0, 9))
    batch = pk.LoraBatch(torch.tensor(indices, dtype=torch.int64), num_adapters, capacity)
    assert contents(batch) == expected_batch(indices, num_adapters, capacity)


def test_batch_errors(device):
    indices = torch.tensor([0, 1], device=device)
    batch = pk.LoraBatch(indices, 2)
    before = contents(batch)
    for wrong, match in [
        (torch.zeros(3, dtype=torch.int64, device=device), r"order must have at least 3 entries \(len\(indices\)\)"),
        (torch.zeros(2, device=device), "indices must be int32 or int64, got float32"),
        (torch.zeros(2, 2, dtype=torch.int32, device=device), "indices must have shape"),
        (torch.zeros(4, dtype=torch.int32, device=device)[::2], "indices must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            batch.update(wrong)
        assert contents(batch) == before
    with pytest.raises(RuntimeError, match="capacity"):
        pk.LoraBatch(indices, 2, capacity=-1)
    with pytest.raises(RuntimeError, match="order must have at least 2 entries"):
        pk.LoraBatch(indices, 2, capacity=1)
    with pytest.raises(RuntimeError, match="num_adapters"):
        pk.LoraBatch(indices, -1)
    with pytest.raises(RuntimeError, match=r"segment_adapter must have at least 6 entries"):
        torch.ops.punica_kernels.update_lora_batch(
            indices, 5, *(torch.zeros(n, dtype=torch.int32, device=device) for n in (6, 6, 5, 6, 2))
        )


def test_index_too_large(device):
    """An error where contents are checked, else no adapter."""
    indices = torch.tensor([0, 3, 1], device=device)
    checks = pk.set_checks(True)
    try:
        with pytest.raises(RuntimeError, match=r"indices\[1\] must be below 3 \(num_adapters\), got 3"):
            pk.LoraBatch(indices, 3)
    finally:
        pk.set_checks(checks)
    if device == "cuda":
        assert contents(pk.LoraBatch(indices, 3)) == expected_batch([0, 3, 1], 3, 3)


# ----------------------------------------------------------------------------------------------------- what is computed

SHAPES = [
    (64, 64, 8), (64, 64, 16), (576, 576, 32), (96, 200, 64), (1030, 77, 5), (33, 1, 1), (1, 33, 3), (128, 48, 128),
    (640, 130, 256), (40, 70, 300), (256, 520, 512), (4096, 100, 16), (17, 4096, 4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h_in", "h_out", "rank"), SHAPES)
def test_shapes(h_in, h_out, rank, dtype, device):
    check_add_lora([rank, rank, rank], h_in, [0, h_out], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_ranks(dtype, device):
    ranks = [8, 16, 32, 64, 1, 0, 7, 100]
    indices = [*range(8), -1, *range(7, -1, -1), 3, 3, 3]
    check_add_lora(ranks, 200, [0, 96], dtype, device, indices)
    check_add_lora([ranks, ranks[::-1], [4] * 8], 200, [3, 96, 100, 140], dtype, device, indices, width=150)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 130])
def test_rows_of_one_adapter(count, device):
    for dtype in DTYPES:
        check_add_lora([16, 40], 96, [0, 80], dtype, device, [1] * count + [0, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices(dtype, device):
    """Ranks, scales and addresses of their own; an empty slice; columns of no slice (asserted in the check)."""
    check_add_lora([[4, 0, 9], [16, 3, 0], [2, 2, 2]], 48, [5, 21, 21, 60], dtype, device, width=64)
    check_add_lora([6, 7, 8], 48, [0, 16, 40], dtype, device, scales=[1.0, 0.0, -2.0])
    check_add_lora([6, 7, 8], 48, list(range(0, 68, 4)), dtype, device)  # 16


def test_strided_rows(device):
    for dtype in DTYPES:
        y = check_add_lora([4, 8, 16], 37, [0, 19], dtype, device, rows=strided)
        assert beside(y).isnan().all()


def test_padded_slots(device):
    """Rows of B, and layers of A, as far apart as the largest rank says."""
    for dtype in DTYPES:
        check_add_lora([4, 16, 9], 48, [0, 33], dtype, device, padded=16)
        check_add_lora([4, 64, 9], 48, [0, 30, 66], dtype, device, padded=64, layers=3, layer=2)


def test_layer_strides(device):
    """Layers anywhere: all of A and B of a layer side by side in one block."""
    rank, h_in, h_out, layers = 4, 24, 40, 3
    block = rank * (h_in + h_out)
    memory = torch.full((2, layers, block), math.nan, device=device)
    for i in range(2):
        memory[i, 1] = randn(block, dtype=torch.float32, device=device, seed=i)
    a_ptr = torch.tensor([[memory[i].data_ptr() for i in range(2)]], device=device)
    b_ptr = a_ptr + 4 * rank * h_in
    x, y = randn(5, h_in, dtype=torch.float32, device=device), torch.zeros(5, h_out, device=device)
    indices = [0, 1, -1, 1, 0]
    batch = pk.LoraBatch(torch.tensor(indices, device=device), 2)
    tables = (a_ptr, b_ptr, int32([rank, rank], device), torch.ones(2, device=device))
    pk.add_lora(y, x, *tables, batch, 1, a_layer_stride=block, b_layer_stride=block)
    exact = torch.zeros(5, h_out, dtype=torch.float64, device=device)
    for t, i in enumerate(indices):
        if i >= 0:
            a = memory[i, 1, : rank * h_in].view(rank, h_in).double()
            exact[t] = memory[i, 1, rank * h_in :].view(h_out, rank).double() @ (a @ x[t].double())
    assert_close(y, exact, terms=exact.abs().amax() * 10)


def test_left_out(device):
    """Rank 0, address 0 of A, of B: nothing is done for that slice, bit for bit, and for that one alone."""
    for dtype in DTYPES:
        lora = make_lora([[4, 4, 4, 0], [4, 4, 4, 4]], 24, [0, 10, 30], dtype, device)
        lora.a_ptr[0, 1] = 0
        lora.b_ptr[0, 2] = 0
        lora.b_ptr[1, 3] = 0
        y0 = randn(4, 30, dtype=dtype, device=device)
        y0[:, 5] = math.nan
        y = check_add_lora(None, 24, [0, 10, 30], dtype, device, [1, 2, 3, 0], lora=lora)
        before = randn(4, 30, dtype=dtype, device=device, seed=1)
        assert torch.equal(y[:3, :10], before[:3, :10])
        assert torch.equal(y[2, 10:], before[2, 10:])
        assert not torch.equal(y[3, :10], before[3, :10])
        assert not torch.equal(y[0, 10:], before[0, 10:])


def test_nothing_to_do(device):
    for rows, h_in, width, adapters in [(0, 8, 8, 2), (3, 0, 8, 2), (3, 8, 0, 2), (3, 8, 8, 0)]:
        y, x = torch.ones(rows, width, device=device), torch.ones(rows, h_in, device=device)
        table = torch.zeros(1, adapters, dtype=torch.int64, device=device)
        ranks, scales = int32([4] * adapters, device), torch.ones(adapters, device=device)
        batch = pk.LoraBatch(torch.full((rows,), adapters - 1, device=device), adapters)
        pk.add_lora(y, x, table, table, ranks, scales, batch, 0)
        assert (y == 1).all()


def test_rows_do_not_see_each_other(device):
    for dtype in DTYPES:
        lora = make_lora([4, 4, 4], 24, [0, 40], dtype, device)
        lora.a[0][2].fill_(math.nan)
        indices = [0, -1, 1, 2, 1]
        y0, x = randn(5, 40, dtype=dtype, device=device), randn(5, 24, dtype=dtype, device=device, seed=1)
        x[1] = math.nan  # has no adapter
        x[4] = math.inf
        y = y0.clone()
        batch = pk.LoraBatch(torch.tensor(indices, device=device), 3)
        pk.add_lora(y, x, *lora.tables, batch, lora.layer)
        exact, terms = add_lora_terms(y0, x, lora, indices)
        assert_close(y[[0, 2]], exact[[0, 2]], terms=terms[[0, 2]])
        assert torch.equal(y[1], y0[1])
        assert y[3].isnan().all()
        assert not y[4].isfinite().any()


# ------------------------------------------------------------------------------------ the intermediate is never rounded


def one_row(a, b, x, dtype, device, y0=0.0):
    """y of one row, one adapter: A [r, h_in], B [h_out, r], x [h_in] as lists."""
    a, b, x = (torch.tensor(t, dtype=torch.float64).to(dtype).to(device) for t in (a, b, x))
    tables = (torch.tensor([[t.data_ptr()]], device=device) for t in (a, b))
    y = torch.full((1, len(b)), y0, dtype=dtype, device=device)
    batch = pk.LoraBatch(torch.zeros(1, dtype=torch.int64, device=device), 1)
    pk.add_lora(y, x[None], *tables, int32([len(a)], device), torch.ones(1, device=device), batch, 0)
    return y[0]


@pytest.mark.parametrize("h_out", [3, 64])
@pytest.mark.parametrize("h_in", [16, 320])
def test_float16_intermediate_beyond_its_range(h_in, h_out, device):
    """v = 131072 is infinite in float16; y = 4 is not."""
    x = [256.0] * 8 + [0.0] * (h_in - 8)
    y = one_row([[64.0] * h_in], [[2.0**-15]] * h_out, x, torch.float16, device)
    assert y.tolist() == [4.0] * h_out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [2, 16, 33])
def test_cancellation_between_ranks(rank, dtype, device):
    """v = (1 + 2^-12, 1, 0, ...) and B = (256, -256, 0, ...): what is left, 1/16, is below the rounding of v to T."""
    h_in, h_out = 32, 40
    x = [1.0, 2.0**-12] + [0.0] * (h_in - 2)
    a = [[1.0, 1.0] + [0.0] * (h_in - 2), [1.0] + [0.0] * (h_in - 1)] + [[0.0] * h_in] * (rank - 2)
    b = [[256.0, -256.0] + [0.0] * (rank - 2)] * h_out
    assert one_row(a, b, x, dtype, device).tolist() == [0.0625] * h_out
    # The same in rows that share an adapter: other paths.
    if dtype != torch.float32:
        assert torch.tensor(1 + 2.0**-12).to(dtype).item() == 1  # so that rounding v would give 0


def test_cancellation_in_a_batch(device):
    for dtype in DTYPES:
        a = torch.zeros(16, 32, dtype=dtype, device=device)
        a[0, :2], a[1, 0] = 1.0, 1.0
        b = torch.zeros(48, 16, dtype=dtype, device=device)
        b[:, 0], b[:, 1] = 256.0, -256.0
        x = torch.zeros(70, 32, dtype=dtype, device=device)
        x[:, 0], x[:, 1] = 1.0, 2.0**-12
        y = torch.zeros(70, 48, dtype=dtype, device=device)
        tables = (torch.tensor([[t.data_ptr()]], device=device) for t in (a, b))
        batch = pk.LoraBatch(torch.zeros(70, dtype=torch.int64, device=device), 1)
        pk.add_lora(y, x, *tables, int32([16], device), torch.ones(1, device=device), batch, 0)
        assert (y == 0.0625).all()


# ------------------------------------------------------------------------------------------------- the same bits always


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h_in", "offsets", "ranks"), [
    (576, [0, 96], [16, 8, 64]), (100, [0, 40, 70, 101], [5, 16, 4]), (1030, [0, 33], [130, 32, 300]),
])  # fmt: skip
def test_a_row_alone(h_in, offsets, ranks, dtype, device):
    """A row's bits do not depend on the rest of the batch, nor on how many rows share its adapter."""
    total = 140
    lora = make_lora(ranks, h_in, offsets, dtype, device)
    x = randn(total, h_in, dtype=dtype, device=device, seed=3)
    y0 = randn(total, offsets[-1], dtype=dtype, device=device, seed=4)

    def run(rows, adapters, capacity=None, **options):
        y = y0[rows].clone()
        batch = pk.LoraBatch(torch.tensor(adapters, device=device), 3, capacity)
        pk.add_lora(y, x[rows].clone(), *lora.tables, batch, lora.layer, offsets, **options)
        return y

    everything = list(range(total))
    mixed = run(everything, [t % 3 for t in everything])
    for t in [0, 1, 2, 17, 63, 64, 65, 127, 128, 139]:
        assert torch.equal(run([t], [t % 3])[0], mixed[t]), t
    same = [run(everything, [i] * total) for i in range(3)]
    for i in range(3):
        rows = [t for t in everything if t % 3 == i]
        assert torch.equal(same[i][rows], mixed[rows])
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 66, 129):
            first = (7 * count) % (total - count)
            part = run(everything[first : first + count], [i] * count, capacity=count + 5)
            assert torch.equal(part, same[i][first : first + count]), (i, count)
    assert torch.equal(run(everything, [t % 3 for t in everything], max_rank=max(ranks)), mixed)
    # A slice has the same bits by itself.
    for s in range(len(offsets) - 1):
        y = y0.clone()
        batch = pk.LoraBatch(torch.tensor([t % 3 for t in everything], device=device), 3)
        tables = (lora.a_ptr[s : s + 1], lora.b_ptr[s : s + 1], lora.ranks, lora.scales)
        columns = offsets[s : s + 2]
        pk.add_lora(y, x, *tables, batch, lora.layer, columns)
        assert torch.equal(y[:, columns[0] : columns[1]], mixed[:, columns[0] : columns[1]])


def test_deterministic(device):
    results = [check_add_lora([16, 64, 3], 700, [0, 300, 420], torch.bfloat16, device) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_do_not_change_bits(threads):
    indices = [i % 3 for i in range(200)]
    for h_in, offsets in ((3000, [0, 64]), (64, [0, 3000]), (500, [0, 300, 1500])):
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(check_add_lora([16, 70, 3], h_in, offsets, torch.bfloat16, indices=indices))
        assert all(torch.equal(result, results[0]) for result in results)


def test_alignment_changes_no_bits(device):
    for dtype in DTYPES:
        lora = make_lora([16, 16], 64, [0, 64], dtype, device)
        x, y0 = randn(9, 64, dtype=dtype, device=device), randn(9, 64, dtype=dtype, device=device, seed=1)
        batch = pk.LoraBatch(torch.arange(9, device=device) % 2, 2)
        results = []
        for shift in (0, 1, 3):
            kept, tables = [], []
            for side in (lora.a, lora.b):
                moved = []
                for weight in side[0]:
                    memory = torch.empty(weight.numel() + 8, dtype=dtype, device=device)
                    memory[shift : shift + weight.numel()] = weight.flatten()
                    kept.append(memory)
                    moved.append(memory[shift:].data_ptr())
                tables.append(torch.tensor([moved], device=device))
            y = y0.clone()
            pk.add_lora(y, x, *tables, lora.ranks, lora.scales, batch, lora.layer)
            results.append(y)
        assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_add_lora(data):
    h_in = data.draw(st.integers(1, 120))
    slices = data.draw(st.integers(1, 4))
    cuts = sorted(data.draw(st.lists(st.integers(0, 90), min_size=slices + 1, max_size=slices + 1)))
    adapters = data.draw(st.integers(1, 4))
    ranks = [data.draw(st.lists(st.integers(0, 40), min_size=adapters, max_size=adapters)) for _ in range(slices)]
    if data.draw(st.booleans()):
        ranks = ranks[0]
    indices = data.draw(st.lists(st.integers(-2, adapters - 1), max_size=12))
    check_add_lora(
        ranks, h_in, cuts, data.draw(st.sampled_from(DTYPES)), indices=indices, width=cuts[-1] + 3,
        rows=data.draw(st.sampled_from([None, strided])), capacity=len(indices) + data.draw(st.integers(0, 3)),
        padded=data.draw(st.sampled_from([None, 40, 48])),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tables


class Metadata:
    """vLLM's layout, as its documentation describes it: -1 first, buffers of fixed size."""

    def __init__(self, max_loras, max_tokens, device):
        def empty(n):
            return torch.full((n,), 77, dtype=torch.int32, device=device)

        self.token_lora_mapping, self.token_indices_sorted_by_lora_ids = empty(max_tokens), empty(max_tokens)
        self.active_lora_ids, self.num_tokens_per_lora = empty(max_loras + 1), empty(max_loras + 1)
        self.lora_token_start_loc = empty(max_loras + 2)

    def prepare(self, mapping):
        self.active_lora_ids.fill_(-1)
        self.num_tokens_per_lora.fill_(0)
        self.lora_token_start_loc.fill_(0)
        if (mapping == -1).all():
            return  # the two others stay as they were
        self.token_lora_mapping[: len(mapping)] = mapping
        self.token_indices_sorted_by_lora_ids[: len(mapping)] = torch.sort(mapping, stable=True).indices
        ids, counts = torch.unique(mapping, sorted=True, return_counts=True)
        self.active_lora_ids[: len(ids)] = ids
        self.num_tokens_per_lora[: len(ids)] = counts
        self.lora_token_start_loc[1 : 1 + len(ids)] = counts.cumsum(0)

    def arguments(self, tokens):
        return (
            self.token_lora_mapping[:tokens], self.token_indices_sorted_by_lora_ids[:tokens], self.num_tokens_per_lora,
            self.lora_token_start_loc, self.active_lora_ids,
        )  # fmt: skip


def test_vllm_metadata(device):
    dtype, max_loras = torch.bfloat16, 4
    lora = make_lora([16, 16, 5, 0], 48, [0, 40], dtype, device, padded=16)
    meta = Metadata(max_loras, 32, device)
    batch = pk.LoraBatch.from_vllm(*meta.arguments(32))  # once: the tensors are filled anew, the batch sees it
    assert batch.order.data_ptr() == meta.token_indices_sorted_by_lora_ids.data_ptr()
    for mapping in ([0, 2, -1, 0, 3, 1], [1] * 9, [-1, -1], [2, -1, 0], [-1] * 5, list(range(4)) * 7):
        mapping_tensor = torch.tensor(mapping, dtype=torch.int32, device=device)
        meta.prepare(mapping_tensor)
        rows = len(mapping)
        y0, x = randn(32, 40, dtype=dtype, device=device), randn(32, 48, dtype=dtype, device=device, seed=1)
        ours = pk.LoraBatch(mapping_tensor, max_loras, capacity=32)
        results = []
        for b, n in ((batch, 32), (ours, 32), (pk.LoraBatch.from_vllm(*meta.arguments(rows)), rows)):
            y = y0.clone()
            pk.add_lora(y[:n], x[:n], *lora.tables, b, lora.layer, **lora.options)
            results.append(y)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        exact, terms = add_lora_terms(y0[:rows], x[:rows], lora, mapping)
        assert_close(results[0][:rows], exact, terms=terms)
        assert torch.equal(results[0][rows:], y0[rows:])
        if any(i >= 0 for i in mapping):  # else vLLM counts the rows without adapter, too, as nothing
            for name, tensor in zip(
                ("indices", "order", "segment_start", "segment_adapter"),
                (*meta.arguments(rows)[:2], *meta.arguments(rows)[3:]), strict=True,
            ):  # fmt: skip
                assert torch.equal(getattr(ours, name)[: len(tensor)], tensor), name
    with pytest.raises(RuntimeError, match="belong to somebody else"):
        batch.update(torch.tensor([0], device=device))


def test_batch_may_be_larger_than_the_call(device):
    """Segments cover the given rows only, so a batch of any capacity serves."""
    lora = make_lora([4, 8], 24, [0, 16], torch.float32, device)
    x = randn(6, 24, dtype=torch.float32, device=device)
    results = []
    for capacity in (6, 7, 1000):
        y = torch.zeros(6, 16, device=device)
        batch = pk.LoraBatch(torch.tensor([1, 0, -1, 1, 1, 0], device=device), 2, capacity)
        pk.add_lora(y, x, *lora.tables, batch, lora.layer)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    batch = pk.LoraBatch(torch.zeros(4, dtype=torch.int64, device=device), 2)
    with pytest.raises(RuntimeError, match=r"order must have at least 6 entries \(rows of y\), got 4"):
        pk.add_lora(y, x, *lora.tables, batch, lora.layer)


def test_unused_entries_are_not_looked_at():
    """Only what the batch chooses is checked."""
    lora = make_lora([4, 8, 5], 24, [0, 16], torch.float32)
    lora.ranks[1] = -5
    lora.a_ptr[0, 2] = 3
    check_add_lora(None, 24, [0, 16], torch.float32, indices=[0, -1, 0], lora=lora)


def test_signatures_agree():
    ours = list(inspect.signature(pk.add_lora).parameters.values())
    plain = list(inspect.signature(reference.add_lora).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in plain]


# ------------------------------------------------------------------------------------------------------------ compiling


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    lora = make_lora([4, 8, 0], 16, [0, 10, 20], torch.float32)

    def step(x, indices, batch, tables):
        batch.update(indices)
        y = x @ torch.ones(16, 20) * 0.5
        pk.add_lora(y, x, *tables, batch, 1, [0, 10, 20])
        return torch.relu(y)

    x = randn(4, 16, dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    batches = [pk.LoraBatch(torch.full((4,), -1), 3) for _ in range(2)]
    for indices in ([0, 1, -1, 2], [1, 1, 1, 0]):
        given_indices = torch.tensor(indices)
        expected = step(x, given_indices, batches[0], lora.tables)
        torch.testing.assert_close(
            compiled(x, given_indices, batches[1], lora.tables), expected,
            rtol=0, atol=0 if backend != "inductor" else 1e-4,
        )  # fmt: skip
        assert contents(batches[1]) == expected_batch(indices, 3, 4)


def test_compile_with_symbolic_sizes():
    torch._dynamo.reset()
    lora = make_lora([4, 8], 16, [0, 20], torch.float32)

    def step(x, batch, tables):
        y = torch.zeros(len(x), 20)
        pk.add_lora(y, x, *tables, batch, 1)
        return y + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 3, 7):
        x = randn(count, 16, dtype=torch.float32)
        batch = pk.LoraBatch(torch.arange(count) % 2, 2)
        assert torch.equal(compiled(x, batch, lora.tables), step(x, batch, lora.tables))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_the_batch_made_inside(backend):
    torch._dynamo.reset()
    lora = make_lora([4, 8], 16, [0, 20], torch.float32)

    def step(x, indices, tables):
        y = torch.zeros(len(x), 20)
        pk.add_lora(y, x, *tables, pk.LoraBatch(indices, 2), 1)
        return y * 2

    x, indices = randn(5, 16, dtype=torch.float32), torch.tensor([0, 1, -1, 1, 0])
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, indices, lora.tables), step(x, indices, lora.tables))

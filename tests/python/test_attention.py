import itertools
import math

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, beside, check_attention, int32, make_cache, randn, strided
from punica_kernels import reference
from tolerances import weight_rounding

HEAD_DIMS = [2, 6, 64, 80, 96, 128, 192, 256]
OPTIONS = {
    "rope": {"rope_theta": 1e4},
    "scaled rope": {"rope_theta": 5e5, "rope_scale": 4.0},
    "window": {"window_left": 5},
    "itself only": {"window_left": 0},
    "soft cap": {"logits_soft_cap": 3.0},
    "scale": {"sm_scale": 0.7},
    "negative scale": {"sm_scale": -0.05},
    "all": {"rope_theta": 1e4, "window_left": 9, "logits_soft_cap": 5.0, "sm_scale": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_decode(page_size, head_dim, dtype, device):
    lengths = [1, 0, 37, page_size, 2 * page_size + 3]
    check_attention(lengths, None, dtype, device, page_size=page_size, head_dim=head_dim, decode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_prefill(page_size, head_dim, dtype, device):
    # A whole prompt, a chunk, one token, nothing, a sequence without pages, more queries than keys.
    lengths, q_lens = [9, 2 * page_size + 3, 17, 6, 0, 3], [9, 4, 1, 0, 2, 5]
    check_attention(lengths, q_lens, dtype, device, page_size=page_size, head_dim=head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (3, 3), (2, 5), (1, 16), (5, 1), (2, 7), (1, 8), (4, 4)])
def test_heads(num_kv_heads, group, dtype, device):
    shape = {"num_kv_heads": num_kv_heads, "group": group}
    check_attention([21, 7], None, dtype, device, decode=True, **shape)
    check_attention([21, 4], [6, 4], dtype, device, **shape)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, device):
    for dtype in DTYPES:
        check_attention([21, 1, 0, 40], None, dtype, device, decode=True, **OPTIONS[options])
        check_attention([13, 1, 0, 40], [13, 1, 1, 6], dtype, device, **OPTIONS[options])


def test_long(device):
    """Longer than one split of the keys, whatever its size."""
    for dtype in DTYPES:
        check_attention([3001], None, dtype, device, num_kv_heads=1, group=2, page_size=16, decode=True)
        check_attention([1400], [3], dtype, device, num_kv_heads=1, group=2, page_size=16)


def test_large_scores(device):
    """Scores far outside the range of exp in float32: the running maximum must be subtracted."""
    for dtype in DTYPES:
        check_attention([300, 9], None, dtype, device, decode=True, sm_scale=40.0)
        check_attention([300, 9], [5, 9], dtype, device, sm_scale=-40.0)


def test_far_positions(device):
    """Rotation at positions near 2^20, where an angle in float32 would be off by 0.03: only the newest pages exist."""
    length, page_size, head_dim = 2**20, 4096, 64
    window = 200
    for dtype in (torch.float32, torch.bfloat16):
        cache = make_cache([page_size], 1, page_size, head_dim, dtype, device)
        count = length // page_size
        cache.kv_ptrs = torch.zeros(count, dtype=torch.int64, device=device)
        cache.kv_ptrs[-1] = cache.pages[0][0].data_ptr()
        cache.kv_indptr = int32([0, count], device)
        q = randn(1, 1, head_dim, dtype=dtype, device=device)
        o = torch.empty_like(q)
        options = {"rope_theta": 1e4, "window_left": window}
        pk.batch_decode(o, q, *cache.tables, None, *cache.scalars, **options)

        # The definition, written out: rotate the window's keys and the query, in float64.
        keys, values = cache.tokens(0)[:, 0, -window - 1 :].double()
        positions = torch.arange(length - window - 1, length, device=device)
        keys = reference.rotate(keys[:, None], positions, 1e4)[:, 0]
        query = reference.rotate(q.double(), positions[-1:], 1e4)[0, 0]
        weight = (keys @ query / math.sqrt(head_dim)).softmax(0)
        error = (o[0, 0].double() - weight @ values).abs().max()
        unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
        # 1e-5 rad in q and k each, on scores of |q| |k| / sqrt(D), weighing values of about 1; then rounding.
        # On tensor cores the weights, and q and k after the rotation, are rounded to the type.
        rounded = weight_rounding(q)
        score = (2e-5 + 2.1 * rounded) * query.norm() * keys.norm(dim=1).max() / math.sqrt(head_dim)
        spread = (weight @ values.abs()).max()
        assert error <= (torch.expm1(2 * score) + rounded) * spread + unit * (weight @ values).abs().max()


@pytest.mark.parametrize("decode", [False, True])
def test_strided_rows(decode, device):
    for dtype in DTYPES:
        o, _ = check_attention([9, 4], [9, 2], dtype, device, decode=decode, rows=strided)
        assert beside(o).isnan().all()


def test_q_and_o_in_one_projection(device):
    cache = make_cache([7, 5], 2, 4, 8, torch.float32, device)
    qkv = randn(2, 2 * 32, dtype=torch.float32, device=device)
    q, o = qkv[:, :32].view(2, 4, 8), qkv[:, 32:].view(2, 4, 8)
    expected = torch.empty(2, 4, 8, device=device)
    pk.batch_decode(expected, q, *cache.tables, None, *cache.scalars)
    pk.batch_decode(o, q, *cache.tables, None, *cache.scalars)
    assert torch.equal(o, expected)


def test_no_sequences(device):
    cache = make_cache([], 2, 4, 8, torch.float32, device)
    q = torch.empty(0, 4, 8, device=device)
    lse = torch.empty(0, 4, device=device)
    pk.batch_decode(q, q.clone(), *cache.tables, None, *cache.scalars, lse=lse)
    pk.batch_prefill(q, q.clone(), int32([0], device), *cache.tables, None, *cache.scalars, lse=lse)


def test_uncovered_rows_stay(device):
    cache = make_cache([7, 5], 2, 4, 8, torch.float32, device)
    q = randn(9, 4, 8, dtype=torch.float32, device=device)
    o, lse = torch.full_like(q, 7.0), torch.full((9, 4), 7.0, device=device)
    pk.batch_prefill(o, q, int32([2, 5, 7], device), *cache.tables, None, *cache.scalars, lse=lse)
    assert (o[:2] == 7).all()
    assert (o[7:] == 7).all()
    assert (lse[[0, 1, 7, 8]] == 7).all()
    assert (o[2:7] != 7).all()


def test_sequences_without_pages(device):
    cache = make_cache([0, 5, 0], 2, 4, 8, torch.float32, device)
    q = randn(3, 4, 8, dtype=torch.float32, device=device)
    o, lse = torch.full_like(q, math.nan), torch.full((3, 4), math.nan, device=device)
    pk.batch_decode(o, q, *cache.tables, None, *cache.scalars, lse=lse)
    assert (o[[0, 2]] == 0).all()
    assert (lse[[0, 2]] == -math.inf).all()
    assert o[1].isfinite().all()


def test_pages_outside_the_window_are_not_looked_at(device):
    cache = make_cache([23, 30], 2, 4, 8, torch.float32, device)
    q = randn(2, 4, 8, dtype=torch.float32, device=device)
    expected, o = torch.empty_like(q), torch.empty_like(q)
    pk.batch_decode(expected, q, *cache.tables, None, *cache.scalars, window_left=6)
    cache.kv_ptrs[1:5] = 0  # of 23 tokens in pages of 4, 16 .. 22 are seen
    pk.batch_decode(o, q, *cache.tables, None, *cache.scalars, window_left=6)
    assert torch.equal(o, expected)


def test_other_sequences_do_not_matter(device):
    for dtype in DTYPES:
        for decode in (False, True):
            cache = make_cache([9, 7, 11], 2, 4, 8, dtype, device)
            q = randn(3, 4, 8, dtype=dtype, device=device)
            queries = () if decode else (int32([0, 1, 2, 3], device),)
            run = pk.batch_decode if decode else pk.batch_prefill
            clean, dirty = torch.empty_like(q), torch.empty_like(q)
            run(clean, q, *queries, *cache.tables, None, *cache.scalars)
            cache.set_tokens(1, torch.full((2, 2, 7, 8), math.inf, dtype=dtype, device=device))
            run(dirty, q, *queries, *cache.tables, None, *cache.scalars)
            assert torch.equal(clean[[0, 2]], dirty[[0, 2]])
            assert dirty[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["rope", "window", "all"])
def test_a_query_alone(dtype, options, device):
    """A query's bits depend on q and the keys it sees: not on the batch, the chunk it came in, or where pages lie."""
    options = OPTIONS[options]
    lengths = [70, 5, 23]
    o, lse = check_attention(lengths, lengths, dtype, device, head_dim=32, **options)
    q = randn(sum(lengths), 4, 32, dtype=dtype, device=device, seed=5)
    cache = make_cache(lengths, 2, 4, 32, dtype, device)
    for cuts in ([0, 70], [0, 1, 2, 33, 70], [0, 16, 32, 64, 70], [0, 69, 70]):
        for start, end in itertools.pairwise(cuts):  # the first sequence in chunks, each over the keys so far
            pages = -(-end // 4)
            part, part_lse = torch.empty(end - start, 4, 32, dtype=dtype, device=device), lse.new_empty(end - start, 4)
            pk.batch_prefill(
                part, q[start:end], int32([0, end - start], device), cache.kv_ptrs[1:], int32([0, pages], device),
                int32([(end - 1) % 4 + 1], device), None, *cache.scalars, lse=part_lse, **options,
            )  # fmt: skip
            assert torch.equal(part, o[start:end])
            assert torch.equal(part_lse, lse[start:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_alone_in_decode(dtype, device):
    lengths = [300, 5, 23, 64, 65]
    cache = make_cache(lengths, 3, 16, 64, dtype, device)
    q = randn(5, 9, 64, dtype=dtype, device=device, seed=5)
    batch = torch.empty_like(q)
    pk.batch_decode(batch, q, *cache.tables, None, *cache.scalars)
    for i in range(5):
        alone = torch.empty_like(q[:1])
        pk.batch_decode(
            alone, q[i : i + 1], cache.kv_ptrs, cache.kv_indptr[i : i + 2], cache.last_page_offset[i : i + 1], None,
            *cache.scalars,
        )  # fmt: skip
        assert torch.equal(alone[0], batch[i])


def test_threads_do_not_change_bits(threads):
    for decode in (False, True):
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(check_attention([900, 31], [40, 31], torch.bfloat16, head_dim=32, decode=decode))
        for o, lse in results[1:]:
            assert torch.equal(o, results[0][0])
            assert torch.equal(lse, results[0][1])


def test_decode_agrees_with_prefill(device):
    """The same query through both, where lse says how close: both are held to the same exact result elsewhere."""
    for dtype in DTYPES:
        decoded, lse = check_attention([40, 9, 1], None, dtype, device, decode=True)
        filled, lse_filled = check_attention([40, 9, 1], [1, 1, 1], dtype, device)
        # Each may round the weights of values below 5 to the type.
        torch.testing.assert_close(decoded, filled, rtol=1.6e-2, atol=1e-5 + 2 * 5 * weight_rounding(decoded))
        torch.testing.assert_close(lse, lse_filled)


def test_lse_merges(device):
    """Two halves of a cache, merged by their lse, give the whole: what a cascade does."""
    cache = make_cache([32], 2, 4, 8, torch.float32, device, spare=0)
    q = randn(1, 4, 8, dtype=torch.float32, device=device)
    parts = []
    for pages in (slice(0, 8), slice(0, 4), slice(4, 8)):
        o, lse = torch.empty_like(q), torch.empty(1, 4, device=device)
        table = cache.kv_ptrs[pages].contiguous()
        pk.batch_decode(
            o, q, table, int32([0, len(table)], device), int32([4], device), None, *cache.scalars, lse=lse
        )  # fmt: skip
        parts.append((o.double(), lse.double()))
    whole, left, right = parts
    total = torch.logaddexp2(left[1], right[1])
    merged = left[0] * torch.exp2(left[1] - total)[..., None] + right[0] * torch.exp2(right[1] - total)[..., None]
    torch.testing.assert_close(merged, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, whole[1], rtol=1e-6, atol=1e-6)


def test_given_workspace(device):
    cache = make_cache([40, 9], 2, 4, 64, torch.float16, device)
    q = randn(49, 4, 64, dtype=torch.float16, device=device)
    tmpbuf = torch.full((64 << 20,), 255, dtype=torch.uint8, device=device)  # the size that the original asked for
    for rope_theta in (None, 1e4):
        results = []
        for workspace in (None, tmpbuf, tmpbuf[1:]):
            o = torch.empty_like(q)
            pk.batch_prefill(
                o, q, int32([0, 40, 49], device), *cache.tables, workspace, *cache.scalars, rope_theta=rope_theta
            )  # fmt: skip
            d = torch.empty_like(q[:2])
            pk.batch_decode(d, q[:2], *cache.tables, workspace, *cache.scalars, rope_theta=rope_theta)
            results.append((o, d))
        for o, d in results[1:]:
            assert torch.equal(o, results[0][0])
            assert torch.equal(d, results[0][1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any(data):
    lengths = data.draw(st.lists(st.integers(0, 30), max_size=4))
    decode = data.draw(st.booleans())
    options = {}
    if data.draw(st.booleans()):
        options["window_left"] = data.draw(st.integers(-1, 30))
    if data.draw(st.booleans()):
        options["rope_theta"] = data.draw(st.floats(2, 1e6))
        options["rope_scale"] = data.draw(st.floats(0.25, 16))
    if data.draw(st.booleans()):
        options["logits_soft_cap"] = data.draw(st.floats(0.5, 50))
    check_attention(
        lengths, [data.draw(st.integers(0, 12)) for _ in lengths], data.draw(st.sampled_from(DTYPES)), decode=decode,
        num_kv_heads=data.draw(st.integers(1, 3)), group=data.draw(st.integers(1, 9)),
        page_size=data.draw(st.integers(1, 20)), head_dim=2 * data.draw(st.integers(1, 40)),
        rows=data.draw(st.sampled_from([None, strided])), **options,
    )  # fmt: skip

"""The KV writes: the memory of the cache must be the reference's, bit for bit, everywhere."""

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, int32, make_cache, randn, strided
from punica_kernels import reference


def check_init_kv(
    lengths, new, dtype, device="cpu", num_kv_heads=2, page_size=4, head_dim=8, layout=lambda t: t, head=0
):
    """new: how many tokens each sequence gets. head: rows of k and v that no sequence takes, in front and behind."""
    cache = make_cache(lengths, num_kv_heads, page_size, head_dim, dtype, device)
    total = sum(new) + 2 * head
    k, v = (layout(randn(total, num_kv_heads, head_dim, dtype=dtype, device=device, seed=s)) for s in (1, 2))
    indptr = [head]
    for count in new:
        indptr.append(indptr[-1] + count)
    arguments = (*cache.tables, k, v, int32(indptr, device), *cache.scalars)
    before = cache.snapshot()
    pk.init_kv(*arguments)
    ours = cache.snapshot()
    cache.memory.view(torch.uint8).copy_(before)
    reference.init_kv(*arguments)
    assert torch.equal(ours, cache.snapshot())
    written = sum(count for count, length in zip(new, lengths, strict=True) if length > 0)
    if written * num_kv_heads * head_dim > 8:  # random values: that many bytes cannot all stay the same
        assert not torch.equal(ours, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_init_kv(page_size, head_dim, dtype, device):
    # A whole prompt, a chunk, one token, nothing, no pages (its tokens go nowhere), exactly one page, a page crossed.
    lengths = [9, 17, 5, 6, 0, page_size, 2 * page_size + 1]
    new = [9, 5, 1, 0, 3, page_size, page_size + 1]
    check_init_kv(lengths, new, dtype, device, 3, page_size, head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 256])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append_kv(page_size, head_dim, dtype, device):
    lengths = [1, 0, page_size, page_size + 1, 33]
    cache = make_cache(lengths, 3, page_size, head_dim, dtype, device)
    k, v = (randn(len(lengths), 3, head_dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    expected = [cache.tokens(i) for i in range(len(lengths))]
    before = cache.snapshot()
    pk.append_kv(*cache.tables, k, v, *cache.scalars)
    for i, length in enumerate(lengths):
        if length:
            expected[i][:, :, -1] = torch.stack((k[i], v[i]))
            assert torch.equal(cache.tokens(i), expected[i])
    ours = cache.snapshot()
    cache.memory.view(torch.uint8).copy_(before)
    reference.append_kv(*cache.tables, k, v, *cache.scalars)
    assert torch.equal(ours, cache.snapshot())


def test_layouts(device):
    for dtype in DTYPES:
        check_init_kv([9, 4, 0, 7], [9, 1, 2, 3], dtype, device, layout=strided, head=2)
    cache = make_cache([5, 4], 2, 4, 8, torch.float16, device)
    qkv = randn(2, 3 * 16, dtype=torch.float16, device=device)  # k and v as slices of one projection
    k, v = qkv[:, 16:32].view(2, 2, 8), qkv[:, 32:].view(2, 2, 8)
    pk.append_kv(*cache.tables, k, v, *cache.scalars)
    for i in range(2):
        assert torch.equal(cache.tokens(i)[:, :, -1], torch.stack((k[i], v[i])))


def test_no_sequences(device):
    cache = make_cache([], 2, 4, 8, torch.float32, device)
    k = torch.empty(0, 2, 8, device=device)
    pk.init_kv(*cache.tables, k, k, int32([0], device), *cache.scalars)
    pk.append_kv(*cache.tables, k, k, *cache.scalars)


def test_unused_addresses_are_not_looked_at(device):
    cache = make_cache([12, 5], 2, 4, 8, torch.float32, device)
    cache.kv_ptrs[1] = cache.kv_ptrs[2] = 0  # the first two pages of sequence 0: full already
    k = randn(3, 2, 8, dtype=torch.float32, device=device)
    pk.init_kv(*cache.tables, k, k, int32([0, 2, 3], device), *cache.scalars)
    assert torch.equal(cache.tokens(0)[0][:, -2:], k[:2].transpose(0, 1))
    pk.append_kv(*cache.tables, k[:2], k[1:], *cache.scalars)
    assert torch.equal(cache.tokens(1)[1][:, -1], k[2])


def test_threads(threads):
    """Large enough that several threads take part."""
    for count in (1, 2, 5):
        threads(count)
        check_init_kv([2000, 700], [2000, 600], torch.bfloat16, num_kv_heads=3, page_size=16, head_dim=64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_init_kv(data):
    lengths = data.draw(st.lists(st.integers(0, 20), max_size=5))
    new = [data.draw(st.integers(0, length)) for length in lengths]
    check_init_kv(
        lengths, new, data.draw(st.sampled_from(DTYPES)), num_kv_heads=data.draw(st.integers(1, 3)),
        page_size=data.draw(st.integers(1, 7)), head_dim=2 * data.draw(st.integers(1, 20)),
        layout=data.draw(st.sampled_from([lambda t: t, strided])), head=data.draw(st.integers(0, 2)),
    )  # fmt: skip

"""The reference against formulas written another way (torch's own attention, norm, matmul)."""

import math

import pytest
import torch
import torch.nn.functional as F
from punica_kernels import reference

L, N, GROUP, P, D = 2, 2, 3, 4, 8


def paged(lengths, dtype=torch.float64, seed=0):
    """Pages in reversed order of a pool, so that nothing works by luck of neighbouring addresses."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // P) for length in lengths]
    pool = torch.randn(sum(pages), L, 2, N, P, D, generator=generator, dtype=torch.float64).to(dtype)
    kv_ptrs = torch.tensor([page.data_ptr() for page in pool][::-1])
    kv_indptr = torch.tensor([0, *torch.tensor(pages).cumsum(0).tolist()], dtype=torch.int32)
    last = torch.tensor([(length - 1) % P + 1 for length in lengths], dtype=torch.int32)
    return pool, kv_ptrs, kv_indptr, last


def dense(pool, kv_indptr, i, length, layer):
    order = list(range(len(pool)))[::-1][kv_indptr[i] : kv_indptr[i + 1]]
    kv = torch.cat([pool[j, layer] for j in order], dim=2)[:, :, :length]  # [2, N, len, D]
    return kv[0], kv[1]


def spin(x, turn):
    z = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat((z.real, z.imag), -1)


@pytest.mark.parametrize("window_left", [-1, 0, 3])
@pytest.mark.parametrize("rope_theta", [None, 1e4])
def test_attention(window_left, rope_theta):
    lengths, q_lens = [9, 4, 1], [5, 4, 1]
    pool, *table = paged(lengths)
    q = torch.randn(sum(q_lens), N * GROUP, D, dtype=torch.float64)
    o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32)
    qo_indptr = torch.tensor([0, 5, 9, 10], dtype=torch.int32)
    options = {"window_left": window_left, "rope_theta": rope_theta}
    reference.batch_prefill(o, q, qo_indptr, *table, None, L, 1, N, P, lse=lse, **options)
    for i, (length, q_len) in enumerate(zip(lengths, q_lens, strict=True)):
        k, v = dense(pool, table[1], i, length, 1)
        rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
        queries = q[rows].transpose(0, 1)
        if rope_theta is not None:  # as a complex product
            angle = torch.arange(length).double()[:, None] * rope_theta ** (-torch.arange(D // 2).double() * 2 / D)
            turn = torch.polar(torch.ones_like(angle), angle)
            k, queries = spin(k, turn), spin(queries, turn[-q_len:])
        position, key = torch.arange(length - q_len, length)[:, None], torch.arange(length)
        mask = (key <= position) & ((window_left < 0) | (key >= position - window_left))
        expected = F.scaled_dot_product_attention(
            queries, k.repeat_interleave(GROUP, 0), v.repeat_interleave(GROUP, 0), mask
        )
        torch.testing.assert_close(o[rows], expected.transpose(0, 1))
        score = queries @ k.repeat_interleave(GROUP, 0).mT / math.sqrt(D)
        expected = score.masked_fill(~mask, -math.inf).exp().sum(-1).log2().T
        torch.testing.assert_close(lse[rows], expected.float())
    newest = qo_indptr[1:].long() - 1
    decoded = torch.empty(3, N * GROUP, D, dtype=torch.float64)
    reference.batch_decode(decoded, q[newest], *table, None, L, 1, N, P, **options)
    assert torch.equal(decoded, o[newest])


def test_soft_cap_and_empty_sequences():
    pool, kv_ptrs, _, _ = paged([3])
    kv_indptr, last = torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([9, 3], dtype=torch.int32)
    q = torch.randn(2, N, D, dtype=torch.float64) * 9
    o, lse = torch.full_like(q, 7), torch.zeros(2, N)
    reference.batch_decode(o, q, kv_ptrs, kv_indptr, last, None, L, 0, N, P, lse=lse, logits_soft_cap=2.0)
    assert (o[0] == 0).all() and (lse[0] == -math.inf).all()
    k, v = pool[0, 0, :, :, :3]
    score = 2 * torch.tanh(torch.einsum("nd,nkd->nk", q[1], k) / math.sqrt(D) / 2)
    torch.testing.assert_close(o[1], torch.einsum("nk,nkd->nd", score.softmax(-1), v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kv_writes(dtype):
    lengths, new = [9, 4, 2], [9, 1, 2]
    pool, *table = paged(lengths, dtype)
    before = pool.clone()
    k, v = torch.randn(2, 12, N, D).to(dtype)
    reference.init_kv(*table, k, v, torch.tensor([0, 9, 10, 12], dtype=torch.int32), L, 1, N, P)
    for i, rows in enumerate([slice(0, 9), slice(9, 10), slice(10, 12)]):
        keys, values = dense(pool, table[1], i, lengths[i], 1)
        assert torch.equal(keys[:, -new[i] :].transpose(0, 1), k[rows])
        assert torch.equal(values[:, -new[i] :].transpose(0, 1), v[rows])
    changed = (pool != before).any(-1).sum()
    assert changed <= 2 * N * sum(new) and torch.equal(
        pool[:, 0], before[:, 0]
    )  # nothing beside those tokens, no other layer
    again = pool.clone()
    reference.append_kv(*table, k[[8, 9, 11]], v[[8, 9, 11]], L, 1, N, P)
    assert torch.equal(again, pool)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lora(dtype):
    adapters = [torch.randn(2, 5, 7).to(dtype) for _ in range(2)]  # [L, h_out, h_in]
    w_ptr = torch.tensor([w.data_ptr() for w in adapters])
    x, y = torch.randn(4, 7).to(dtype), torch.randn(4, 5).to(dtype)
    out = y.clone()
    reference.dispatch_bgmv(out, x, w_ptr, torch.tensor([1, -1, 0, 1]), 1, 0.5)
    for b, index in enumerate([1, None, 0, 1]):
        update = 0 if index is None else 0.5 * adapters[index][1].double() @ x[b].double()
        torch.testing.assert_close(out[b], (y[b].double() + update).to(dtype), rtol=0, atol=0)
    shrunk, expanded = y.clone(), y.clone()
    start, end = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
    reference.sgmv_shrink(shrunk, x, w_ptr, start, end, None, 1)
    transposed = [w.transpose(1, 2).contiguous() for w in adapters]
    reference.sgmv_cutlass(expanded, x, torch.tensor([w.data_ptr() for w in transposed]), start, end, None, 1)
    assert torch.equal(shrunk, expanded) and torch.equal(shrunk[0], y[0])
    expected = y[2:].double() + x[2:].double() @ adapters[1][1].double().T
    torch.testing.assert_close(shrunk[2:], expected.to(dtype))


def test_rms_norm():
    x, weight, residual = torch.randn(3, 10), torch.randn(10), torch.randn(3, 10)
    out, total = torch.empty_like(x), residual.clone()
    reference.rms_norm(out, x, weight, 1e-5, residual=total)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, F.rms_norm(total, (10,), weight, 1e-5))
    expected = F.rms_norm(x, (10,), weight, 1e-5)
    reference.rms_norm(x, x, weight, 1e-5)
    torch.testing.assert_close(x, expected)

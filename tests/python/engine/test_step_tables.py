"""The tables of a captured decode step, which one copy changes; on the CPU too, where nothing is captured."""

import pytest
import torch
from punica_kernels.engine.graph import StepTables
from punica_kernels.engine.kv_cache import PageTable
from punica_kernels.engine.model import Batch


def batch_of(pages_of_rows, start=100):
    count = sum(pages_of_rows)
    indptr = [sum(pages_of_rows[:i]) for i in range(len(pages_of_rows) + 1)]
    rows = range(len(pages_of_rows))
    table = PageTable(
        torch.arange(start, start + count),
        torch.tensor(indptr, dtype=torch.int32),
        torch.tensor([row + 1 for row in rows], dtype=torch.int32),
        16,
    )
    tokens, positions = (torch.tensor([base + row for row in rows]) for base in (7, 30))
    return Batch(tokens, positions, table, lora=None)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_set(size):
    tables = StepTables(size, num_pages=24, page_size=16, device=torch.device("cpu"))
    kept = tables.tokens, tables.positions, tables.pages.kv_ptrs, tables.pages.kv_indptr, tables.pages.last_page_offset
    assert [len(t) for t in kept] == [size, size, 24, size + 1, size]
    assert [t.dtype for t in kept] == [torch.int64] * 3 + [torch.int32] * 2
    for rows in (size, max(1, size // 2), size):  # what the larger batch left behind must be gone
        batch = batch_of([3 - row % 3 for row in range(rows)], start=100 * rows)
        tables.set(batch)
        pages, count = batch.pages, len(batch.pages.kv_ptrs)
        assert torch.equal(tables.tokens, torch.cat((batch.tokens, torch.zeros(size - rows, dtype=torch.int64))))
        assert torch.equal(tables.positions[:rows], batch.positions)
        assert torch.equal(tables.pages.kv_ptrs[:count], pages.kv_ptrs)
        assert torch.equal(tables.pages.kv_indptr[: rows + 1], pages.kv_indptr)
        assert (tables.pages.kv_indptr[rows:] == count).all()
        assert torch.equal(tables.pages.last_page_offset[:rows], pages.last_page_offset)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(kept[:2], (tables.tokens, tables.positions), strict=True))

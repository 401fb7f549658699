"""The tables of a captured decode step, which one copy changes; on the CPU too, where nothing is captured."""

import pytest
import torch
from punica_kernels.engine.adapters import NO_ADAPTER, DecodeLora
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


class Group:
    def __init__(self, *members):
        self.members = frozenset(members)


class Loaded:
    """As much of Adapters as DecodeLora asks for."""

    device = torch.device("cpu")

    def __init__(self, groups):
        self.groups = groups


def test_adapter_of_each_row():
    both, one = Group(0, 1), Group(1)
    lora = DecodeLora(Loaded({"q_proj": [both], "v_proj": [both, one]}), [], capacity=4)
    lora.set([1, 0, NO_ADAPTER])
    assert lora.indices[both.members].tolist() == [1, 0, NO_ADAPTER, NO_ADAPTER]
    assert lora.indices[one.members].tolist() == [1, NO_ADAPTER, NO_ADAPTER, NO_ADAPTER]
    lora.set([0])
    assert lora.indices[both.members].tolist() == [0] + [NO_ADAPTER] * 3
    assert [group for group, _ in lora.calls["v_proj"]] == [both, one]
    assert lora.calls["q_proj"][0][1].data_ptr() == lora.calls["v_proj"][0][1].data_ptr()
    # Without a capacity, only who is in the batch.
    assert list(DecodeLora(Loaded({"q_proj": [both], "v_proj": [one]}), [0, 0]).indices) == [both.members]
    assert DecodeLora(Loaded({}), [NO_ADAPTER]).indices == {}

"""init_kv and append_kv beside torch's indexed assignment."""

from collections.abc import Iterator

import punica_kernels as pk
import torch
from harness import Work

from works.attention import DTYPE, Cache


def writes(append: bool, batch: int, length: int, num_kv_heads: int, head_dim: int, rotation: int) -> Work:
    """The newest token of each sequence (append), or all tokens of each."""
    cache = Cache(batch, length, num_kv_heads, head_dim, 16, rotation)
    num_tokens = 1 if append else length
    k, v = (torch.randn(batch * num_tokens, num_kv_heads, head_dim).to(DTYPE) for _ in range(2))
    indptr = torch.arange(0, batch * num_tokens + 1, num_tokens, dtype=torch.int32)
    positions = torch.arange(length - num_tokens, length)
    pages = cache.order.view(batch, -1)[:, positions // cache.page_size].flatten()
    slots = (positions % cache.page_size).repeat(batch)

    def ours(i: int) -> None:
        table, sizes = cache.table(i)
        if append:
            pk.append_kv(*table, k, v, *sizes)
        else:
            pk.init_kv(*table, k, v, indptr, *sizes)

    def indexed(i: int) -> None:
        layer = cache.pool[:, i]
        layer[pages, 0, :, slots] = k
        layer[pages, 1, :, slots] = v

    def check() -> None:
        table, sizes = cache.table(0)
        for variant in (ours, indexed):
            cache.pool[:, 0].zero_()
            if append:
                pk.reference.append_kv(*table, k, v, *sizes)
            else:
                pk.reference.init_kv(*table, k, v, indptr, *sizes)
            expected = cache.pool[:, 0].clone()
            cache.pool[:, 0].zero_()
            variant(0)
            if not torch.equal(cache.pool[:, 0], expected):
                raise AssertionError(f"{variant.__name__}: the pages differ from the reference's")

    what = "append_kv" if append else "init_kv"
    return Work(
        name=f"{what}, {batch} x {num_tokens} tokens, {num_kv_heads} heads of {head_dim}",
        ours=ours,
        rivals={"torch: indexed assignment": indexed},
        num_sets=cache.num_layers,
        bytes=2 * (k.nbytes + v.nbytes),
        check=check,
    )


def works(rotation: int) -> Iterator[Work]:
    yield writes(False, 8, 512, 8, 128, rotation)
    yield writes(True, 64, 100, 8, 128, rotation)

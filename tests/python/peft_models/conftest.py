"""Fixtures of the tests of `punica_kernels.peft`."""

import copy

import pytest


@pytest.fixture
def pair(device):
    """(accelerated, PEFT's own), the same weights."""
    from peft_cases import tiny, with_adapters
    from punica_kernels import peft as accelerated

    theirs = with_adapters(tiny(device=device))
    return accelerated.accelerate(copy.deepcopy(theirs)), theirs


@pytest.fixture
def kernels(monkeypatch):
    """Counts what runs, calls of add_lora and batches made, so that no test passes by PEFT's own path unnoticed."""
    from punica_kernels import peft as accelerated

    counts = {"add_lora": 0, "batches": 0}
    add_lora, lora_batch = accelerated.add_lora, accelerated.LoraBatch

    def count_add(*args, **more):
        counts["add_lora"] += 1
        add_lora(*args, **more)

    def count_batch(*args):
        counts["batches"] += 1
        return lora_batch(*args)

    monkeypatch.setattr(accelerated, "add_lora", count_add)
    monkeypatch.setattr(accelerated, "LoraBatch", count_batch)
    return counts

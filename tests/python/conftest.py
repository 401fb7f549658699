"""Every test that takes `device` runs on the CPU, and on CUDA where torch and the library both have it."""

import punica_kernels
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and punica_kernels.has_cuda() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads; the number before is set again after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

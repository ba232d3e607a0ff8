"""Shared fixtures: every kernel test runs on each device of the machine."""

import os

import pytest
import torch

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


def pytest_configure() -> None:
    """Processes that share the machine share its cores."""
    if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Each device this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

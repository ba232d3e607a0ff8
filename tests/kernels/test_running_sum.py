"""Running sums by doubling, which is what a GPU computes in torch's deterministic mode."""

import pytest
import torch

from mamba_zoo.kernels._running_sum import by_doubling, running_sum


@pytest.mark.parametrize("length", [0, 1, 2, 3, 32, 65])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_cumsum(length, dim):
    shape = [2, 3, 2]
    shape[dim] = length
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = by_doubling(x, dim), x.cumsum(dim)
    torch.testing.assert_close(ours, theirs)
    seed = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, seed)[0], torch.autograd.grad(theirs, x, seed)[0])


def test_in_deterministic_mode(device):
    x = torch.randn(3, 100, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        found = running_sum(x, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found.cpu(), x.cpu().cumsum(1), rtol=1e-5, atol=1e-5)

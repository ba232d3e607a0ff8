"""The per-direction projections, which take another route on each device and for each form of input."""

import pytest
import torch

from mamba_zoo.backbones._ssm import DirectionLinear


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_direction_linear_is_one_map_per_direction(device, shared, k):
    layer = DirectionLinear(k, 5, 7, device=device, dtype=torch.float64)
    x = torch.randn(2, 4, 5) if shared else torch.randn(2, 4, k, 9)[..., 2:7]  # a slice, as dt is of x_proj's rows
    x = x.to(device, torch.float64).requires_grad_()
    wanted = torch.einsum("bli,koi->blko" if shared else "blki,koi->blko", x, layer.weight)
    seed = torch.randn_like(wanted)
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    ours, theirs = (torch.autograd.grad(out, [x, layer.weight], seed) for out in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)

"""Running sums that torch's deterministic mode allows on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def running_sum(x: Tensor, dim: int) -> Tensor:
    """`x.cumsum(dim)`, which torch refuses for floats on CUDA devices under `torch.use_deterministic_algorithms(True)`.

    There it is computed by doubling, `log2` of the length times an addition of everything.
    """
    return by_doubling(x, dim) if x.is_cuda and torch.are_deterministic_algorithms_enabled() else x.cumsum(dim)


def by_doubling(x: Tensor, dim: int) -> Tensor:
    """Running sums along `dim`, by additions in an order that depends on the length alone; differentiable."""
    x = x.movedim(dim, -1)
    step = 1
    while step < x.shape[-1]:
        x = x + F.pad(x[..., :-step], (step, 0))
        step *= 2
    return x.movedim(-1, dim)

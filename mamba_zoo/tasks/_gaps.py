"""Gaps in windows of series: made at random, in turn, and closed by straight lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_gaps(
    x: Tensor, rate: float, length: int, together: bool, generator: torch.Generator | None = None
) -> Tensor:
    """Where to hide values of windows `(b, l, v)`: True in runs of `length` steps, on `rate` of all values on average.

    Args:
        x: Windows.
        rate: From 0 to 1.
        length: Steps of a run; runs may touch and overlap.
        together: Hide all series of a step at once.
        generator: Of the CPU, for the same gaps again; None draws on the device of `x`.
    """
    b, l, v = x.shape
    series = 1 if together else v
    # A value is hidden if one of the `length` runs that could cover it starts.
    start = 1 - (1 - rate) ** (1 / length)
    if generator is None:
        drawn = torch.rand(b, series, l + length - 1, device=x.device)
    else:
        drawn = torch.rand(b, series, l + length - 1, generator=generator).to(x.device)
    runs = F.max_pool1d((drawn < start).float(), length, stride=1)
    return runs.transpose(1, 2).bool().expand(b, l, v)


def turn_gaps(x: Tensor, turns: int, length: int) -> list[Tensor]:
    """`turns` patterns of gaps `(b, l, v)`, runs of `length` steps, which together hide every step once."""
    block = torch.arange(x.shape[1], device=x.device) // length % turns
    return [(block == turn)[None, :, None].expand_as(x) for turn in range(turns)]


def interpolate(x: Tensor, hidden: Tensor) -> Tensor:
    """Windows `(b, l, v)` with straight lines where values are hidden, and the nearest value beyond the known ones.

    A series of which nothing is known is 0.
    """
    l = x.shape[1]
    step = torch.arange(l, device=x.device)[None, :, None].expand_as(x)
    before = step.masked_fill(hidden, -1).cummax(1).values
    after = step.masked_fill(hidden, l).flip(1).cummin(1).values.flip(1)
    none = (before < 0) & (after >= l)
    first, second = torch.where(before < 0, after, before), torch.where(after >= l, before, after)
    low = x.gather(1, first.clamp(0, l - 1))
    high = x.gather(1, second.clamp(0, l - 1))
    part = (step - first) / (second - first).clamp(min=1)
    return torch.where(hidden, (low + part * (high - low)).masked_fill(none, 0.0), x)

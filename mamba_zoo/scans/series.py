"""Scans of time series: along the steps of one series, and over the variates of several.

A scan over one axis has the grid `(length,)`: steps, or variates. Models whose tokens are patches of every variate have
the grid `(variates, steps)`; token `(v, t)` is `v * steps + t`. Orders that follow from data (`correlation_scan`, and
what MambaTS learns) become a spec of `permuted`, so that a configuration still says all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._registry import register_sample_order, register_scan
from ._sample import GRID_SAMPLES


@register_scan("forward", modality="series")
def forward(*size: int) -> np.ndarray:
    """Tokens as they are stored, from the first step to the last, one variate after another. One direction.

    TimeMachine (arXiv:2403.09898).
    """
    return np.arange(math.prod(size))


@register_scan("reversed", modality="series")
def backward(*size: int) -> np.ndarray:
    """From the last token to the first. One direction."""
    return np.arange(math.prod(size))[::-1]


@register_scan("permuted", modality="series")
def permuted(*size: int, order: Sequence[int] = ()) -> np.ndarray:
    """The first axis in the given order, everything of each of its entries in steps. One direction.

    Entries that `order` does not reach come after it as they are stored, such as the time marks that S-Mamba appends.
    `permuted((2, 0, 1))` is the order of variables that MambaTS (arXiv:2405.16440) scans at test time.

    Args:
        size: Of the grid.
        order: A permutation of 0 to `len(order) - 1`.

    Raises:
        ValueError: `order` is none, or longer than the axis.
    """
    if sorted(order) != list(range(len(order))) or len(order) > size[0]:
        raise ValueError(
            f"permuted: order={tuple(order)!r} must be a permutation of 0 to {len(order) - 1}, and no longer than the "
            f"{size[0]} entries that it is to order"
        )
    rows = np.arange(math.prod(size)).reshape(size[0], -1)
    return rows[[*order, *range(len(order), size[0])]].reshape(-1)


@register_scan("shuffled", modality="series")
def shuffled(*size: int, seed: int = 0) -> np.ndarray:
    """The first axis in a random order, everything of each of its entries in steps. One direction.

    The same for the same seed on every machine.
    """
    bits = np.asarray(np.random.PCG64(seed).random_raw(size[0]))
    return permuted(*size, order=np.argsort(bits, kind="stable").tolist())


@register_scan("step_first", modality="series")
def step_first(*size: int) -> np.ndarray:
    """All variates at the first step, then all at the second: the last axis runs slowest. One direction."""
    return np.arange(math.prod(size)).reshape(-1, size[-1]).T.reshape(-1)


def correlation_scan(x: Tensor) -> str:
    """A spec that visits alike variates one after another: a greedy walk along the largest absolute correlations.

    It starts at the variate that correlates most with all others, and goes on to the nearest that is left; of equals,
    to the first. Constant variates correlate with none.

    Args:
        x: Training data `(steps, variates)`; NaN is missing.

    Returns:
        `"permuted((...))"`.

    Raises:
        ValueError: `x` is not `(steps, variates)`.

    Example:
        >>> t = torch.arange(50.0)
        >>> correlation_scan(torch.stack([t.sin(), t.cos(), t.sin() + 0.1 * t.cos()], dim=1))
        'permuted((2, 0, 1))'
    """
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x must be (steps, variates), not {tuple(x.shape)}")
    values = x.detach().to("cpu", torch.float64)
    centred = torch.nan_to_num(values - values.nanmean(0))
    norm = centred.norm(dim=0)
    unit = centred / torch.where(norm > 0, norm, 1.0)
    near = (unit.T @ unit).abs().numpy()
    np.fill_diagonal(near, 0.0)
    order = [int(near.sum(0).argmax())]
    left = np.ones(len(near), dtype=bool)
    left[order[0]] = False
    while left.any():
        order.append(int(np.where(left, near[order[-1]], -1.0).argmax()))
        left[order[-1]] = False
    return permuted_spec(order)


def permuted_spec(order: Sequence[int]) -> str:
    """The spec of `permuted` for an order, such as "permuted((2, 0, 1))"."""
    inside = ", ".join(str(int(i)) for i in order)
    return f"permuted(({inside}{',' if len(order) == 1 else ''}))"


def with_correlation(scan: str, order: str) -> str:
    """`scan` with the word "correlation", alone or within a composition, replaced by what it stands for.

    Args:
        scan: A spec, such as "both_ways(correlation)".
        order: From `correlation_scan`.
    """
    return re.sub(r"\bcorrelation\b", order, scan)


GRID_SAMPLES["series"] = lambda size: size


@register_sample_order("correlation", modality="series")
def correlation(size: tuple[int, ...]) -> np.ndarray:
    """Variates that are alike one after another, by their correlation in the training data. One direction.

    A name for `mamba-zoo fit` and `mamba-zoo compare`, which know the data; see `correlation_scan`.
    """
    raise ValueError(
        "scan='correlation' follows from training data, which only mamba-zoo fit and compare know; elsewhere give "
        "scans.correlation_scan(x) of your data (steps, variates)"
    )


@register_sample_order("learned", modality="series")
def learned(size: tuple[int, ...]) -> np.ndarray:
    """The order of variates that costs least, learned from random orders in training. One direction.

    MambaTS (arXiv:2405.16440), the only model that learns one.
    """
    raise ValueError("scan='learned' is of mambats only, which learns its order; choose another order for this model")

"""Losses of forecasts and of filled gaps: unknown values, weights of the steps, and frequencies."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Weighting = Literal["even", "root", "arctan"]


def known_error(found: Tensor, wanted: Tensor, kind: str, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean error over all known values, and of each window `(b,)`.

    Args:
        found: `(b, steps, v)`.
        wanted: The same shape, NaN where nothing is known.
        kind: "mse", "mae" or "huber".
        weights: `(steps,)` how much each step counts in the means.
    """
    known = ~wanted.isnan()
    error = torch.where(known, found.float() - wanted, 0.0)
    if kind == "mse":
        error = error.square()
    elif kind == "mae":
        error = error.abs()
    else:
        error = nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none")
    if weights is None:
        total, count, least = error.sum((1, 2)), known.sum((1, 2)), 1.0
    else:
        total, count = (error.sum(2) * weights).sum(1), (known.sum(2) * weights).sum(1)
        least = float(torch.finfo(count.dtype).tiny)
    return total.sum() / count.sum().clamp(min=least), total.detach() / count.clamp(min=least)


def spectral_error(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean absolute error between two spectra, over all frequencies, and of each window `(b,)`.

    Both are orthonormal discrete Fourier transforms over the steps, of which the frequencies from 0 to half a cycle a
    step are compared (arXiv:2402.02399). The error of a value that is not known counts as zero.

    Args:
        found: `(b, steps, v)`.
        wanted: The same shape, NaN where nothing is known.
    """
    error = torch.where(wanted.isnan(), 0.0, found.float() - wanted)
    of_windows = torch.fft.rfft(error, dim=1, norm="ortho").abs().mean((1, 2))
    return of_windows.mean(), of_windows.detach()


def step_weights(weighting: Weighting, steps: int) -> Tensor | None:
    """How much each of `steps` steps ahead counts, `(steps,)`; None is evenly. See `Forecaster`.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting={weighting!r} is unknown; choose {', '.join(get_args(Weighting))}")
    step = torch.arange(1, steps + 1, dtype=torch.float32)
    if weighting == "even":
        return None
    return step.rsqrt() if weighting == "root" else 1 + math.pi / 4 - step.arctan()


def without_frequencies(x: Tensor, y: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Windows and what follows them without some of their frequencies, drawn for each series of each window.

    Args:
        x: `(b, l, v)`.
        y: `(b, steps, v)`; a series with unknown values stays as it is.
        part: Of the frequencies, on average; that of the mean is one of them.

    Returns:
        Tensors of the same shapes.
    """
    whole = torch.cat([x, y], dim=1).float()
    spectrum = torch.fft.rfft(whole, dim=1)
    kept = torch.rand(spectrum.shape, device=x.device) >= part
    changed = torch.fft.irfft(spectrum * kept, n=whole.shape[1], dim=1)
    changed = torch.where(whole.isnan().any(1, keepdim=True), whole, changed).to(x.dtype)
    return changed[:, : x.shape[1]], changed[:, x.shape[1] :]

"""Random changes of whole batches of recordings and spectrograms, on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def change_speed(waves: Tensor, lengths: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Play each recording faster or slower, pitch and formants with it, by linear interpolation.

    Args:
        waves: `(b, n)`.
        lengths: `(b,)` samples of each.
        factors: `(b,)`; 1.1 is a tenth faster.

    Returns:
        `(b, n')` and the new lengths, n' being the longest; zeros after each.
    """
    lengths = (lengths / factors).long().clamp(min=1)
    places = torch.arange(int(lengths.max()), device=waves.device) * factors[:, None]
    inside = torch.arange(places.shape[1], device=waves.device) < lengths[:, None]
    low = places.long().clamp(max=waves.shape[1] - 1)
    high = (low + 1).clamp(max=waves.shape[1] - 1)
    part = (places - low).clamp(0, 1)
    return (waves.gather(1, low) * (1 - part) + waves.gather(1, high) * part) * inside, lengths


def add_noise(waves: Tensor, lengths: Tensor, snr: Tensor, slope: Tensor) -> Tensor:
    """Add coloured noise over the whole row, with the power that leaves each recording `snr` decibels above it.

    Args:
        waves: `(b, n)`.
        lengths: `(b,)` samples of each, over which its power is measured.
        snr: `(b,)` in decibels.
        slope: `(b,)`: amplitude falls as frequency to this power; 0 is white, 0.5 pink, 1 brown.
    """
    spectrum = torch.fft.rfft(torch.randn_like(waves))
    bins = torch.arange(1, spectrum.shape[1] + 1, device=waves.device, dtype=waves.dtype)
    noise = torch.fft.irfft(spectrum * bins ** -slope[:, None], n=waves.shape[1])
    noise = noise / noise.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    power = waves.pow(2).sum(1) / lengths
    return waves + noise * (power * 10 ** (-snr / 10)).sqrt()[:, None]


def change_tempo(spectrograms: Tensor, frames: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Speak faster or slower at the same pitch, by linear interpolation along time.

    Args:
        spectrograms: `(b, t, mel_bins)`; what is behind a recording, its padding, is the same in every frame.
        frames: `(b,)` frames of each recording.
        factors: `(b,)`; 1.1 is a tenth faster. What no longer fits into t frames is cut off.

    Returns:
        `(b, t, mel_bins)` and the new numbers of frames.
    """
    t = spectrograms.shape[1]
    shorter = (frames / factors).round().long().clamp(min=1, max=t)
    places = torch.arange(t, device=spectrograms.device)
    inside = places < shorter[:, None]
    last = (frames - 1).clamp(min=0)[:, None]
    places = torch.minimum(places * factors[:, None], last.float())
    x = _interpolate(spectrograms.transpose(1, 2), places).transpose(1, 2)
    return torch.where(inside[..., None], x, spectrograms[:, -1:]), shorter


def warp_bands(spectrograms: Tensor, factors: Tensor, low: float, high: float) -> Tensor:
    """Multiply all frequencies by a factor, as a longer or shorter vocal tract does.

    Args:
        spectrograms: `(b, t, mel_bins)`, bands equally spaced on the mel scale.
        factors: `(b,)`; above 1 raises the formants.
        low: Lower edge of the first band, in Hz.
        high: Upper edge of the last band, in Hz.
    """
    bins = spectrograms.shape[2]
    bottom, top = (1127 * math.log1p(edge / 700) for edge in (low, high))
    mel = torch.linspace(bottom, top, bins + 2, device=spectrograms.device)[1:-1]
    hertz = 700 * torch.expm1(mel / 1127) / factors[:, None]
    places = (1127 * torch.log1p(hertz / 700) - mel[0]) / (top - bottom) * (bins + 1)
    return _interpolate(spectrograms, places.clamp(0, bins - 1))


def change_channel(spectrograms: Tensor, decibels: Tensor) -> Tensor:
    """Add a random smooth gain along the bands, as another microphone or room does.

    Args:
        spectrograms: `(b, t, mel_bins)` of natural logarithms.
        decibels: `(b, points)` gains at equally spaced bands, between which it is linear.
    """
    gain = F.interpolate(decibels[:, None], spectrograms.shape[2], mode="linear", align_corners=True)
    return spectrograms + gain * (math.log(10) / 10)


def mask(spectrograms: Tensor, bands: int, frames: int, count: Sequence[int] = (2, 2)) -> Tensor:
    """Hide runs of bands and of frames (SpecAugment, arXiv:1904.08779), under zeros.

    Args:
        spectrograms: `(b, t, mel_bins)`, normalised.
        bands: Most bands in a run; 0 hides none.
        frames: Most frames in a run; 0 hides none.
        count: Runs of bands, and of frames.
    """
    b, t, f = spectrograms.shape
    hidden = torch.zeros(b, t, f, dtype=torch.bool, device=spectrograms.device)
    for most, size, number, axis in ((bands, f, count[0], 2), (frames, t, count[1], 1)):
        for _ in range(number if most else 0):
            width = torch.rand(b, 1, device=spectrograms.device) * min(most, size)
            start = torch.rand(b, 1, device=spectrograms.device) * (size - width)
            places = torch.arange(size, device=spectrograms.device)
            run = (places >= start) & (places < start + width)
            hidden |= run[:, None] if axis == 2 else run[..., None]
    return spectrograms.masked_fill(hidden, 0)


def uniform(batch: int, low: float, high: float, like: Tensor) -> Tensor:
    """`(batch,)` random numbers between `low` and `high` on the device of `like`, float32."""
    return torch.rand(batch, device=like.device) * (high - low) + low


def _interpolate(x: Tensor, places: Tensor) -> Tensor:
    """`x (b, t, f)` read at fractional `places (b, f)` of its last axis."""
    low = places.long()
    high = (low + 1).clamp(max=x.shape[2] - 1)
    part = (places - low)[:, None].to(x.dtype)
    below, above = (x.gather(2, index[:, None].expand_as(x)) for index in (low, high))
    return below * (1 - part) + above * part

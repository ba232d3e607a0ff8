"""Small networks without state spaces, to compare speech models with: convolutions, and attention between frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_zoo.backbones._stft import Spectrum
from mamba_zoo.backbones._streaming import Waveforms


class _Masks(Waveforms):
    """Complex masks for a spectrogram, from its real and imaginary parts, compressed; one for each source."""

    def __init__(self, sources: int, sample_rate: int, n_fft: int, hop: int, squeeze: bool):
        super().__init__(sample_rate)
        self.spectrum = Spectrum(n_fft, hop)
        self.sources, self.squeeze = sources, squeeze

    def forward(self, wave: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Waveforms `(b, n)` to `(b, sources, n)`, or `(b, n)` for a single source."""
        if lengths is not None and len({int(n) for n in lengths}) > 1:  # no masks here: one after another
            rows = [self(row[None, : int(n)]) for row, n in zip(wave, lengths, strict=True)]
            return torch.cat([F.pad(row, (0, wave.shape[1] - row.shape[-1])) for row in rows])
        signal, _ = self.prepare(wave, None, self.spectrum.shortest)
        scale = signal.std(1, keepdim=True).clamp_min(1e-8)
        spectrum = self.spectrum.analyse(signal / scale)
        magnitude = spectrum.abs().clamp_min(1e-8)
        x = torch.view_as_real(spectrum * magnitude.pow(-0.7))
        masks = torch.tanh(self.masks(x).float()) * 2
        parts = torch.view_as_complex(masks.unflatten(-1, (self.sources, 2)).contiguous()) * spectrum[..., None]
        out = self.spectrum.synthesise(parts.permute(0, 3, 1, 2).flatten(0, 1), signal.shape[1])
        out = self.restore(out.unflatten(0, (len(wave), -1)) * scale[..., None], wave, None)
        return out[:, 0] if self.squeeze else out

    def masks(self, x: Tensor) -> Tensor:
        """`(b, t, f, 2)` to `(b, t, f, 2 * sources)`."""
        raise NotImplementedError


class ConvMask(_Masks):
    """Residual 3x3 convolutions with growing gaps between their taps in time and in frequency."""

    def __init__(
        self, sources: int, sample_rate: int, n_fft: int, hop: int, squeeze: bool, dim: int = 52, depth: int = 8
    ):
        super().__init__(sources, sample_rate, n_fft, hop, squeeze)
        self.embed = nn.Conv2d(2, dim, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=gap, dilation=gap))
            for gap in (2 ** (i % 5) for i in range(depth))
        )
        self.head = nn.Conv2d(dim, 2 * sources, 1)
        _begin_even(self.head, sources)

    def masks(self, x: Tensor) -> Tensor:
        """`(b, t, f, 2)` to `(b, t, f, 2 * sources)`."""
        y = self.embed(x.permute(0, 3, 1, 2))
        for block in self.blocks:
            y = y + block(y)
        return self.head(y).permute(0, 2, 3, 1)


class TransformerMask(_Masks):
    """Attention between frames, each a token of all its frequencies, with sines for positions."""

    def __init__(
        self, sources: int, sample_rate: int, n_fft: int, hop: int, squeeze: bool, dim: int = 64, depth: int = 3
    ):
        super().__init__(sources, sample_rate, n_fft, hop, squeeze)
        freqs = n_fft // 2 + 1
        self.embed = nn.Linear(2 * freqs, dim)
        layer: Any = nn.TransformerEncoderLayer(
            dim, 4, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False) for _ in range(depth))
        self.head = nn.Linear(dim, 2 * sources * freqs)
        _begin_even(self.head, sources)

    def masks(self, x: Tensor) -> Tensor:
        """`(b, t, f, 2)` to `(b, t, f, 2 * sources)`."""
        f = x.shape[2]
        y = self.embed(x.flatten(2))
        y = y + _sines(y.shape[1], y.shape[2], y.device)
        for block in self.blocks:
            y = block(y)
        return self.head(y).unflatten(-1, (f, -1))


@torch.no_grad()
def _begin_even(head: nn.Conv2d | nn.Linear, sources: int) -> None:
    """Let the masks begin close to an equal share of the mixture for every source."""
    head.weight *= 0.1
    if head.bias is not None:
        head.bias.zero_()[::2] = math.atanh(0.5 / sources)


def _sines(steps: int, dim: int, device: torch.device) -> Tensor:
    angles = torch.arange(steps, device=device)[:, None] * 1e4 ** (-torch.arange(0, dim, 2, device=device) / dim)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :dim]


BASELINES = {"conv_mask": ConvMask, "transformer_mask": TransformerMask}


def build_baseline(name: str, sources: int, sample_rate: int, squeeze: bool, options: dict[str, Any]) -> nn.Module:
    """A baseline with frames of 32 ms every 8 ms.

    Args:
        name: One of `BASELINES`.
        sources: Signals put out.
        sample_rate: Samples per second.
        squeeze: A single signal comes out as `(b, n)`.
        options: Further arguments, such as `dim` and `depth`.
    """
    n_fft = 4 * max(1, round(sample_rate * 0.032 / 4))
    return BASELINES[name](sources, sample_rate, n_fft, n_fft // 4, squeeze, **options)

"""Waveforms to spectra and back, for batches of different lengths and for streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Spectrum(nn.Module):
    """The short-time Fourier transform with a periodic Hann window, frames centred on every `hop`-th sample.

    Signals are mirrored at both ends, or continued by zeros, as a stream has to be. The first frame of a mirrored
    signal is symmetric: its phases are 0 or pi, and rounding alone decides between pi and -pi. Everything is computed
    in float32 at least.

    Args:
        n_fft: Samples of a frame.
        hop: Samples between frames.
        mirror: Whether signals are mirrored at their ends.

    Raises:
        ValueError: `hop` is larger than half a frame, or `n_fft` is odd.
    """

    def __init__(self, n_fft: int, hop: int, mirror: bool = True):
        super().__init__()
        if n_fft % 2 or not 1 <= hop <= n_fft // 2:
            raise ValueError(f"n_fft={n_fft} must be even, and hop={hop} between 1 and half of it")
        self.n_fft, self.hop, self.mirror = n_fft, hop, mirror

    @property
    def shortest(self) -> int:
        """Samples that a signal needs to be mirrored; shorter ones must be filled up with zeros."""
        return self.n_fft // 2 + 1 if self.mirror else 1

    def frames(self, samples: int) -> int:
        """Frames of a signal."""
        return samples // self.hop + 1

    def analyse(self, wave: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Waveforms `(b, n)` to spectra `(b, t, n_fft // 2 + 1)`, complex.

        Args:
            wave: Samples; anything after the length of a signal.
            lengths: Samples of each signal; None if all have `n`. Frames past the end of a signal are zero.
        """
        pad = self.n_fft // 2
        wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
        n = wave.shape[1]
        if lengths is None or min(lengths) == n:
            padded = F.pad(wave, (pad, pad), mode="reflect" if self.mirror else "constant")
            return self.transform(padded)
        ends = torch.tensor(lengths, device=wave.device)[:, None]
        place = torch.arange(-pad, n + pad, device=wave.device).expand(len(wave), -1)
        if self.mirror:
            place = place.abs()
            place = torch.where(place < ends, place, 2 * ends - 2 - place)
        inside = (place >= 0) & (place < ends)
        padded = torch.where(inside, wave.gather(1, place.clamp(0, n - 1)), 0)
        spectrum = self.transform(padded)
        real = torch.arange(spectrum.shape[1], device=wave.device) * self.hop <= ends
        return torch.where(real[..., None], spectrum, 0)

    def transform(self, padded: Tensor) -> Tensor:
        """Every frame that fits into `padded (b, n)`: `(b, (n - n_fft) // hop + 1, n_fft // 2 + 1)`, complex."""
        window = torch.hann_window(self.n_fft, dtype=padded.dtype, device=padded.device)
        return torch.stft(padded, self.n_fft, self.hop, window=window, center=False, return_complex=True).transpose(
            1, 2
        )

    def synthesise(self, spectrum: Tensor, samples: int, lengths: Sequence[int] | None = None) -> Tensor:
        """Spectra `(b, t, n_fft // 2 + 1)` to waveforms `(b, samples)`, zero after the length of each signal.

        The last samples, up to `hop - 1` behind the last frame's centre, are kept; several published programs lose
        them.
        """
        steps = spectrum.shape[1]
        total, weight = self.overlap(spectrum, None if lengths is None else [self.frames(n) for n in lengths])
        pad = self.n_fft // 2
        wave = total[:, pad : pad + samples] / weight[:, pad : pad + samples].clamp_min(1e-11)
        wave = F.pad(wave, (0, samples - wave.shape[1])) if wave.shape[1] < samples else wave
        if lengths is None or (steps == min(self.frames(n) for n in lengths) and min(lengths) == samples):
            return wave
        ends = torch.tensor(lengths, device=wave.device)[:, None]
        return torch.where(torch.arange(samples, device=wave.device) < ends, wave, 0)

    def overlap(self, spectrum: Tensor, frames: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Windowed frames added up, and the sum of the squared windows: `(b, n)` and `(b or 1, n)`.

        Args:
            spectrum: `(b, t, n_fft // 2 + 1)`.
            frames: How many of each signal are real; the others count for nothing.
        """
        steps = spectrum.shape[1]
        window = torch.hann_window(self.n_fft, dtype=spectrum.real.dtype, device=spectrum.device)
        pieces = torch.fft.irfft(spectrum, self.n_fft) * window
        squares = window.square().expand(1, steps, -1)
        if frames is not None:
            ends = torch.tensor(frames, device=spectrum.device)[:, None]
            real = (torch.arange(steps, device=spectrum.device) < ends)[..., None]
            pieces, squares = torch.where(real, pieces, 0), torch.where(real, squares, 0)
        return self._add(pieces), self._add(squares)

    def _add(self, pieces: Tensor) -> Tensor:
        steps = pieces.shape[1]
        n = self.n_fft + self.hop * (steps - 1)
        return F.fold(pieces.transpose(1, 2), (1, n), (1, self.n_fft), stride=(1, self.hop))[:, 0, 0]

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"n_fft={self.n_fft}, hop={self.hop}, mirror={self.mirror}"


class SpectrumStream:
    """Both ends of a stream through a `Spectrum` that does not mirror, whose memory is in a dictionary of tensors.

    Attributes:
        spectrum: Without `mirror`.
    """

    def __init__(self, spectrum: Spectrum):
        self.spectrum = spectrum

    def start(self, batch: int, like: Tensor) -> dict[str, Tensor]:
        """The memory before the first sample."""
        exact = torch.promote_types(like.dtype, torch.float32)
        pad = self.spectrum.n_fft // 2
        empty = torch.zeros(batch, 0, dtype=exact, device=like.device)
        # `done` counts final samples of the padded signal; the first `pad` of them are not part of the output.
        return {
            "input": torch.zeros(batch, pad, dtype=exact, device=like.device),
            "total": empty,
            "weight": empty[:1],
            "skip": torch.tensor(pad),
        }

    def take(self, state: dict[str, Tensor], chunk: Tensor) -> Tensor | None:
        """The frames that are complete with `chunk (b, n)`, `(b, t, f)` complex; None if there are none yet."""
        s = self.spectrum
        signal = torch.cat([state["input"], chunk.to(state["input"].dtype)], dim=1)
        steps = (signal.shape[1] - s.n_fft) // s.hop + 1
        if steps < 1:
            state["input"] = signal
            return None
        state["input"] = signal[:, steps * s.hop :].clone()  # a view would keep all of the signal
        return s.transform(signal[:, : s.n_fft + (steps - 1) * s.hop])

    def give(self, state: dict[str, Tensor], frames: Tensor) -> Tensor:
        """Add processed frames `(b, t, f)`, and return the samples that no later frame will change."""
        s = self.spectrum
        total, weight = s.overlap(frames)
        total[:, : state["total"].shape[1]] += state["total"]
        weight[:, : state["weight"].shape[1]] += state["weight"]
        final = frames.shape[1] * s.hop
        state["total"], state["weight"] = total[:, final:].clone(), weight[:, final:].clone()
        return self._emit(state, total[:, :final], weight[:, :final])

    def rest(self, state: dict[str, Tensor]) -> Tensor:
        """What is left when no frame follows."""
        return self._emit(state, state["total"], state["weight"])

    def _emit(self, state: dict[str, Tensor], total: Tensor, weight: Tensor) -> Tensor:
        skip = min(int(state["skip"]), total.shape[1])
        state["skip"] = state["skip"] - skip
        return total[:, skip:] / weight[:, skip:].clamp_min(1e-11)

"""From waveforms to normalised log-mel spectrograms, as the published audio models take them."""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What the recordings of each data set were brought to, by the name of its published weights.
FRONT_ENDS: dict[str, dict[str, Any]] = {
    "audioset": {"mean": -4.2677393, "std": 4.5689974, "frames": 1024},
    "vggsound": {"mean": -5.0767093, "std": 4.4533687, "frames": 1024},
    "voxceleb": {"mean": -3.7614744, "std": 4.2011642, "frames": 1024},
    "speechcommands": {"mean": -6.845978, "std": 5.5654526, "frames": 128},
    "esc50": {"mean": -6.6268077, "std": 5.358466, "frames": 512},
    "epic_sounds": {"kind": "mel", "sample_rate": 24000, "frames": 1024},
}


class FrontEnd(nn.Module):
    """What all front ends share: sample rates, lengths, a fixed number of frames, normalisation.

    There are no parameters and no buffers, so that checkpoints of a model do not change with its front end. Computed
    in float32, through autocast as well.

    Args:
        sample_rate: In Hz; waveforms of other rates are resampled. None takes each at its own rate.
        mel_bins: Bands.
        frames: Pad with zeros at the end, or cut, to so many frames; None keeps all.
        mean: Of the spectrogram before normalisation.
        std: Likewise; the result is `(x - mean) / (2 * std)`, so padding becomes `-mean / (2 * std)`.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, sample_rate: int | None = 16000, mel_bins: int = 128, frames: int | None = None,
        mean: float = 0.0, std: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("sample_rate", sample_rate), ("mel_bins", mel_bins), ("frames", frames)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if std <= 0:
            raise ValueError(f"std={std} must be above 0")
        self.sample_rate, self.mel_bins, self.frames = sample_rate, mel_bins, frames
        self.mean, self.std = mean, std

    def spectrogram(self, waveforms: Tensor, rate: int) -> Tensor:
        """Waveforms `(b, n)` at `rate` Hz to log-mel spectrograms `(b, t, mel_bins)`, not normalised."""
        raise NotImplementedError

    def count(self, samples: Tensor, rate: int) -> Tensor:
        """Frames of recordings of so many samples at `rate` Hz."""
        raise NotImplementedError

    def forward(
        self, waveforms: Tensor, sample_rate: int | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Waveforms to spectrograms.

        Args:
            waveforms: `(b, n)` or `(n,)`, floating point within -1 to 1.
            sample_rate: Of the waveforms, in Hz; None is that of the front end.
            lengths: `(b,)` samples of each; what comes after is not read. None is n for each.

        Returns:
            Normalised spectrograms `(b, t, mel_bins)` in the dtype of the waveforms, float32 at least, and the frames
            of each, `(b,)`.

        Raises:
            TypeError: integer samples.
            ValueError: another shape, lengths outside 1 to n, or an unknown rate.
            ImportError: torchaudio is missing.
        """
        waveforms, lengths, rate = self._checked(waveforms, sample_rate, lengths)
        with torch.autocast(waveforms.device.type, enabled=False):
            inside = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
            waveforms = waveforms.masked_fill(~inside, 0)
            x = self.spectrogram(waveforms.sub(waveforms.sum(1, keepdim=True) / lengths[:, None]) * inside, rate)
            frames = self.count(lengths, rate).clamp(min=0)
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= frames[:, None])[..., None], 0)
            if self.frames is not None:
                x = F.pad(x, (0, 0, 0, self.frames - x.shape[1]))
                frames = frames.clamp(max=self.frames)
            return (x - self.mean) / (2 * self.std), frames

    def _checked(
        self, waveforms: Tensor, sample_rate: int | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        if not waveforms.is_floating_point():
            raise TypeError(f"waveforms are {waveforms.dtype}; scale them to -1..1, for int16 x.float() / 32768")
        if waveforms.dim() == 1:
            waveforms = waveforms[None]
        if waveforms.dim() != 2 or waveforms.shape[1] < 1:
            raise ValueError(f"waveforms have shape {tuple(waveforms.shape)}, expected (b, n) or (n,)")
        waveforms = waveforms.to(torch.promote_types(waveforms.dtype, torch.float32))
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
        lengths = check_lengths(lengths, len(waveforms), waveforms.shape[1], 1, "samples").to(waveforms.device)
        rate = sample_rate or self.sample_rate
        if rate is None:
            raise ValueError("sample_rate is needed: this front end takes waveforms at their own rate")
        if self.sample_rate is not None and rate != self.sample_rate:
            waveforms = torchaudio("functional").resample(waveforms, rate, self.sample_rate)
            lengths = (lengths * self.sample_rate + rate - 1) // rate
            rate = self.sample_rate
        return waveforms, lengths, rate

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        names = ("sample_rate", "mel_bins", "frames", "mean", "std")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class FilterBank(FrontEnd):
    """Log-mel filter bank energies as Kaldi computes them: the front end of AuM and SSAMBA, from torchaudio.

    The published code takes each recording at its own rate, and its data sets are stored at 16 kHz; here other rates
    are resampled to `sample_rate`.

    Args:
        sample_rate: As for `FrontEnd`.
        mel_bins: Likewise.
        frames: Likewise.
        mean: Likewise.
        std: Likewise.
        frame_length: In milliseconds.
        frame_shift: In milliseconds.
        low_freq: Lower edge of the first band, in Hz.
        high_freq: Upper edge of the last band, in Hz; 0 is half the sample rate.

    Source:
        `torchaudio.compliance.kaldi.fbank`; arXiv:2406.03344.
    """

    def __init__(
        self, sample_rate: int | None = 16000, mel_bins: int = 128, frames: int | None = None,
        mean: float = 0.0, std: float = 0.5, frame_length: float = 25.0, frame_shift: float = 10.0,
        low_freq: float = 20.0, high_freq: float = 0.0,
    ):  # fmt: skip
        super().__init__(sample_rate, mel_bins, frames, mean, std)
        self.frame_length, self.frame_shift = frame_length, frame_shift
        self.low_freq, self.high_freq = low_freq, high_freq

    def spectrogram(self, waveforms: Tensor, rate: int) -> Tensor:
        """Waveforms `(b, n)` at `rate` Hz to log-mel energies `(b, t, mel_bins)`."""
        b, n = waveforms.shape
        window, shift = self._samples(rate)
        frames = max(0, 1 + (n - window) // shift)
        if frames == 0:
            return waveforms.new_zeros(b, 0, self.mel_bins)
        # One call for the batch: recordings one after another, each beginning at a frame. Frames that reach from one
        # into the next are left out, and every other frame is computed from its own samples alone.
        stride = -(-n // shift) * shift
        line = F.pad(F.pad(waveforms, (0, stride - n)).reshape(1, -1), (0, window))
        energies = torchaudio("compliance.kaldi").fbank(
            line,
            htk_compat=True,
            sample_frequency=rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.mel_bins,
            dither=0.0,
            frame_length=self.frame_length,
            frame_shift=self.frame_shift,
            low_freq=self.low_freq,
            high_freq=self.high_freq,
        )
        return energies[: b * (stride // shift)].unflatten(0, (b, -1))[:, :frames]

    def count(self, samples: Tensor, rate: int) -> Tensor:
        """Frames of recordings of so many samples at `rate` Hz: those whose window lies inside."""
        window, shift = self._samples(rate)
        return torch.where(samples < window, 0, 1 + (samples - window) // shift)

    def _samples(self, rate: int) -> tuple[int, int]:
        # In the order of Kaldi's own arithmetic, whose rounding decides about the last sample.
        return int(rate * self.frame_length * 0.001), int(rate * self.frame_shift * 0.001)


class MelSpectrogram(FrontEnd):
    """Logarithm of mel-scaled magnitudes of a centred STFT: the front end of AuM for EPIC-SOUNDS.

    Args:
        sample_rate: As for `FrontEnd`, but given.
        mel_bins: Likewise.
        frames: Likewise.
        mean: Likewise; without mean and std the spectrogram is not normalised, as published.
        std: Likewise.
        n_fft: Samples of the transform.
        frame_length: In milliseconds.
        frame_shift: In milliseconds.
        offset: Added before the logarithm.

    Source:
        arXiv:2406.03344; `torchaudio.transforms.MelSpectrogram` with power 1, HTK scale, no norm, constant padding.
    """

    def __init__(
        self, sample_rate: int = 24000, mel_bins: int = 128, frames: int | None = None, mean: float = 0.0,
        std: float = 0.5, n_fft: int = 2048, frame_length: float = 10.0, frame_shift: float = 5.0,
        offset: float = 1e-6,
    ):  # fmt: skip
        super().__init__(sample_rate, mel_bins, frames, mean, std)
        self.n_fft, self.offset = n_fft, offset
        self.frame_length, self.frame_shift = frame_length, frame_shift

    def spectrogram(self, waveforms: Tensor, rate: int) -> Tensor:
        """Waveforms `(b, n)` at `rate` Hz to log-mel magnitudes `(b, t, mel_bins)`."""
        magnitudes = torchaudio("functional").spectrogram(
            waveforms,
            pad=0,
            window=torch.hann_window(round(rate * self.frame_length / 1000), device=waveforms.device),
            n_fft=self.n_fft,
            hop_length=self._hop(rate),
            win_length=round(rate * self.frame_length / 1000),
            power=1.0,
            normalized=False,
            pad_mode="constant",
        )
        filters = _mel_filters(self.n_fft, self.mel_bins, rate, waveforms.device, waveforms.dtype)
        return torch.log(magnitudes.transpose(1, 2) @ filters + self.offset)

    def count(self, samples: Tensor, rate: int) -> Tensor:
        """Frames of recordings of so many samples at `rate` Hz: one at the start of every hop."""
        return 1 + samples // self._hop(rate)

    def _hop(self, rate: int) -> int:
        return round(rate * self.frame_shift / 1000)


def front_end(settings: str | dict[str, Any] | FrontEnd) -> FrontEnd:
    """A front end by the name of a data set, or from settings.

    Args:
        settings: A key of `FRONT_ENDS`; or arguments of `FilterBank`, or of `MelSpectrogram` with `"kind": "mel"`; or a
            front end, returned as it is.

    Raises:
        ValueError: an unknown name or kind.

    Example:
        >>> front_end("speechcommands").frames
        128
    """
    if isinstance(settings, FrontEnd):
        return settings
    if isinstance(settings, str):
        if settings not in FRONT_ENDS:
            raise ValueError(f"front_end={settings!r} is unknown; choose one of {', '.join(FRONT_ENDS)}, or settings")
        settings = FRONT_ENDS[settings]
    options = dict(settings)
    kind = options.pop("kind", "fbank")
    kinds: dict[str, type[FrontEnd]] = {"fbank": FilterBank, "mel": MelSpectrogram}
    if kind not in kinds:
        raise ValueError(f"front_end: kind={kind!r} is unknown; choose one of {', '.join(kinds)}")
    return kinds[kind](**options)


def check_lengths(lengths: Tensor, batch: int, longest: int, shortest: int, unit: str) -> Tensor:
    """`lengths (batch,)` as integers, if they lie between `shortest` and `longest`; else ValueError."""
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"lengths must hold one integer for each of {batch} inputs, not {tuple(lengths.shape)}")
    if not lengths.is_meta:
        low, high = int(lengths.min()), int(lengths.max())
        if low < shortest or high > longest:
            raise ValueError(
                f"lengths run from {low} to {high} {unit}, but must lie between {shortest} and the {longest} given"
            )
    return lengths.long()


def torchaudio(module: str) -> Any:
    """A module of torchaudio, or an ImportError that says how to get it."""
    import importlib

    try:
        found: ModuleType = importlib.import_module(f"torchaudio.{module}")
    except ImportError as error:
        raise ImportError(
            f"front ends of audio models need torchaudio ({error}); pip install 'mamba_zoo[audio]'"
        ) from error
    return found


@lru_cache(maxsize=16)
def _mel_filters(n_fft: int, mel_bins: int, rate: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        filters = torchaudio("functional").melscale_fbanks(
            n_fft // 2 + 1, 0.0, rate / 2, mel_bins, rate, norm=None, mel_scale="htk"
        )
        return filters.to(device, dtype)


def mel_statistics(front: FrontEnd, waveforms: list[Tensor], rate: int) -> tuple[float, float]:
    """Mean and standard deviation of all frames of recordings, for `mean` and `std` of a front end.

    Args:
        front: Its own normalisation and number of frames are not used.
        waveforms: `(n,)` each.
        rate: Their sample rate, in Hz.

    Raises:
        ValueError: no recording is as long as one frame.
    """
    total = squares = 0.0
    number = 0
    for wave in waveforms:
        checked, lengths, own = front._checked(wave, rate, None)
        x = front.spectrogram(checked - checked.mean(), own)[:, : int(front.count(lengths, own)[0])].double()
        total, squares, number = total + float(x.sum()), squares + float((x * x).sum()), number + x.numel()
    if number == 0:
        raise ValueError(f"none of the {len(waveforms)} recordings is as long as one frame")
    mean = total / number
    return mean, math.sqrt(max(squares / number - mean * mean, 1e-12))

"""Models trained to name or to tag recordings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones._fbank import front_end as make_front_end
from . import audio_augment as augment
from ._classifier import Classifier, check_classes
from ._tagger import Tagger
from .audio_models import build_listener

_EXAMPLES = 8  # recordings of a test that are drawn
_RANGE, _QUIET = 45.0, 30.0  # dB below the loudest point that are heard, and below the loudest frame that are silence


class AudioClassifier(Classifier):
    """A model with its front end: waveforms in, one class out.

    Recordings are changed at random while training, a batch at a time and on the device that trains: first the
    waveform (speed, noise), then the spectrogram (tempo, vocal tract, channel, shift, masks, mixup).

    Args:
        name: A model of spectrograms of the zoo; any image model of the zoo or of timm, which sees the spectrogram as
            an image; "spectrogram_cnn" or "spectrogram_transformer", which others are compared with.
        scan: Scan order; None is the model's own.
        num_classes: Outputs; told by the data.
        front_end: Settings of the spectrograms; told by the data.
        class_names: In the order of the class numbers; told by the data.
        options: Further arguments of the model, such as `{"dim": 96, "depth": 6}`.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        drop_rate: Dropout before the head; None is the model's own.
        drop_path_rate: Stochastic depth; None is the model's own.
        level: "fixed" keeps the loudness and the channel of a recording; "recording" takes the mean of each of its
            bands away and divides by its own deviation, so that microphones and rooms matter less; what is 45 dB below
            its loudest point counts as silence, and silence around it as padding.
        speed: Play training recordings up to this part faster or slower, pitch and formants with it; 0 is off.
        tempo: Stretch or shorten them by up to this part at the same pitch; 0 is off.
        noise: Part of the training recordings to which noise is added, 5 to 50 dB below them.
        vocal_tract: Raise or lower all formants by up to this part; 0 is off.
        channel: Deviation of random gains along the bands, in decibels; 0 is off.
        shift: Move short recordings to the right by up to so many frames; 0 is off.
        mask_bands: Most bands that each of two masks hides (SpecAugment); 0 is off.
        mask_frames: Most frames that each of two masks hides; 0 is off.
        mixup: Alpha of mixup of spectrograms; 0 is off.
        label_smoothing: Probability spread over the other classes.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.

    Raises:
        ValueError: an unknown model or setting, or spectrograms the model cannot take.
        ImportError: torchaudio is missing.
    """

    unit = "recordings"
    orders = ("time_first", "frequency_first", "hilbert")
    # A patch of aum_mini spans all bands, so that orders of time and of frequency would be the same.
    compared: ClassVar[Mapping[str, Any]] = {"options": {"patch_size": [8, 4]}}
    grid: ClassVar[tuple[int, ...] | None] = (8, 12)

    def __init__(
        self,
        name: str = "aum_mini",
        scan: str | None = None,
        num_classes: int = 10,
        front_end: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        options: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        level: Literal["fixed", "recording"] = "fixed",
        speed: float = 0.0,
        tempo: float = 0.0,
        noise: float = 0.0,
        vocal_tract: float = 0.0,
        channel: float = 0.0,
        shift: int = 0,
        mask_bands: int = 0,
        mask_frames: int = 0,
        mixup: float = 0.0,
        label_smoothing: float = 0.1,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        class_names = check_classes(num_classes, class_names)
        front = make_front_end(front_end or {"frames": 100, "mel_bins": 40})
        if front.frames is None:
            raise ValueError("front_end needs a number of frames")
        for key, value, most in (
            ("speed", speed, 0.5), ("tempo", tempo, 0.5), ("vocal_tract", vocal_tract, 0.5), ("noise", noise, 1.0),
        ):  # fmt: skip
            if not 0 <= value <= most:
                raise ValueError(f"{key}={value} must lie between 0 and {most}")
        for key, value in (
            ("channel", channel), ("shift", shift), ("mask_bands", mask_bands), ("mask_frames", mask_frames),
            ("mixup", mixup),
        ):  # fmt: skip
            if value < 0:
                raise ValueError(f"{key}={value} must not be negative")
        net = build_listener(
            name, num_classes, front.mel_bins, front.frames, scan, pretrained, checkpoint_path, drop_rate,
            drop_path_rate, options,
        )  # fmt: skip
        super().__init__(
            net, name, num_classes, class_names, label_smoothing, opt, lr, weight_decay, layer_decay, recipe,
            warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.front_end, self.level = front, level
        self.speed, self.tempo, self.noise = speed, tempo, noise
        self.vocal_tract, self.channel = vocal_tract, channel
        self.shift, self.mask_bands, self.mask_frames, self.mixup = shift, mask_bands, mask_frames, mixup
        self._examples: dict[str, tuple[Tensor, str]] = {}  # by label

    def spectrograms(self, waves: Tensor, lengths: Tensor, training: bool = False) -> Tensor:
        """What the network sees of waveforms `(b, n)` at the front end's rate: `(b, frames, mel_bins)`, float32."""
        b, rate = len(waves), self.front_end.sample_rate or 16000
        if training and self.speed:
            factors = augment.uniform(b, 1 - self.speed, 1 + self.speed, waves)
            waves, lengths = augment.change_speed(waves, lengths, factors)
        if training and self.noise:
            snr, slope = augment.uniform(b, 5, 50, waves), augment.uniform(b, 0, 1, waves)
            chosen = torch.rand(b, 1, device=waves.device) < self.noise
            waves = torch.where(chosen, augment.add_noise(waves, lengths, snr, slope), waves)
        x, frames = self.front_end(waves, lengths=lengths)
        if training and self.tempo:
            x, frames = augment.change_tempo(x, frames, augment.uniform(b, 1 - self.tempo, 1 + self.tempo, waves))
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
        if training and self.vocal_tract:
            factors = augment.uniform(b, 1 - self.vocal_tract, 1 + self.vocal_tract, waves)
            x = augment.warp_bands(x, factors, 20.0, rate / 2)
        if training and self.channel:
            gains = torch.randn(b, 6, device=x.device) * self.channel / (2 * self.front_end.std)
            x = torch.where(padding[..., None], x, augment.change_channel(x, gains))
        if self.level == "recording":
            x = _levelled(x, padding, 2 * self.front_end.std)
        if training and self.shift:
            most = (x.shape[1] - frames).clamp(max=self.shift)
            x = _rolled(x, (torch.rand(b, device=x.device) * (most + 1)).long())
        if training:
            x = augment.mask(x, self.mask_bands, self.mask_frames)
        return x

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """Class scores `(b, num_classes)` of a batch of waveforms, lengths and whatever follows."""
        return net(self.spectrograms(batch[0], batch[1]))

    def targets(self, batch: Any) -> Tensor:
        """The true class numbers `(b,)` of a batch."""
        return batch[2]

    def batch_loss(self, batch: Any) -> Tensor:
        """The loss of a batch that was changed at random."""
        x, target = self.spectrograms(batch[0], batch[1], training=True), self.soft_targets(batch)
        if self.mixup:
            partner = torch.randperm(len(x), device=x.device)
            share = torch.distributions.Beta(self.mixup, self.mixup).sample((len(x),)).to(x.device)
            x = share[:, None, None] * x + (1 - share)[:, None, None] * x[partner]
            target = share[:, None] * target + (1 - share)[:, None] * target[partner]
        return self.loss(self.net(x).float(), target)

    def soft_targets(self, batch: Any) -> Tensor:
        """Targets as probabilities `(b, num_classes)`."""
        return F.one_hot(self.targets(batch), len(self.class_names)).float()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics and confusion of one batch; a few recordings are kept for the pictures."""
        super().test_step(batch, batch_idx)
        self._keep_examples(batch)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        super().on_test_epoch_start()
        self._examples.clear()

    def write_test_artifacts(self, out: Path) -> list[str]:
        """The confusion of the classes, and spectrograms of some test recordings, as pictures."""
        return [*super().write_test_artifacts(out), *self._draw_examples(out)]

    def _keep_examples(self, batch: Any) -> None:
        """The first recording of each label, for pictures."""
        labels = [self._label(target) for target in self.targets(batch)]
        first = [i for i, label in enumerate(labels) if label not in self._examples and label not in labels[:i]]
        few = [part[first[: _EXAMPLES - len(self._examples)]] for part in batch]
        if not len(few[0]):
            return
        x = self.spectrograms(few[0], few[1]).cpu()
        found = self.probabilities(self.scores(self.inference_net, few).float()).argmax(-1)
        frames = self.front_end.count(few[1], self.front_end.sample_rate or 16000).clamp(min=1).tolist()
        for i, spectrogram in enumerate(x):
            label, heard = self._label(self.targets(few)[i]), self.class_names[int(found[i])]
            self._examples[label] = (spectrogram[: frames[i]], f"{label}, read as {heard}")

    def _label(self, target: Tensor) -> str:
        return self.class_names[int(target)]

    def _draw_examples(self, out: Path) -> list[str]:
        from .audio_figures import plot_examples

        if not self._examples:
            return []
        spectrograms, titles = zip(*self._examples.values(), strict=True)
        plot_examples(spectrograms, titles, out / "spectrograms.png", self.front_end)
        return ["spectrograms.png"]

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Classes to list, windows, pictures, and what unreadable files do."""
        from .audio_predict import add_arguments

        add_arguments(parser)

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of sound files, as CSV."""
        from .audio_predict import predict_csv

        return predict_csv(self, args)


class AudioTagger(AudioClassifier, Tagger):
    """A model with its front end: waveforms in, any number of classes out, each with its own probability.

    Arguments are those of `AudioClassifier`; `label_smoothing` moves 0 and 1 by half of it. Scores are those of
    `Tagger`.
    """

    def __init__(
        self,
        name: str = "aum_mini",
        scan: str | None = None,
        num_classes: int = 10,
        front_end: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        options: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        level: Literal["fixed", "recording"] = "fixed",
        speed: float = 0.0,
        tempo: float = 0.0,
        noise: float = 0.0,
        vocal_tract: float = 0.0,
        channel: float = 0.0,
        shift: int = 0,
        mask_bands: int = 0,
        mask_frames: int = 0,
        mixup: float = 0.0,
        label_smoothing: float = 0.0,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        super().__init__(
            name, scan, num_classes, front_end, class_names, options, pretrained, checkpoint_path, drop_rate,
            drop_path_rate, level, speed, tempo, noise, vocal_tract, channel, shift, mask_bands, mask_frames, mixup,
            label_smoothing, opt,
            lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()

    def soft_targets(self, batch: Any) -> Tensor:
        """Targets as probabilities `(b, num_classes)`."""
        return self.targets(batch).float()

    def _label(self, target: Tensor) -> str:
        return "; ".join(self.class_names[i] for i in target.nonzero()[:, 0].tolist()) or "nothing"


def _levelled(x: Tensor, padding: Tensor, unit: float) -> Tensor:
    """Each band without its mean, all divided by their deviation; silence around a recording becomes padding, zeros.

    Args:
        x: `(b, t, mel_bins)`, natural logarithms divided by `unit`.
        padding: `(b, t)`.
        unit: See above.
    """
    decibel = math.log(10) / 10 / unit
    lowest = x.amin()
    x = torch.where(padding[..., None], lowest, x)
    x = torch.maximum(x, x.amax((1, 2), keepdim=True) - _RANGE * decibel)
    loudness = x.mean(2).masked_fill(padding, -math.inf)
    loud = loudness >= loudness.amax(1, keepdim=True) - _QUIET * decibel
    between = (loud.cumsum(1) > 0) & (loud.flip(1).cumsum(1) > 0).flip(1)
    inside = (between & ~padding)[..., None]
    frames = inside.sum(1, keepdim=True).clamp(min=1)
    x = (x - (x * inside).sum(1, keepdim=True) / frames) * inside
    deviation = (x.pow(2).sum((1, 2), keepdim=True) / (frames * x.shape[2])).sqrt()
    return x / (deviation + 1e-3)


def _rolled(x: Tensor, frames: Tensor) -> Tensor:
    """Each `(t, mel_bins)` of `x` moved to the right by so many frames; what leaves at the end, padding, comes in."""
    places = (torch.arange(x.shape[1], device=x.device) - frames[:, None]) % x.shape[1]
    return x.gather(1, places[..., None].expand_as(x))

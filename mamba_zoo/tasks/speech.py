"""Models from waveforms to waveforms, trained to take noise out of speech and to take voices apart."""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.audio import permutation_invariant_training, scale_invariant_signal_distortion_ratio

import mamba_zoo

from ._speech_baselines import BASELINES, build_baseline
from ._task import Task
from .checkpoints import write_atomically
from .running import write_csv
from .sound_files import write_sound
from .speech_figures import plot_spectrograms

_EXAMPLES = 3
_SILENCE = 1 / 32768  # one step of 16 bits
# Perceptual metrics: package that computes them, and sample rates it takes.
_PERCEPTUAL = {"stoi": ("pystoi", None), "pesq": ("pesq", (8000, 16000))}


class SpeechTask(Task):
    """A model from waveforms `(b, n)` to waveforms, its loss and its metrics; see its two kinds.

    The loss is the negative signal-to-noise ratio in dB, no better than 30 dB, of the best assignment of outputs to
    voices. Mixtures in which a clean voice is silent are not scored, as no ratio to silence means anything.

    Args:
        name: As in `mamba_zoo.list_models(modality="audio")`, or a baseline: "conv_mask" or "transformer_mask".
        scan: Scan order; None is the published one.
        sources: Voices that come out.
        sample_rate: Of the data, which must be the model's.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        pretrained: Start from the published weights.
        options: Further arguments of the model, such as `{causal: true}`.
        opt: See `Task`, as for all that follow.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.

    Raises:
        ValueError: an unknown model or setting, or data of another sample rate.
    """

    unit, monitor, monitor_mode = "mixtures", "val/si_sdri", "max"
    score_name: ClassVar[str] = "si_sdri"
    curves: ClassVar[tuple[str, ...]] = ("val/si_sdri",)
    metric_names: ClassVar[Mapping[str, str]] = {
        "si_sdri": "SI-SDR improvement, dB",
        "si_sdr": "SI-SDR, dB",
        "stoi": "STOI",
        "pesq": "PESQ",
        "loss": "negative SNR, dB",
    }
    orders = ("bidirectional", "raster", "reverse(raster)")
    grid: ClassVar[tuple[int, ...] | None] = (64,)
    endings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        name: str,
        scan: str | None,
        sources: int,
        sample_rate: int,
        pretrained: bool,
        checkpoint_path: str | None,
        options: dict[str, Any] | None,
        opt: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        net = build_speech_model(name, scan, sources, sample_rate, pretrained, checkpoint_path, options)
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.sources, self.sample_rate = sources, sample_rate
        self._tested: list[dict[str, float]] = []
        self._examples: list[list[np.ndarray]] = []
        self.left_out: dict[str, str] = {}

    def separate(self, net: nn.Module, batch: Any) -> Tensor:
        """Outputs `(b, s, n)` for a batch, zero after the end of each signal."""
        mixture, _, lengths = batch
        same = bool((lengths == mixture.shape[1]).all())
        return net(mixture, None if same else lengths).view(len(mixture), self.sources, -1).float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = -best_snr(self.separate(self.net, batch), batch[1]).mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one batch, kept for each mixture; the first few mixtures are kept themselves."""
        best, metrics, heard = self._evaluate(batch, "test")
        rows = {name: values.tolist() for name, values in metrics.items()}
        for i, n in enumerate(batch[2].tolist()):
            row = {}
            if heard[i]:
                row = {name: values[i] for name, values in rows.items()}
                row |= self._perceptual(best[i, :, :n].cpu(), batch[1][i, :, :n].float().cpu())
            else:
                self.left_out[f"score of mixture {len(self._tested)}"] = "a clean voice in it is silent"
            self._tested.append(row)
            if len(self._examples) < _EXAMPLES:
                signals = [batch[0][i, :n], *best[i, :, :n], *batch[1][i, :, :n]]
                self._examples.append([signal.float().cpu().numpy() for signal in signals])
        for key in _PERCEPTUAL:
            values = [row[key] for row in self._tested[-len(batch[0]) :] if key in row]
            if values:
                self.log(f"test/{key}", float(np.mean(values)), on_epoch=True, batch_size=len(values))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Outputs `(b, s, n)`."""
        return self.separate(self.inference_net, batch)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test, and see which perceptual metrics can be had."""
        self._tested.clear()
        self._examples.clear()
        self.left_out = {key: why for key in _PERCEPTUAL if (why := _missing(key, self.sample_rate))}

    @property
    def test_items(self) -> np.ndarray | None:
        """SI-SDR improvement of each mixture that was scored, in dB."""
        found = [row["si_sdri"] for row in self._tested if row]
        return np.array(found) if found else None

    def write_test_artifacts(self, out: Path) -> list[str]:
        """Metrics of every mixture, spectrograms and sound of the first few, and what was left out, with the reason."""
        write_csv(out / "mixtures.csv", [{"mixture": i, **row} for i, row in enumerate(self._tested)])
        files = ["mixtures.csv"]
        for i, (mixture, *rest) in enumerate(self._examples):
            named = {"mixture": mixture}
            named |= {f"out-{name}": y for name, y in zip(self.voice_names(), rest[: self.sources], strict=True)}
            named |= {f"true-{name}": y for name, y in zip(self.voice_names(), rest[self.sources :], strict=True)}
            for name, signal in named.items():
                write_sound(out / f"example{i}-{name}.wav", signal, self.sample_rate)
            plot_spectrograms(named, self.sample_rate, out / f"example{i}.png")
        if self._examples:
            files.append(f"example0.png and {len(self._examples)} examples as wav")
        if self.left_out:
            text = json.dumps(self.left_out, indent=1)
            write_atomically(out / "left_out.json", lambda file: file.write(text.encode()))
            files.append(f"left_out.json ({'; '.join(f'no {key}: {why}' for key, why in self.left_out.items())})")
        return files

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags that `mamba-zoo predict` takes for this task, beside those that all tasks share."""
        from .speech_predict import add_arguments

        add_arguments(parser)

    def predict_files(self, args: argparse.Namespace) -> str:
        """Write what becomes of every recording as wav files at its own rate, and spectrograms of before and after."""
        from .speech_predict import predict_sounds

        return predict_sounds(self, args)

    def voice_names(self) -> tuple[str, ...]:
        """What the outputs are called in the names of files."""
        return ("enhanced",) if self.sources == 1 else tuple(f"voice{i + 1}" for i in range(self.sources))

    def _evaluate(self, batch: Any, split: str) -> tuple[Tensor, dict[str, Tensor], list[bool]]:
        """Outputs in the order of the voices, metrics `(b,)`, and which mixtures these are logged for."""
        mixture, voices, _ = batch
        voices = voices.float()
        heard = (voices.abs().amax(-1) > _SILENCE).all(-1)
        count = int(heard.sum())
        outputs = self.separate(self.inference_net, batch)
        sdr, order = permutation_invariant_training(
            outputs, voices, scale_invariant_signal_distortion_ratio, "speaker-wise"
        )
        best = torch.stack([row[index] for row, index in zip(outputs, order, strict=True)])
        before = scale_invariant_signal_distortion_ratio(mixture.float()[:, None].expand_as(voices), voices).mean(1)
        metrics = {"si_sdri": sdr - before, "si_sdr": sdr, "loss": -best_snr(outputs, voices)}
        for name, values in metrics.items():
            mean = values[heard].mean() if count else values.new_zeros(())  # which then has no weight
            self.log(f"{split}/{name}", mean, on_epoch=True, batch_size=count, sync_dist=True)
        return best, metrics, heard.tolist()

    def _perceptual(self, outputs: Tensor, voices: Tensor) -> dict[str, float]:
        found = {}
        for key in _PERCEPTUAL:
            if key not in self.left_out:
                try:
                    with warnings.catch_warnings():
                        # The number that comes with a warning, such as of a clip too short, means nothing.
                        warnings.simplefilter("error", RuntimeWarning)
                        found[key] = float(_perceptual_metric(key, outputs, voices, self.sample_rate).mean())
                except (RuntimeError, RuntimeWarning, ValueError) as error:  # such as a clip without any speech in it
                    self.left_out[f"{key} of mixture {len(self._tested)}"] = str(error).splitlines()[0]
        return found


class SpeechEnhancer(SpeechTask):
    """A model that takes noise out of speech.

    Args:
        name: As in `mamba_zoo.list_models(modality="audio")`, or a baseline: "conv_mask" or "transformer_mask".
        scan: Scan order; None is the published one.
        sample_rate: Of the data, which must be the model's.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        options: Further arguments of the model, such as `{causal: true}`.
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
        ValueError: an unknown model or setting, or data of another sample rate.
    """

    def __init__(
        self,
        name: str = "semamba_mini",
        scan: str | None = None,
        sample_rate: int = 8000,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        options: dict[str, Any] | None = None,
        opt: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        super().__init__(
            name, scan, 1, sample_rate, pretrained, checkpoint_path, options,
            opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()


class SpeechSeparator(SpeechTask):
    """A model that takes voices apart, in an order of its own.

    Args:
        name: As in `mamba_zoo.list_models(modality="audio")`, or a baseline: "conv_mask" or "transformer_mask".
        scan: Scan order; None is the published one.
        sources: Voices that come out.
        sample_rate: Of the data, which must be the model's.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        options: Further arguments of the model.
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
        ValueError: an unknown model or setting, or data of another sample rate.
    """

    def __init__(
        self,
        name: str = "spmamba_mini",
        scan: str | None = None,
        sources: int = 2,
        sample_rate: int = 8000,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        options: dict[str, Any] | None = None,
        opt: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        super().__init__(
            name, scan, sources, sample_rate, pretrained, checkpoint_path, options,
            opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()


def build_speech_model(
    name: str,
    scan: str | None,
    sources: int,
    sample_rate: int,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A model from waveforms to `sources` waveforms, or a baseline; see `SpeechTask`.

    Raises:
        ValueError: an unknown name, a model that does something else, or one for another sample rate.
    """
    more = dict(options or {})
    if name in BASELINES:
        if scan is not None or pretrained or checkpoint_path is not None:
            raise ValueError(f"{name} is a baseline without scans and published weights; leave those arguments out")
        return build_baseline(name, sources, sample_rate, sources == 1, more)
    more |= {} if scan is None else {"scan": scan}
    if sources > 1:
        more["sources"] = sources
    net: Any = mamba_zoo.create_model(name, checkpoint_path, pretrained, **more)
    rate = getattr(net, "sample_rate", None)
    if rate is None or getattr(net, "sources", 1) != sources:
        task = "separates voices" if sources > 1 else "takes noise out of one voice"
        raise ValueError(f"{name} is no model that {task}; see mamba_zoo.list_models(modality='audio')")
    if rate != sample_rate:
        raise ValueError(
            f"{name} is for {rate} samples per second, the data have {sample_rate}: set sample_rate={rate}"
        )
    return net


def best_snr(outputs: Tensor, voices: Tensor, limit: float = 30.0) -> Tensor:
    """Mean signal-to-noise ratio in dB `(b,)` of the best assignment of outputs to voices, both `(b, s, n)`.

    No single one counts as better than about `limit` dB, so that easy mixtures do not rule the gradient.
    """

    def snr(output: Tensor, voice: Tensor) -> Tensor:
        power = voice.square().sum(-1) + 1e-6
        error = (voice - output).square().sum(-1)
        return 10 * torch.log10(power / (error + 10 ** (-limit / 10) * power))

    if outputs.shape[1] == 1:
        return snr(outputs, voices)[:, 0]
    return permutation_invariant_training(outputs, voices, snr, "speaker-wise")[0]


def _missing(key: str, sample_rate: int) -> str | None:
    """Why a perceptual metric cannot be had; None if it can."""
    package, rates = _PERCEPTUAL[key]
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed: pip install {package}"
    return f"it needs {rates[0]} or {rates[1]} samples per second" if rates and sample_rate not in rates else None


def _perceptual_metric(key: str, outputs: Tensor, voices: Tensor, sample_rate: int) -> Tensor:
    from torchmetrics.functional import audio

    if key == "stoi":
        return audio.short_time_objective_intelligibility(outputs, voices, sample_rate)
    return audio.perceptual_evaluation_speech_quality(
        outputs, voices, sample_rate, "nb" if sample_rate == 8000 else "wb"
    )

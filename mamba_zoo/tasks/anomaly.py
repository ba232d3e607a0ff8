"""What is unusual: how badly a model finds each step of a series from the steps around it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ._gaps import turn_gaps
from ._series_task import Schedule
from .imputation import Imputer
from .running import write_csv


class AnomalyDetector(Imputer):
    """A model trained to find hidden steps; its error at a step is that step's score, and above a threshold an alarm.

    Each step is scored when it is hidden: every window is read `turns` times, each time with other runs of `gap_length`
    steps hidden from all series at once. Windows overlap by half, and a step has the score of the window that it is
    furthest inside of, as models know less at the ends of a window. The threshold is the quantile of the validation
    scores, without those of known anomalies, that leaves `alarm_rate` of them above it; the first and the last
    `gap_length` steps of a table, which are found from one side only, have a threshold of their own, from the ends of
    the validation windows. If the table says which steps are anomalies, the test says how well the scores tell them
    apart.

    Args:
        name: As in `mamba_zoo.list_models(modality="series")`.
        scan: Scan order; None is the published one, "correlation" puts alike series one after another.
        net: Further arguments of the model, such as `{"dim": 128, "depth": 3}`.
        in_chans: Series.
        seq_len: Steps of a window.
        gap_length: Steps that are hidden in a row.
        turns: How often a window is read.
        alarm_rate: Part of the validation steps that would raise an alarm.
        loss: "mse", "mae" or "huber", of training; scores are squared errors.
        schedule: See `SeriesTask`.
        patience: See `SeriesTask`.
        keep_best: See `SeriesTask`.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.
        columns: Names of the series.
        mean: Of each series, which scaled values lack.
        deviation: Of each series, which scaled values are divided by.
        correlation: What the scan "correlation" stands for.
        marks: Whether the data give the time of each step; not read.

    Raises:
        ValueError: an unknown model or setting.
    """

    metric_names: ClassVar[Mapping[str, str]] = {
        "mse": "mean score",
        "mae": "mean absolute error",
        "threshold": "threshold",
        "alarms": "part of the steps above it",
        "auroc": "area under the ROC curve",
        "ap": "average precision",
        "precision": "precision at the threshold",
        "recall": "recall at the threshold",
        "f1": "F1 at the threshold",
    }
    threshold: Tensor
    end_threshold: Tensor

    def __init__(
        self,
        name: str = "series_mamba",
        scan: str | None = None,
        net: dict[str, Any] | None = None,
        in_chans: int = 1,
        seq_len: int = 96,
        gap_length: int = 4,
        turns: int = 4,
        alarm_rate: float = 0.01,
        loss: Literal["mse", "mae", "huber"] = "mse",
        schedule: Schedule = "cosine",
        patience: int | None = None,
        keep_best: bool = True,
        opt: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
        columns: list[str] | None = None,
        mean: list[float] | None = None,
        deviation: list[float] | None = None,
        correlation: str | None = None,
        marks: bool = False,
    ) -> None:
        if turns < 2 or not 0 < alarm_rate < 1:
            raise ValueError(f"turns={turns} must be at least 2, and alarm_rate={alarm_rate} between 0 and 1")
        if 2 * gap_length >= seq_len:
            raise ValueError(f"gap_length={gap_length} must be less than half of seq_len={seq_len}")
        super().__init__(
            name, scan, net, in_chans, seq_len, 1 / turns, gap_length, True, loss, schedule, patience, keep_best, opt,
            lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze, columns, mean, deviation,
            correlation, marks,
        )  # fmt: skip
        self.save_hyperparameters()
        self.turns, self.alarm_rate = turns, alarm_rate
        for name in ("threshold", "end_threshold"):
            self.register_buffer(name, torch.tensor(float("nan")))
        self._scored: list[tuple[Tensor, ...]] = []

    def scores(self, batch: Any) -> Tensor:
        """Squared error of each value of a batch when it was hidden, `(b, l, v)`; NaN where nothing was measured."""
        x, target = batch[:2]
        unknown = target.isnan()
        error = torch.zeros_like(x)
        for hidden in turn_gaps(x, self.turns, self.gap_length):
            found = self.filled(x, hidden | unknown).float()
            error = torch.where(hidden, (found - target).square(), error)
        return error

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the epoch before."""
        self._scored.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of one batch; steps that are known to be anomalies are left out."""
        self._scored.append((self.scores(batch).masked_fill((batch[4] > 0)[..., None], torch.nan), batch[3]))

    def on_validation_epoch_end(self) -> None:
        """The threshold of the epoch, and its mean score."""
        scores, starts = (self._gathered(torch.cat(part)) for part in zip(*self._scored, strict=True))
        values, ends = self._laid(scores, starts), self.gap_length
        steps = values.nanmean(-1)
        self.threshold.copy_(self._quantile(steps[ends:-ends]))
        self.end_threshold.copy_(self._quantile(torch.cat([scores[:, :ends], scores[:, -ends:]]).nanmean(-1)))
        found = {"mse": steps.nanmean(), "mae": values.sqrt().nanmean()}
        self.log_dict({f"val/{key}": value for key, value in found.items()})
        self.note_score(float(found["mse"]))

    def _quantile(self, scores: Tensor) -> Tensor:
        """What leaves `alarm_rate` of the scores above it; NaN if there are none."""
        known = scores[~scores.isnan()].flatten().sort().values
        if not len(known):
            return scores.new_tensor(float("nan"))
        # torch.quantile takes no more than 16 million values.
        return known[min(int(len(known) * (1 - self.alarm_rate)), len(known) - 1)]

    def limits(self, rows: int) -> np.ndarray:
        """Threshold of each step of a table, `(rows,)`."""
        limits = np.full(rows, float(self.threshold))
        limits[: self.gap_length] = limits[-self.gap_length :] = float(self.end_threshold)
        return limits

    def note_score(self, score: float) -> None:
        """Keep the thresholds with the best weights."""
        before = self._best["score"]
        super().note_score(score)
        if self._best["score"] < before:
            self._best["thresholds"] = [float(self.threshold), float(self.end_threshold)]

    def on_train_end(self) -> None:
        """Go back to the weights and the thresholds of the best epoch."""
        super().on_train_end()
        if self._best["state"]:
            for buffer, value in zip((self.threshold, self.end_threshold), self._best["thresholds"], strict=True):
                buffer.fill_(value)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._scored.clear()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of one batch, with its values, first rows and labels."""
        kept = (self.scores(batch), self.unscaled(batch[0]), batch[3], batch[4])
        self._scored.append(tuple(part.detach().cpu() for part in kept))

    def on_test_epoch_end(self) -> None:
        """How high the scores are and, where the truth is known, how well they tell it."""
        errors, _, labels = self.tested()
        scores = errors.nanmean(-1)
        known = ~scores.isnan()
        alarms = (scores > torch.from_numpy(self.limits(len(scores))))[known]
        found = {
            "mse": float(scores[known].mean()),
            "mae": float(errors.sqrt().nanmean()),
            "threshold": float(self.threshold),
            "alarms": float(alarms.float().mean()),
        }
        truth = labels[known]
        if not truth.isnan().any() and 0 < truth.sum() < len(truth):
            found |= detection_scores(scores[known].numpy(), truth.numpy() > 0, alarms.numpy())
        self.log_dict({f"test/{key}": value for key, value in found.items()})

    def tested(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and values in the units of the table, `(steps, v)` each, and labels `(steps,)` of the tested steps."""
        scores, values, starts, labels = (torch.cat(part) for part in zip(*self._scored, strict=True))
        one, two, three = (self._laid(part.double(), starts) for part in (scores, values, labels))
        return one, two, three

    def _laid(self, parts: Tensor, starts: Tensor) -> Tensor:
        """What windows `(windows, seq_len, ...)` from these rows on say of each row from the first to the last."""
        from .series_windows import laid_together

        first = int(starts.min())
        return laid_together(int(starts.max()) + self.seq_len - first, starts - first, parts)

    def write_test_artifacts(self, out: Path) -> list[str]:
        """The score of every step, as CSV and as a picture."""
        from ._series_figures import plot_anomalies

        errors, *rest = self.tested()
        scores, values, labels = (part.numpy() for part in (errors.nanmean(-1), *rest))
        limits, known = self.limits(len(scores)), not np.isnan(labels).any()
        rows = []
        for i, (score, label) in enumerate(zip(scores, labels, strict=True)):
            row = {"step": i, "score": float(score), "alarm": int(score > limits[i])}
            rows.append({**row, "label": int(label)} if known else row)
        write_csv(out / "scores.csv", rows)
        plot_anomalies(values, scores, limits, self.columns, out / "scores.png", labels if known else None)
        return ["scores.csv", "scores.png"]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Score of each step of a batch, `(b, l)`."""
        return self.scores(batch).nanmean(-1)

    def predict_files(self, args: argparse.Namespace) -> str:
        """The score of every step of a table, as CSV and as a picture."""
        from .series_predict import scores_csv

        return scores_csv(self, args)

    def _gathered(self, x: Tensor) -> Tensor:
        return self.all_gather(x).flatten(0, 1) if self.trainer.world_size > 1 else x  # type: ignore[union-attr]


def detection_scores(scores: np.ndarray, truth: np.ndarray, alarms: np.ndarray) -> dict[str, float]:
    """How well scores tell anomalies apart, step by step; nothing is credited to the steps around an anomaly.

    Args:
        scores: `(n,)`.
        truth: `(n,)`, of both kinds.
        alarms: `(n,)`, of scores above their thresholds.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    right = float((alarms & truth).sum())
    precision, recall = right / max(float(alarms.sum()), 1.0), right / float(truth.sum())
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "ap": float(average_precision_score(truth, scores)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * right / float(alarms.sum() + truth.sum()),
    }

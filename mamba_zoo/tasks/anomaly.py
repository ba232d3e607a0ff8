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
    steps hidden from all series at once. The threshold is the quantile of the validation scores that leaves
    `alarm_rate` of them above it. If the table says which steps are anomalies, the test says how well the scores tell
    them apart.

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
        super().__init__(
            name, scan, net, in_chans, seq_len, 1 / turns, gap_length, True, loss, schedule, patience, keep_best, opt,
            lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze, columns, mean, deviation,
            correlation, marks,
        )  # fmt: skip
        self.save_hyperparameters()
        self.turns, self.alarm_rate = turns, alarm_rate
        self.register_buffer("threshold", torch.tensor(float("nan")))
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
        """Scores of one batch."""
        self._scored.append((self.scores(batch),))

    def on_validation_epoch_end(self) -> None:
        """The threshold of the epoch, and its mean score."""
        values = torch.cat([scores for (scores,) in self._scored])
        steps = values.nanmean(-1).flatten()
        steps = self._gathered(steps)
        steps = steps[~steps.isnan()]
        # torch.quantile takes no more than 16 million values.
        at = min(int(len(steps) * (1 - self.alarm_rate)), len(steps) - 1)
        self.threshold.copy_(steps.sort().values[at])
        found = {"mse": steps.mean(), "mae": self._gathered(values.flatten()).sqrt().nanmean()}
        self.log_dict({f"val/{key}": value for key, value in found.items()})
        self.note_score(float(found["mse"]))

    def note_score(self, score: float) -> None:
        """Keep the threshold with the best weights."""
        before = self._best["score"]
        super().note_score(score)
        if self._best["score"] < before:
            self._best["threshold"] = float(self.threshold)

    def on_train_end(self) -> None:
        """Go back to the weights and the threshold of the best epoch."""
        super().on_train_end()
        if self._best["state"]:
            self.threshold.fill_(self._best["threshold"])

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._scored.clear()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of one batch, with its values, first rows and labels."""
        kept = (self.scores(batch), self.unscaled(batch[0]), batch[3], batch[4])
        self._scored.append(tuple(part.detach().cpu() for part in kept))

    def on_test_epoch_end(self) -> None:
        """How high the scores are and, where the truth is known, how well they tell it."""
        scores, _, labels = self.tested()
        known = ~scores.isnan()
        threshold = float(self.threshold)
        alarms = scores[known] > threshold
        errors = torch.cat([part[0] for part in self._scored]).flatten()
        found = {
            "mse": float(scores[known].mean()),
            "mae": float(errors.sqrt().nanmean()),
            "threshold": threshold,
            "alarms": float(alarms.float().mean()),
        }
        truth = labels[known]
        if not truth.isnan().any() and 0 < truth.sum() < len(truth):
            found |= detection_scores(scores[known].numpy(), truth.numpy() > 0, threshold)
        self.log_dict({f"test/{key}": value for key, value in found.items()})

    def tested(self) -> tuple[Tensor, Tensor, Tensor]:
        """Score `(steps,)`, values `(steps, v)` in the units of the table and label `(steps,)` of the tested steps."""
        from .series_windows import laid_together

        scores, values, starts, labels = (torch.cat(part) for part in zip(*self._scored, strict=True))
        first = int(starts.min())
        rows = int(starts.max()) + self.seq_len - first
        parts = (scores.nanmean(-1), values, labels)
        one, two, three = (laid_together(rows, starts - first, part.double()) for part in parts)
        return one, two, three

    def write_test_artifacts(self, out: Path) -> list[str]:
        """The score of every step, as CSV and as a picture."""
        from ._series_figures import plot_anomalies

        scores, values, labels = (part.numpy() for part in self.tested())
        threshold, known = float(self.threshold), not np.isnan(labels).any()
        rows = []
        for i, (score, label) in enumerate(zip(scores, labels, strict=True)):
            row = {"step": i, "score": f"{score:.6g}", "alarm": int(score > threshold)}
            rows.append({**row, "label": int(label)} if known else row)
        write_csv(out / "scores.csv", rows)
        plot_anomalies(values, scores, threshold, self.columns, out / "scores.png", labels if known else None)
        return ["scores.csv", "scores.png"]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Score of each step of a batch, `(b, l)`."""
        return self.scores(batch).nanmean(-1)

    def predict_files(self, args: argparse.Namespace) -> str:
        """The score of every step of a table, as CSV and as a picture."""
        from .series_predict import scores_csv

        return scores_csv(self, args)

    def _gathered(self, x: Tensor) -> Tensor:
        return self.all_gather(x).flatten() if self.trainer.world_size > 1 else x  # type: ignore[union-attr]


def detection_scores(scores: np.ndarray, truth: np.ndarray, threshold: float) -> dict[str, float]:
    """How well scores tell anomalies apart, step by step; nothing is credited to the steps around an anomaly.

    Args:
        scores: `(n,)`.
        truth: `(n,)`, of both kinds.
        threshold: Above it is an alarm.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    alarms = scores > threshold
    right = float((alarms & truth).sum())
    precision, recall = right / max(float(alarms.sum()), 1.0), right / float(truth.sum())
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "ap": float(average_precision_score(truth, scores)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * right / float(alarms.sum() + truth.sum()),
    }

"""Naming things of any kind: loss, metrics, confusion, and class probabilities as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from ._task import Task
from .running import write_csv
from .summary import plot_confusion


class Classifier(Task):
    """A network that gives each item of a batch, or each of its tokens, one score a class.

    A subclass says what an item is. Where a batch is more than `(inputs, class numbers)`, it overrides `scores` and
    `targets`.

    Args:
        net: What is trained.
        name: Of the model.
        num_classes: Outputs.
        class_names: In the order of the class numbers; None numbers them.
        label_smoothing: Probability spread over the other classes.
        opt: See `Task`, as for all that follow.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.

    Attributes:
        least_classes: That it makes sense with.

    Raises:
        ValueError: a setting out of range.
    """

    least_classes: ClassVar[int] = 2
    monitor, monitor_mode = "val/top1", "max"
    score_name, percent = "accuracy", True
    curves: ClassVar[tuple[str, ...]] = ("val/top1", "val/f1")
    metric_names: ClassVar[Mapping[str, str]] = {
        "top1": "top-1 accuracy",
        "top5": "top-5 accuracy",
        "f1": "macro F1",
        "ece": "calibration error",
        "loss": "cross-entropy",
    }

    def __init__(
        self,
        net: nn.Module,
        name: str,
        num_classes: int,
        class_names: Sequence[str] | None = None,
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
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.class_names = check_classes(num_classes, class_names, self.least_classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie between 0 and 1, such as 0.1; 0 is off")
        self.prepare_scores(num_classes, label_smoothing)

    def prepare_scores(self, num_classes: int, label_smoothing: float) -> None:
        """Make the loss and the metrics."""
        self.loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_metrics = classification_metrics(num_classes, "val")
        self.test_metrics = classification_metrics(num_classes, "test")
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self._tested: list[tuple[Tensor, Tensor]] = []

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """Class scores `(n, num_classes)` of a batch."""
        return net(batch[0])

    def targets(self, batch: Any) -> Tensor:
        """The true class numbers `(n,)` of a batch."""
        return batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.batch_loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=self.batch_items(batch))
        return loss

    def batch_loss(self, batch: Any) -> Tensor:
        """What is minimised."""
        return self.loss(self.scores(self.net, batch).float(), self.targets(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics and confusion of one batch."""
        scores, y = self._evaluate(batch, "test"), self.targets(batch)
        self.confusion.update(scores, y)
        self._tested.append((y.cpu(), scores.argmax(-1).cpu()))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities `(n, num_classes)`, float32."""
        return self.probabilities(self.scores(self.inference_net, batch).float())

    def probabilities(self, scores: Tensor) -> Tensor:
        """Class probabilities of scores."""
        return scores.softmax(-1)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._tested.clear()
        self.confusion.reset()

    @property
    def test_predictions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Class numbers tested by this process, true and predicted, in order; None before a test."""
        if not self._tested:
            return None
        target, predicted = (torch.cat(part).numpy() for part in zip(*self._tested, strict=True))
        return target, predicted

    @property
    def test_items(self) -> np.ndarray | None:
        """1 for each item that was named rightly, else 0."""
        found = self.test_predictions
        return None if found is None else (found[0] == found[1]).astype(np.float64)

    def test_arrays(self) -> dict[str, np.ndarray]:
        """`target` and `predicted` class numbers."""
        found = self.test_predictions
        return {} if found is None else {"target": found[0], "predicted": found[1]}

    def write_test_artifacts(self, out: Path) -> list[str]:
        """The confusion of the classes, as a picture."""
        plot_confusion(self.confusion.compute().cpu().numpy(), self.class_names, out / "confusion.png")
        return ["confusion.png"]

    def _evaluate(self, batch: Any, split: str) -> Tensor:
        scores, y = self.scores(self.inference_net, batch).float(), self.targets(batch)
        self.log(f"{split}/loss", F.cross_entropy(scores, y), on_epoch=True, batch_size=len(y), sync_dist=True)
        metrics = self.val_metrics if split == "val" else self.test_metrics
        metrics.update(scores, y)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(y))
        return scores


def check_classes(num_classes: int, class_names: Sequence[str] | None, least: int = 2) -> list[str]:
    """The names, or numbers for names.

    Raises:
        ValueError: fewer than `least` classes, or another number of names.
    """
    if num_classes < least:
        raise ValueError(f"num_classes={num_classes}; classification needs at least {least} classes")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"class_names has {len(class_names)} names for num_classes={num_classes}")
    return list(class_names) if class_names else [str(i) for i in range(num_classes)]


def classification_metrics(num_classes: int, split: str) -> MetricCollection:
    """Top-1, top-5 where there are more than five classes, macro F1, and the expected calibration error (15 bins)."""
    metrics: dict[str, Any] = {
        "top1": MulticlassAccuracy(num_classes, average="micro"),
        "f1": MulticlassF1Score(num_classes, average="macro"),
        "ece": MulticlassCalibrationError(num_classes),
    }
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, prefix=f"{split}/")


def write_classes(
    out: Path,
    items: Sequence[Any],
    probabilities: Tensor,
    class_names: Sequence[str],
    top: int = 5,
) -> None:
    """A CSV file with the likeliest classes of each item.

    Args:
        out: Of the file.
        items: What each row is about: paths, or columns that say it.
        probabilities: `(items, classes)`.
        class_names: In the order of the class numbers.
        top: Classes to list for each item.
    """
    rows = []
    for item, scores in zip(items, probabilities, strict=True):
        values, indices = scores.topk(min(top, len(class_names)))
        row: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"file": str(item)}
        for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), start=1):
            suffix = "" if rank == 1 else f"_{rank}"
            row |= {f"predicted{suffix}": class_names[index], f"probability{suffix}": f"{value:.6f}"}
        rows.append(row)
    write_csv(out, rows)

"""Naming everything that an item is: what taggers of any kind add to a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from ._classifier import Classifier
from ._tagging_metrics import OverClasses, TagLoss, item_scores
from .running import write_csv


class Tagger(Classifier):
    """A classifier whose items have any number of classes, each with a probability of its own.

    Targets are 0 or 1 for each class `(b, num_classes)`, NaN where it is unknown. The score is the mean average
    precision over the classes that some items have and others lack (mAP). A task inherits from its classifier first,
    from this one second.
    """

    least_classes = 1
    monitor = "val/map"
    score_name, percent = "mAP", False
    curves: ClassVar[tuple[str, ...]] = ("val/map",)
    metric_names: ClassVar[Mapping[str, str]] = {
        "map": "mean average precision", "auroc": "mean area under ROC", "loss": "binary cross-entropy",
    }  # fmt: skip

    def prepare_scores(self, num_classes: int, label_smoothing: float) -> None:
        """Make the loss and the metrics."""
        self.loss = TagLoss(label_smoothing)
        self.plain_loss = TagLoss()
        self.val_metrics, self.test_metrics = (
            MetricCollection(
                {"map": OverClasses(binary_average_precision), "auroc": OverClasses(binary_auroc)},
                prefix=f"{split}/",
            )
            for split in ("val", "test")
        )
        self._tested: list[tuple[Tensor, Tensor]] = []

    def probabilities(self, scores: Tensor) -> Tensor:
        """Class probabilities of scores."""
        return scores.sigmoid()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one batch."""
        scores = self._evaluate(batch, "test")
        self._tested.append((self.targets(batch).cpu(), self.probabilities(scores).cpu()))

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._tested.clear()

    @property
    def test_predictions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Targets and probabilities `(items, classes)` of what this process tested, in order; None before a test."""
        if not self._tested:
            return None
        target, probability = (torch.cat(part).numpy() for part in zip(*self._tested, strict=True))
        return target, probability

    @property
    def test_items(self) -> np.ndarray | None:
        """What `item_scores` says of each item; their mean is the area under ROC where all targets are known."""
        found = self.test_predictions
        return None if found is None else item_scores(*found)

    def test_arrays(self) -> dict[str, np.ndarray]:
        """`target (items, classes)` and `probability`, likewise."""
        found = self.test_predictions
        return {} if found is None else {"target": found[0], "probability": found[1]}

    def write_test_artifacts(self, out: Path) -> list[str]:
        """A table of the classes: items that have them, that are known, and both scores; empty where none can be."""
        found = self.test_predictions
        if found is None:
            return []
        target, probability = (torch.from_numpy(part) for part in found)
        scores = {}
        for name, of in (("average_precision", binary_average_precision), ("auroc", binary_auroc)):
            metric = OverClasses(of)
            metric.update(probability, target)
            scores[name] = ["" if score is None else f"{float(score):.4f}" for score in metric.each()]
        has, known = (target == 1).sum(0).tolist(), (~target.isnan()).sum(0).tolist()
        columns = {"class": self.class_names, "positive": has, "known": known, **scores}
        rows = zip(*columns.values(), strict=True)
        write_csv(out / "classes.csv", [dict(zip(columns, row, strict=True)) for row in rows])
        return ["classes.csv"]

    def _evaluate(self, batch: Any, split: str) -> Tensor:
        scores, y = self.scores(self.inference_net, batch).float(), self.targets(batch)
        loss = self.plain_loss(scores, y.float())
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=len(y), sync_dist=True)
        metrics = self.val_metrics if split == "val" else self.test_metrics
        metrics.update(scores, y)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(y))
        return scores

"""Tags, which do not exclude each other: their loss, scores of each class alone, and what they say of each item.

Targets are 0 or 1 for each item and class; NaN where it is unknown, which neither the loss nor a score reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TagLoss(nn.Module):
    """Binary cross-entropy, the mean over all targets that are known; 0 if none is.

    Args:
        label_smoothing: Moves 0 and 1 by half of it.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Of scores `(b, classes)` and targets, likewise."""
        known = ~targets.isnan()
        smooth = targets.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(scores, smooth, reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


class OverClasses(Metric):
    """The mean of a score over the classes that some items have and others lack; of the rest nothing can be said.

    Without any such class it is 0.

    Args:
        of: The score of one class, from scores `(n,)` and 0 or 1 `(n,)`.
    """

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of
        for name in ("scores", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add scores `(b, classes)` and targets, likewise."""
        self.scores.append(scores)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """The mean."""
        found = [score for score in self.each() if score is not None]
        return torch.stack(found).mean() if found else dim_zero_cat(self.scores).new_zeros(())

    def each(self) -> list[Tensor | None]:
        """The score of each class, None for one of which nothing can be said."""
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        known = ~targets.isnan()
        judged = ((targets == 1).any(0) & (targets == 0).any(0)).tolist()
        return [
            self.of(scores[known[:, i], i], targets[known[:, i], i].long()) if can else None
            for i, can in enumerate(judged)
        ]


def item_scores(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How well each item stands: the part of the items with the other answer that it is on the right side of.

    For an item that has a class, that is the part of those without it that score lower; for one that lacks it, the part
    of those with it that score higher; ties count half. These are the placements of DeLong et al. (1988,
    doi:10.2307/2531595), whose mean over all items is the area under the ROC curve. An item has their mean over the
    classes that are known of it and that some items have and others lack.

    Args:
        targets: `(items, classes)`.
        scores: Likewise, more being likelier.

    Returns: `(items,)`, without the items of which nothing can be said: which these are follows from the targets alone.
    """
    found = np.full(targets.shape, np.nan)
    for target, score, place in zip(targets.T, scores.T, found.T, strict=True):
        has, lacks = target == 1, target == 0
        if has.any() and lacks.any():
            place[has] = _below(score[has], score[lacks])
            place[lacks] = 1 - _below(score[lacks], score[has])
    judged = ~np.isnan(found).all(1)
    return np.nanmean(found[judged], axis=1)


def _below(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The part of `others` below each of `x`."""
    others = np.sort(others)
    return (np.searchsorted(others, x, "left") + np.searchsorted(others, x, "right")) / (2 * len(others))

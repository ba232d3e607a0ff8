"""Scores of tags: of each class alone, then their mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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
        """Add scores `(b, classes)` and 0 or 1, likewise."""
        self.scores.append(scores)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """The mean."""
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        known = (targets.amax(0) > targets.amin(0)).nonzero().flatten().tolist()
        found = [self.of(scores[:, i], targets[:, i]) for i in known]
        return torch.stack(found).mean() if found else scores.new_zeros(())

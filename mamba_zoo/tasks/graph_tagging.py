"""Graph models trained to name everything that a graph is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ._classifier import check_classes
from ._tagger import Tagger
from .graph import Freeze, GraphClassifier, Recipe
from .running import write_csv


class GraphTagger(GraphClassifier, Tagger):
    """A graph model that gives a graph any number of classes, each with a probability of its own.

    See `Tagger` for the scores, and `GraphClassifier` for the arguments that are not described.

    Args:
        name: See `GraphClassifier`.
        scan: See `GraphClassifier`.
        num_classes: Outputs; 1 is allowed.
        class_names: In the order of the outputs; told by the data.
        in_chans: Node features.
        edge_chans: Edge features.
        encoder: Of nodes.
        edges: Their encoder.
        pe: Positions.
        pe_steps: Of them.
        options: Further arguments of the model.
        label_smoothing: Moves 0 and 1 by half of it.
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
        ValueError: an unknown model or setting.
    """

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        num_classes: int = 4,
        class_names: list[str] | None = None,
        in_chans: int = 3,
        edge_chans: int = 1,
        encoder: str = "linear",
        edges: str = "none",
        pe: str = "none",
        pe_steps: int = 16,
        options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Recipe = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Freeze = "none",
    ) -> None:
        super().__init__(
            name, scan, num_classes, in_chans, edge_chans, encoder, edges, pe, pe_steps, options, label_smoothing, opt,
            lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.class_names = check_classes(num_classes, class_names, self.least_classes)

    def targets(self, batch: Any) -> Tensor:
        """0, 1 or NaN `(graphs, num_classes)`."""
        return batch.y.view(batch.num_graphs, -1).float()

    def write_table(self, out: Path, items: Sequence[Mapping[str, Any]], probabilities: Tensor) -> None:
        """A column a class with its probability, as CSV."""
        columns = [f"probability_{name}" for name in self.class_names]
        rows = [
            {**item, **{column: f"{value:.6f}" for column, value in zip(columns, values, strict=True)}}
            for item, values in zip(items, probabilities.tolist(), strict=True)
        ]
        write_csv(out, rows)

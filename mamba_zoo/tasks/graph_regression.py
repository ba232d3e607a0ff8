"""Graph models trained to read numbers off graphs, nodes or edges."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._graph_nets import build_graph_model
from .graph import Freeze, Ordered, Recipe, batches_of, source_of, told_of
from .running import write_csv


class GraphRegressor(Ordered):
    """A graph model that reads one or more numbers off each graph; see `GraphClassifier` for what is not described.

    Args:
        name: As for `GraphClassifier`.
        scan: Order of the nodes; None is the model's own.
        center: Mean of each target over the training graphs.
        scale: Their standard deviations; the loss is in units of them, scores in those of the targets.
        in_chans: Node features.
        edge_chans: Edge features.
        encoder: Of nodes.
        edges: Their encoder.
        pe: Positions.
        pe_steps: Of them.
        options: Further arguments of the model.
        loss: "mse" or "l1".
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

    level: ClassVar[str] = "graph"
    unit: ClassVar[str] = "graphs"
    monitor, monitor_mode = "val/rmse", "min"
    score_name = "rmse"
    curves: ClassVar[tuple[str, ...]] = ("val/rmse", "val/mae")
    metric_names: ClassVar[Mapping[str, str]] = {"rmse": "root mean square error", "mae": "mean absolute error"}
    center: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        center: list[float] | None = None,
        scale: list[float] | None = None,
        in_chans: int = 3,
        edge_chans: int = 1,
        encoder: str = "linear",
        edges: str = "none",
        pe: str = "none",
        pe_steps: int = 16,
        options: dict[str, Any] | None = None,
        loss: Literal["mse", "l1"] = "mse",
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
        center, scale = center or [0.0], scale or [1.0]
        if len(center) != len(scale) or loss not in ("mse", "l1"):
            raise ValueError(f"center={center} and scale={scale} must be alike, and loss={loss!r} 'mse' or 'l1'")
        told = told_of(in_chans, edge_chans, encoder, edges, pe, pe_steps)
        net = build_graph_model(name, scan, self.level, len(center), told, options or {})
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.save_hyperparameters()
        self.loss = F.mse_loss if loss == "mse" else F.l1_loss
        self.register_buffer("center", torch.tensor(center))
        self.register_buffer("scale", torch.tensor(scale))
        self._found: list[tuple[Tensor, Tensor]] = []

    def read(self, net: nn.Module, batch: Any) -> Tensor:
        """What a network says of the items of a batch, `(items, targets)`, in units of `scale` around `center`."""
        return net(batch)

    def targets(self, batch: Any) -> Tensor:
        """What is true of them, `(items, targets)`."""
        return batch.y.view(batch.num_graphs, -1).float()

    def batch_items(self, batch: Any) -> int:
        """Items of a batch."""
        return len(self.targets(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        target = (self.targets(batch) - self.center) / self.scale
        loss = self.loss(self.read(self.net, batch).float(), target)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(target))
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Targets `(items, targets)`, float32."""
        return self.read(self.inference_net, batch).float() * self.scale + self.center

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep predictions; their errors belong to the whole split."""
        self._found.append((self.targets(batch), self.predict_step(batch, batch_idx)))

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Forget earlier predictions."""
        self._found.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Errors over the split."""
        self._log_errors("val")

    def on_test_epoch_end(self) -> None:
        """Errors over the split."""
        self._log_errors("test")

    @property
    def test_items(self) -> np.ndarray | None:
        """Mean absolute error of each graph tested."""
        if not self._found:
            return None
        target, predicted = (torch.cat(part).cpu().double().numpy() for part in zip(*self._found, strict=True))
        return np.abs(target - predicted).mean(1)

    def test_arrays(self) -> dict[str, Any]:
        """`target` and `predicted`."""
        if not self._found:
            return {}
        target, predicted = (torch.cat(part).cpu().numpy() for part in zip(*self._found, strict=True))
        return {"target": target, "predicted": predicted}

    def predict_files(self, args: argparse.Namespace) -> str:
        """Predicted targets of the graphs of a source, or of its nodes or edges, as CSV."""
        data = source_of(self, args)
        with torch.no_grad():
            names, found = self.predict_source(data, args.batch_size)
        rows = [
            {**name, **{f"target_{j}": f"{value:.6g}" for j, value in enumerate(row)}}
            for name, row in zip(names, found.tolist(), strict=True)
        ]
        out = Path(args.out or "predictions.csv")
        write_csv(out, rows)
        return f"{len(rows):,} {self.unit} -> {out}"

    def predict_source(self, data: Any, batch_size: int) -> tuple[list[dict[str, Any]], Tensor]:
        """Columns that name each item of a source, and predictions `(items, targets)`."""
        found = torch.cat([self.predict_step(batch, 0) for batch in batches_of(data.graphs, batch_size)])
        return [{"graph": i} for i in range(len(found))], found

    def _log_errors(self, split: str) -> None:
        target, predicted = (torch.cat(part) for part in zip(*self._found, strict=True))
        error = predicted - target
        self.log(f"{split}/rmse", error.square().mean().sqrt())
        self.log(f"{split}/mae", error.abs().mean())


class NodeRegressor(GraphRegressor):
    """A graph model that reads numbers off nodes; see `GraphRegressor`, and `NodeData` for `row_normalize`."""

    level = "node"
    unit = "nodes"

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        center: list[float] | None = None,
        scale: list[float] | None = None,
        in_chans: int = 5,
        edge_chans: int = 1,
        encoder: str = "linear",
        edges: str = "none",
        pe: str = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        options: dict[str, Any] | None = None,
        loss: Literal["mse", "l1"] = "mse",
        opt: str = "adamw",
        lr: float = 1e-2,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Recipe = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Freeze = "none",
    ) -> None:
        super().__init__(
            name, scan, center, scale, in_chans, edge_chans, encoder, edges, pe, pe_steps, options, loss, opt, lr,
            weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()

    def read(self, net: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """What a network says of the nodes that count."""
        data, nodes = batch
        return net(data)[nodes]

    def targets(self, batch: tuple[Any, Tensor]) -> Tensor:
        """What is true of them."""
        data, nodes = batch
        return data.y[nodes].view(len(nodes), -1).float()

    def predict_source(self, data: Any, batch_size: int) -> tuple[list[dict[str, Any]], Tensor]:
        """Every node, and its predictions."""
        names, found = [], []
        for named, batch in data.node_batches(self.hparams["row_normalize"], batch_size):
            names += named
            found.append(self.predict_step((batch, torch.arange(batch.num_nodes)), 0))
        return names, torch.cat(found)


class EdgeRegressor(NodeRegressor):
    """A graph model that reads numbers off edges; see `NodeRegressor` for the arguments."""

    level = "edge"
    unit = "edges"

    def read(self, net: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """What a network says of the edges that count."""
        return net(batch[0])

    def targets(self, batch: tuple[Any, Tensor]) -> Tensor:
        """What is true of them."""
        return batch[1].view(len(batch[1]), -1).float()

    def predict_source(self, data: Any, batch_size: int) -> tuple[list[dict[str, Any]], Tensor]:
        """Every edge by its two nodes, and its predictions."""
        graph = data.prepared_graph(self.hparams["row_normalize"])
        graph.edge_label_index = graph.edge_index
        found = self.inference_net(graph).float() * self.scale + self.center
        return [{"source": a, "target": b} for a, b in graph.edge_index.T.tolist()], found

"""Graph models trained to name graphs, nodes or pairs of nodes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ._classifier import Classifier, check_classes, write_classes
from ._graph_nets import build_graph_model
from ._task import Task
from .running import write_csv

Freeze = Literal["none", "backbone", "bn"]
Recipe = Literal["recommended", "as-published"]


class Ordered(Task):
    """Prepares the visiting orders of the data once, before a run."""

    orders = ("degree", "rcm", "clusters")
    grid = (8, 8)

    def setup(self, stage: str) -> None:
        """Prepare orders; a model that draws them anew, and one without a scan, has none to prepare."""
        scan, orders = getattr(self.net, "scan", "none"), getattr(self.net, "orders", None)
        data: Any = getattr(self.trainer, "datamodule", None)
        if scan != "none" and orders is not None and orders.ties == "fixed" and hasattr(data, "add_orders"):
            data.add_orders(scan)

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Where data sets of PyG are kept."""
        parser.add_argument("--download-dir", default="data", help="where data sets are kept (default: %(default)s)")


class GraphClassifier(Ordered, Classifier):
    """A graph model that names whole graphs; see `Classifier` and `build_graph_model`.

    Args:
        name: As in `mamba_zoo.list_models(modality="graph")`, or the baselines "gcn", "gin" and "gps".
        scan: Order of the nodes; None is the model's own.
        num_classes: Outputs.
        in_chans: Node features.
        edge_chans: Edge features.
        encoder: Of nodes, as for `GraphMamba`.
        edges: Their encoder, likewise.
        pe: Positions, likewise.
        pe_steps: Likewise.
        options: Further arguments of the model, such as `{"dim": 64, "depth": 4, "local": "gin"}`.
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

    Raises:
        ValueError: an unknown model or setting.
    """

    level: ClassVar[str] = "graph"
    unit = "graphs"

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        num_classes: int = 10,
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
        check_classes(num_classes, None, self.least_classes)
        told = told_of(in_chans, edge_chans, encoder, edges, pe, pe_steps)
        net = build_graph_model(name, scan, self.level, num_classes, told, options or {})
        super().__init__(
            net, name, num_classes, None, label_smoothing, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs,
            min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """Class scores of the graphs of a batch."""
        return net(batch)

    def targets(self, batch: Any) -> Tensor:
        """Their classes."""
        return batch.y.view(-1).long()

    def batch_items(self, batch: Any) -> int:
        """Graphs of a batch."""
        return batch.num_graphs

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of the graphs of a source, as CSV."""
        data = source_of(self, args)
        probabilities = torch.cat([self.predict_step(batch, 0) for batch in batches_of(data.graphs, args.batch_size)])
        return self.write_predictions(args, [{"graph": i} for i in range(len(probabilities))], probabilities)

    def write_predictions(
        self, args: argparse.Namespace, items: Sequence[Mapping[str, Any]], probabilities: Tensor
    ) -> str:
        """Write probabilities `(items, classes)` beside the columns that name the items; returns what was done."""
        out = Path(args.out or "predictions.csv")
        self.write_table(out, items, probabilities.detach())
        return f"{len(probabilities):,} {self.unit} -> {out}"

    def write_table(self, out: Path, items: Sequence[Mapping[str, Any]], probabilities: Tensor) -> None:
        """The likeliest classes of each item, as CSV."""
        write_classes(out, items, probabilities, self.class_names)


class NodeClassifier(GraphClassifier):
    """A graph model that names nodes; see `GraphClassifier` for the arguments, and `NodeData` for `row_normalize`."""

    level = "node"
    unit = "nodes"

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        num_classes: int = 4,
        in_chans: int = 34,
        edge_chans: int = 1,
        encoder: str = "linear",
        edges: str = "none",
        pe: str = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
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
            name, scan, num_classes, in_chans, edge_chans, encoder, edges, pe, pe_steps, options, label_smoothing, opt,
            lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()

    def scores(self, net: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Class scores of the nodes that count."""
        data, nodes = batch
        return net(data)[nodes]

    def targets(self, batch: tuple[Any, Tensor]) -> Tensor:
        """Their classes."""
        data, nodes = batch
        return data.y[nodes]

    def batch_items(self, batch: tuple[Any, Tensor]) -> int:
        """Nodes that count."""
        return len(batch[1])

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of the nodes of one graph or several, as CSV."""
        names, found = [], []
        with torch.no_grad():
            for named, batch in source_of(self, args).node_batches(self.hparams["row_normalize"], args.batch_size):
                names += named
                found.append(self.probabilities(self.inference_net(batch).float()))
        return self.write_predictions(args, names, torch.cat(found))


class EdgeClassifier(NodeClassifier):
    """A graph model that says which pairs of nodes are joined; see `GraphClassifier` for the arguments."""

    level = "edge"
    unit = "pairs"
    curves: ClassVar[tuple[str, ...]] = ("val/top1", "val/auc")
    metric_names: ClassVar[Mapping[str, str]] = {**Classifier.metric_names, "auc": "area under the ROC curve"}

    def __init__(
        self,
        name: str = "graph_mamba",
        scan: str | None = None,
        in_chans: int = 34,
        edge_chans: int = 1,
        encoder: str = "linear",
        edges: str = "none",
        pe: str = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        options: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
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
            name, scan, 2, in_chans, edge_chans, encoder, edges, pe, pe_steps, row_normalize, options, label_smoothing,
            opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        del self.hparams["num_classes"]  # of the class above: this one takes none, so that no checkpoint may hold it
        self.class_names = ["apart", "joined"]

    def scores(self, net: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Scores of the pairs."""
        return net(batch[0])

    def targets(self, batch: tuple[Any, Tensor]) -> Tensor:
        """1 for the pairs that are joined."""
        return batch[1]

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Which pairs are asked for."""
        super().predict_arguments(parser)
        parser.add_argument("--pairs", type=Path, help="CSV of pairs of nodes, with columns source and target")

    def predict_files(self, args: argparse.Namespace) -> str:
        """The probability that the pairs of `--pairs` are joined, as CSV.

        Raises:
            ValueError: no pairs, or a node that does not exist.
        """
        from ._graph_tables import read_pairs

        if args.pairs is None:
            raise ValueError("which pairs of nodes? Give --pairs FILE, a CSV with columns source and target")
        graph = source_of(self, args).prepared_graph(self.hparams["row_normalize"])
        graph.edge_label_index = read_pairs(args.pairs, graph.num_nodes)
        with torch.no_grad():
            joined = self.inference_net(graph).float().softmax(-1)[:, 1]
        rows = [
            {"source": a, "target": b, "joined": f"{p:.6f}"}
            for (a, b), p in zip(graph.edge_label_index.T.tolist(), joined.tolist(), strict=True)
        ]
        out = Path(args.out or "predictions.csv")
        write_csv(out, rows)
        return f"{len(rows):,} pairs -> {out}"

    def _evaluate(self, batch: Any, split: str) -> Tensor:
        from torchmetrics.functional.classification import binary_auroc

        scores = super()._evaluate(batch, split)
        auc = binary_auroc(scores.softmax(-1)[:, 1], self.targets(batch))
        self.log(f"{split}/auc", auc, on_step=False, on_epoch=True, batch_size=len(scores))
        return scores


def told_of(in_chans: int, edge_chans: int, encoder: str, edges: str, pe: str, pe_steps: int) -> dict[str, Any]:
    """What a model is told of its data, by the names of its arguments."""
    return {
        "in_chans": in_chans, "edge_chans": edge_chans, "encoder": encoder, "edges": edges, "pe": pe,
        "pe_steps": pe_steps,
    }  # fmt: skip


def source_of(task: Any, args: argparse.Namespace) -> Any:
    """The graphs to predict, with the positions that the model reads.

    Raises:
        ValueError: their nodes have another number of features than those that the model was trained with.
    """
    from .graph_data import GraphSource
    from .graph_nodes import NodeData

    kind = GraphSource if task.level == "graph" else NodeData
    data = kind(str(args.data), task.hparams["pe"], task.hparams["pe_steps"], download_dir=args.download_dir)
    if data.in_chans != task.hparams["in_chans"]:
        raise ValueError(
            f"{args.data} has {data.in_chans} node features, but the model was trained with {task.hparams['in_chans']}"
        )
    return data


def batches_of(graphs: list[Any], size: int) -> list[Any]:
    """Graphs `size` at a time, without their labels."""
    from torch_geometric.data import Batch

    from .graph_data import GraphData

    plain = [GraphData._plain(data) for data in graphs]
    for data in plain:
        data.y = None
    return [Batch.from_data_list(plain[i : i + size]) for i in range(0, len(plain), size)]

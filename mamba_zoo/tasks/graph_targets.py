"""One graph whose nodes or edges have numbers to be predicted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._graph_files import TIES
from ._graph_pairs import first_of, pairs_of
from .graph_data import GraphSource, Items, Positions
from .graph_nodes import NodeData, normalized


class NodeTargetData(NodeData):
    """Graphs whose nodes have one or more numbers each; see `NodeData` for what is not described.

    Args:
        root: "karate-ties", whose members have the strength of all their ties together, or a folder whose nodes have
            labels.
        pe: See `GraphSource`.
        pe_steps: See `GraphSource`.
        row_normalize: See `NodeData`.
        steps_per_epoch: See `NodeData`.
        split_seed: See `GraphSource`; nodes without a split of their own are drawn for it.
        num_workers: Not used.
        download_dir: See `GraphSource`.
        batch_size: See `NodeData`.
    """

    tells: ClassVar[Mapping[str, str]] = {
        **GraphSource.tells, "row_normalize": "row_normalize", "center": "center", "scale": "scale",
    }  # fmt: skip
    measured: ClassVar[tuple[str, ...]] = ("center", "scale")

    def __init__(
        self,
        root: str = TIES,
        pe: Positions = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        steps_per_epoch: int = 10,
        split_seed: int = 0,
        num_workers: int = 0,
        download_dir: str = "data",
        batch_size: int = 32,
    ) -> None:
        super().__init__(
            root, pe, pe_steps, row_normalize, steps_per_epoch, split_seed, num_workers, download_dir, batch_size
        )
        self.save_hyperparameters(logger=False)

    @property
    def center(self) -> list[float]:
        """Mean of each target over the training items."""
        return self.train_targets().mean(0).tolist()

    @property
    def scale(self) -> list[float]:
        """Standard deviation of each target over the training items."""
        return self.train_targets().std(0).clamp(min=1e-6).tolist()

    def train_targets(self) -> Tensor:
        """Targets of the training items, `(items, targets)`.

        Raises:
            ValueError: nodes without labels.
        """
        if self.several:
            graphs = self.split("train").items
            labels = self.node_labels(graphs)
            return labels.view(len(labels), -1).float()
        if self.graph.get("y") is None:
            raise ValueError(f"the nodes of {self.root} have no labels to predict")
        data, nodes = self.split("train")[0]
        return data.y[nodes].view(len(nodes), -1).float()


class EdgeTargetData(NodeTargetData):
    """One graph whose edges have a number each.

    An edge that is given in both directions is one item, or two if it has two numbers; both are of one part.

    Args:
        root: "karate-ties", the strength of each tie of Zachary's karate club; or a folder whose `edges.csv` has a
            column `label`.
        pe: See `GraphSource`.
        pe_steps: See `GraphSource`.
        row_normalize: See `NodeData`.
        steps_per_epoch: See `NodeData`.
        val_fraction: Part of the edges that validation asks for. All edges stay in the graph: their numbers are hidden.
        test_fraction: Part of the edges that the test asks for.
        split_seed: Of these parts.
        num_workers: Not used.
        download_dir: See `GraphSource`.

    Raises:
        ValueError: fractions out of range.
    """

    def __init__(
        self,
        root: str = TIES,
        pe: Positions = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        steps_per_epoch: int = 10,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        num_workers: int = 0,
        download_dir: str = "data",
    ) -> None:
        super().__init__(root, pe, pe_steps, row_normalize, steps_per_epoch, split_seed, num_workers, download_dir)
        if not (0 < val_fraction < 0.5 and 0 < test_fraction < 0.5):
            raise ValueError(f"val_fraction={val_fraction} and test_fraction={test_fraction} must be between 0 and 0.5")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.save_hyperparameters(logger=False)

    def parts(self) -> dict[str, Dataset]:
        """The graph with the edges of each split, and their numbers."""
        data = self.graph
        if data.get("edge_target") is None:
            raise ValueError(f"the edges of {self.root} have no labels to predict")
        if self.row_normalize:
            data.x = normalized(data.x)
        pair, stands = pairs_of(data.edge_index)
        number = first_of(data.edge_target)[0]
        asked = first_of(pair * len(pair) + number)[1]  # a number that an edge has in both directions is asked for once
        first = stands[pair[asked]]
        asked = torch.where(data.edge_target[asked] == data.edge_target[first], first, asked)
        drawn = torch.randperm(len(stands), generator=torch.Generator().manual_seed(self.split_seed))
        test, val = round(self.test_fraction * len(stands)), round(self.val_fraction * len(stands))
        found: dict[str, Dataset] = {}
        for part, pairs in zip(("test", "val", "train"), drawn.tensor_split((test, test + val)), strict=True):
            edges = asked[torch.isin(pair[asked], pairs)].sort().values
            graph = copy.copy(data)
            graph.edge_label_index = data.edge_index[:, edges]
            item = (graph, data.edge_target[edges])
            found[part] = Items([item] * (self.steps_per_epoch if part == "train" else 1))
        return found

    def train_targets(self) -> Tensor:
        """Numbers of the training edges, `(edges, 1)`."""
        return self.split("train")[0][1].view(-1, 1).float()

    def undivided(self) -> bool:
        """The parts of the edges are drawn."""
        return False

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The graph with the edges of one split."""
        return batch[0].to(device), batch[1].to(device)

    def all_graphs(self) -> list[Any]:
        """The graph as each split shows it."""
        return [self.split(part)[0][0] for part in ("train", "val", "test")]

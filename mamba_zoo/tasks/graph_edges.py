"""Edges of a graph to train on: some are hidden, and asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._graph_files import KARATE
from .graph_data import GraphSource, Items, Positions
from .graph_nodes import NodeData, normalized


class EdgeData(NodeData):
    """One graph some of whose edges are hidden: pairs of nodes that are joined, and as many that are not.

    Training pairs that are not joined are drawn anew at every step. See `NodeData` for the other arguments.

    Args:
        root: As for `NodeData`.
        pe: See `GraphSource`; prepared for the whole graph, so that "none" alone hides edges from the model.
        pe_steps: See `GraphSource`.
        row_normalize: See `NodeData`.
        steps_per_epoch: See `NodeData`.
        val_fraction: Part of the edges that validation asks for.
        test_fraction: Part of the edges that the test asks for.
        split_seed: Of the hidden edges.
        num_workers: Not used.
        download_dir: See `GraphSource`.
    """

    tells: ClassVar[Mapping[str, str]] = {**GraphSource.tells, "row_normalize": "row_normalize"}

    def __init__(
        self,
        root: str = KARATE,
        pe: Positions = "none",
        pe_steps: int = 16,
        row_normalize: bool = True,
        steps_per_epoch: int = 10,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int = 0,
        download_dir: str = "data",
    ) -> None:
        super().__init__(root, pe, pe_steps, row_normalize, steps_per_epoch, split_seed, num_workers, download_dir)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.save_hyperparameters(logger=False)

    def parts(self) -> dict[str, Dataset]:
        """The graph with the pairs of each split."""
        from torch_geometric.transforms import RandomLinkSplit
        from torch_geometric.utils import is_undirected

        data = self.graph
        if self.row_normalize:
            data.x = normalized(data.x)
        both = bool(is_undirected(data.edge_index))
        split = RandomLinkSplit(
            self.val_fraction, self.test_fraction, is_undirected=both, add_negative_train_samples=False
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.split_seed)
            state = np.random.get_state()
            np.random.seed(self.split_seed)
            parts = split(data)
            np.random.set_state(state)
        found: dict[str, Dataset] = {}
        for part, graph in zip(("train", "val", "test"), parts, strict=True):
            item = (graph, graph.edge_label.long())
            found[part] = TrainingPairs(graph, self.steps_per_epoch) if part == "train" else Items([item])
        return found

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The graph with its pairs, which differ from step to step."""
        return batch[0].to(device), batch[1].to(device)

    def all_graphs(self) -> list[Any]:
        """The graph as each split shows it."""
        return [self.split("train").data, *(self.split(part)[0][0] for part in ("val", "test"))]


class TrainingPairs(Dataset):
    """The graph of the training edges, with its joined pairs and as many others, drawn anew for each item."""

    def __init__(self, data: Any, length: int) -> None:
        self.data, self.length = data, length
        self.joined = data.edge_label_index

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        if i >= self.length:
            raise IndexError(i)
        from torch_geometric.utils import negative_sampling

        count = self.joined.shape[1]
        others = negative_sampling(self.data.edge_index, self.data.num_nodes, count)
        data = copy.copy(self.data)
        data.edge_label_index = torch.cat([self.joined, others], dim=1)
        return data, torch.cat([torch.ones(count), torch.zeros(others.shape[1])]).long()

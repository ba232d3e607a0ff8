"""Edges of a graph to train on: some are hidden, and asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._graph_files import KARATE, add_degree_profile
from ._graph_pairs import draw_apart, first_of, pairs_of
from .graph_data import GraphSource, Items, Positions
from .graph_nodes import NodeData, normalized


class EdgeData(NodeData):
    """One graph some of whose edges are hidden: pairs of nodes that are joined, and as many that are not.

    An edge that is given in both directions is one pair, hidden as a whole; of rows of the same edge the first counts.
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
        row_normalize: bool = False,
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
        """The graph with the pairs of each split.

        Raises:
            ValueError: too few edges, or a graph that joins all of its nodes.
        """
        data = self.graph
        once = first_of(data.edge_index[0] * data.num_nodes + data.edge_index[1])[1]
        edges = data.edge_index[:, once]
        pair, stands = pairs_of(edges)
        loop = edges[0] == edges[1]  # neither hidden nor asked for, as they are never among the pairs that are apart
        asked = (~loop[stands]).nonzero()[:, 0]
        asked = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(self.split_seed))]
        val, test = int(self.val_fraction * len(asked)), int(self.test_fraction * len(asked))
        train = len(asked) - val - test
        if min(val, test, train) < 1:
            raise ValueError(
                f"{self.root} joins {len(asked)} pairs of nodes, of which val_fraction={self.val_fraction} and "
                f"test_fraction={self.test_fraction} leave {train} to train, {val} to validate and {test} to test on; "
                "every part needs some"
            )
        apart = draw_apart(edges, data.num_nodes, val + test, np.random.default_rng(self.split_seed))
        if apart.shape[1] < 2:
            raise ValueError(f"{self.root} joins all of its {data.num_nodes} nodes; there is nothing to tell apart")
        others = apart.tensor_split((val * apart.shape[1] // (val + test),), dim=1)
        sizes, found, start = {"train": train, "val": val, "test": test}, {}, 0
        for part, size in sizes.items():
            joined = edges[:, stands[asked[start : start + size]]]
            seen = loop.clone()
            seen[torch.isin(pair, asked[: max(train, start)])] = True  # training pairs, and those of earlier parts
            graph = _with_edges(data, once[seen])
            if self.row_normalize:
                graph.x = normalized(graph.x)
            if part == "train":
                found[part] = TrainingPairs(graph, joined, self.steps_per_epoch)
            else:
                graph.edge_label_index, labels = _labelled(joined, others[part == "test"])
                found[part] = Items([(graph, labels)])
            start += size
        return found

    def undivided(self) -> bool:
        """Some edges must be hidden, to be asked for."""
        return False

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The graph with its pairs, which differ from step to step."""
        return batch[0].to(device), batch[1].to(device)

    def all_graphs(self) -> list[Any]:
        """The graph as each split shows it."""
        return [self.split("train").data, *(self.split(part)[0][0] for part in ("val", "test"))]


class TrainingPairs(Dataset):
    """The graph of the training edges, with its joined pairs and as many others, drawn anew for each item."""

    def __init__(self, data: Any, joined: Tensor, length: int) -> None:
        self.data, self.joined, self.length = data, joined, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        if i >= self.length:
            raise IndexError(i)
        draw = np.random.default_rng(int(torch.randint(2**62, ())))
        others = draw_apart(self.data.edge_index, self.data.num_nodes, self.joined.shape[1], draw)
        data = copy.copy(self.data)
        data.edge_label_index, labels = _labelled(self.joined, others)
        return data, labels


def _labelled(joined: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs `(2, p)`, and 1 for those that are joined, 0 for the others."""
    labels = torch.cat([torch.ones(joined.shape[1]), torch.zeros(apart.shape[1])]).long()
    return torch.cat([joined, apart], dim=1), labels


def _with_edges(data: Any, index: Tensor) -> Any:
    """The graph with some of its edges only, and what is known of them; degrees are those that they make."""
    graph = copy.copy(data)
    for key in data.edge_attrs():
        graph[key] = data.edge_index[:, index] if key == "edge_index" else data[key][index]
    return add_degree_profile(graph) if data.get("degree_profile") else graph

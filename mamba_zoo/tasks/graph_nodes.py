"""Nodes to train on: of one graph, some of them at a time, or of several graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ._graph_files import KARATE
from .epochs import EpochLoader
from .graph_data import GraphData, GraphSource, Items, Positions


class NodeData(GraphSource):
    """Graphs whose nodes have classes.

    Of one graph, an item is the whole of it with the nodes that count. Of several, an item is one of them, all of whose
    nodes count, and training, validation and test have graphs of their own: those that the data set or `graphs.csv`
    says, or 80, 10 and 10 percent.

    Args:
        root: "karate", "planetoid:Cora" and its like with their public splits, any other of PyG's, or a folder.
        pe: See `GraphSource`, as for all that are not described here.
        pe_steps: See `GraphSource`.
        row_normalize: Scale every node's features to a sum of 1, as is usual for bags of words; for nothing else.
        steps_per_epoch: Steps an epoch, each over the whole graph.
        split_seed: See `GraphSource`; a graph without validation or test nodes has them drawn from the unused ones. Of
            several splits that a data set comes with, the number of the one that is taken.
        num_workers: Not used: graphs stay in memory.
        download_dir: See `GraphSource`.
        batch_size: Graphs a step, where there are several.
    """

    tells: ClassVar[Mapping[str, str]] = {
        **GraphSource.tells, "num_classes": "num_classes", "row_normalize": "row_normalize",
    }  # fmt: skip

    def __init__(
        self,
        root: str = KARATE,
        pe: Positions = "none",
        pe_steps: int = 16,
        row_normalize: bool = False,
        steps_per_epoch: int = 10,
        split_seed: int = 0,
        num_workers: int = 0,
        download_dir: str = "data",
        batch_size: int = 32,
    ) -> None:
        super().__init__(root, pe, pe_steps, split_seed, batch_size, 0, download_dir)
        self.row_normalize, self.steps_per_epoch = row_normalize, steps_per_epoch
        self._here: tuple[Any, Any] = (None, None)
        self.save_hyperparameters(logger=False)

    @property
    def graph(self) -> Any:
        """The graph, if there is one."""
        if self.several:
            raise ValueError(f"{self.root} holds {len(self.graphs)} graphs; this task takes one")
        return self.graphs[0]

    @property
    def several(self) -> bool:
        """Whether there are several graphs."""
        return len(self.graphs) > 1

    def prepared_graph(self, row_normalize: bool) -> Any:
        """The graph, its features as a model reads them that was trained with `row_normalize`."""
        if row_normalize:
            self.graph.x = normalized(self.graph.x)
        return self.graph

    def node_batches(self, row_normalize: bool, size: int) -> Iterator[tuple[list[dict[str, int]], Any]]:
        """All graphs, `size` at a time, without labels: columns that name each node, and the batch."""
        if not self.several:
            graph = self.prepared_graph(row_normalize)
            yield [{"node": i} for i in range(graph.num_nodes)], graph
            return
        from torch_geometric.data import Batch

        plain = [GraphData._plain(data) for data in self.graphs]
        for start in range(0, len(plain), size):
            part, names = plain[start : start + size], []
            for i, data in enumerate(part, start):
                data.x, data.y = normalized(data.x) if row_normalize else data.x, None
                names += [{"graph": i, "node": node} for node in range(data.num_nodes)]
            yield names, Batch.from_data_list(part)

    @property
    def num_classes(self) -> int:
        """Classes.

        Raises:
            ValueError: labels that are not class numbers.
        """
        labels = self.node_labels(self.graphs)
        if labels.is_floating_point():
            raise ValueError(
                f"labels of the nodes of {self.root} are no class numbers; train them with --task node-regression"
            )
        parts = ("train", "val", "test")
        asked = labels if self.several else torch.cat([labels[self.split(part)[0][1]] for part in parts])
        if asked.min() < 0:
            raise ValueError(
                f"labels of the nodes of {self.root} go down to {int(asked.min())}, but classes are numbered from 0; "
                "give -1 and 1 as 0 and 1, and nodes of no class an empty split"
            )
        return int(labels.max()) + 1

    def node_labels(self, graphs: Sequence[Any]) -> Tensor:
        """Labels of all nodes of graphs, one after the other.

        Raises:
            ValueError: nodes without labels, or labels that are none of nodes.
        """
        for data in graphs:
            if data.get("y") is None:
                raise ValueError(f"the nodes of {self.root} have no labels")
            if len(data.y) != data.num_nodes:
                raise ValueError(
                    f"a graph of {self.root} has {len(data.y)} labels for {data.num_nodes} nodes; if they are the "
                    "graph's own, train them with --task graph-classification or graph-regression"
                )
        return torch.cat([data.y for data in graphs])

    def parts(self) -> dict[str, Dataset]:
        """The graph with the nodes of each split, or the graphs of each split."""
        if self.several:
            return self._parts_of_several()
        data = self.graph
        if self.row_normalize:
            data.x = normalized(data.x)
        where = self._nodes(data)
        for key in ("split_of_node",):
            if key in data:
                del data[key]
        return {
            part: Items([(data, nodes)] * (self.steps_per_epoch if part == "train" else 1))
            for part, nodes in where.items()
        }

    def undivided(self) -> bool:
        """Unless the source says which node or graph is of which part."""
        if self.several:
            return not all(data.get("split_name") for data in self.graphs)
        return not any(key in self.graph for key in ("split_of_node", "train_mask", "val_mask", "test_mask"))

    def everything(self, model: Any) -> Dataset:
        """All nodes."""
        self.node_labels(self.graphs)
        if not self.several:
            return Items([(self.prepared_graph(self.row_normalize), torch.arange(self.graph.num_nodes))])
        plain = [GraphData._plain(data) for data in self.graphs]
        for data in plain:
            data.x = normalized(data.x) if self.row_normalize else data.x
        return Items(plain)

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """Rows for the summary of a run."""
        if self.several:
            nodes = ", ".join(f"{self.count(self.split(part)):,} {part}" for part in ("train", "val", "test"))
            return [*super().describe("graphs"), (unit, nodes)]
        counts = ", ".join(f"{len(self.split(part)[0][1]):,} {part}" for part in ("train", "val", "test"))
        return [("graph", f"{self.graph.num_nodes:,} nodes, {self.graph.num_edges:,} edges"), (unit, counts)]

    def count(self, data: Dataset) -> int:
        """Nodes, pairs or edges that are scored, not graphs."""
        if self.several:
            return sum(item.num_nodes for item in data)
        return sum(len(item[1]) for item in data)

    def all_graphs(self) -> list[Any]:
        """Every graph that batches are made of."""
        if not self.several:
            return super().all_graphs()
        return [data for part in ("train", "val", "test") for data in self.split(part).items]

    def loader(self, data: Dataset, batch_size: int, num_workers: int, **options: Any) -> DataLoader:
        """The items as they are, one a batch; of several graphs batches of them."""
        if self.several:
            return EpochLoader(data, batch_size=batch_size, collate_fn=_with_nodes, **options)
        return EpochLoader(data, batch_size=1, collate_fn=_only, **options)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The graph is moved once, and stays there."""
        data, nodes = batch
        if self.several:
            return data.to(device), nodes.to(device)
        if self._here[0] is not data or self._here[1].edge_index.device != device:
            with torch.inference_mode(False):  # a test may come first, and training must be able to use its copy
                self._here = (data, data.clone().to(device))
        return self._here[1], nodes.to(device)

    def _parts_of_several(self) -> dict[str, Dataset]:
        if any("split_of_node" in data for data in self.graphs):
            raise ValueError(
                f"the split of {self.root} is one of nodes, which goes with one graph; of several, whole graphs are "
                "split: by a column split in graphs.csv, or drawn"
            )
        self.node_labels(self.graphs)
        if len(self.graphs) < 3:
            raise ValueError(f"{self.root} holds {len(self.graphs)} graphs, too few to train, validate and test on")
        names = [data.get("split_name") for data in self.graphs]
        if not all(names):
            part = max(1, round(len(names) / 10))
            drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
            names = ["test" if i in drawn[:part] else "val" if i in drawn[part : 2 * part] else "train"
                     for i in range(len(names))]  # fmt: skip
        found: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
        for name, data in zip(names, self.graphs, strict=True):
            found[name].append(GraphData._plain(data))
            if self.row_normalize:
                found[name][-1].x = normalized(data.x)
        if empty := [name for name, graphs in found.items() if not graphs]:
            raise ValueError(f"{self.root} has no {empty[0]} graphs; its split is train, val or test")
        return {name: Items(graphs) for name, graphs in found.items()}

    def _nodes(self, data: Any) -> dict[str, Tensor]:
        if "split_of_node" in data:
            names = np.array(data.split_of_node)
            given = {part: torch.from_numpy(np.flatnonzero(names == part)) for part in ("train", "val", "test")}
            if empty := [part for part, nodes in given.items() if not len(nodes)]:
                raise ValueError(f"nodes.csv of {self.root} has no {empty[0]} nodes; its split is train, val or test")
            return given
        masks = {part: data.get(f"{part}_mask") for part in ("train", "val", "test")}
        masks = {  # some data sets have several splits, a column each
            part: mask[:, self.split_seed % mask.shape[1]] if mask is not None and mask.dim() == 2 else mask
            for part, mask in masks.items()
        }
        found = {part: mask.nonzero()[:, 0] for part, mask in masks.items() if mask is not None}
        if len(found) == 3:
            return found
        taken = torch.zeros(data.num_nodes, dtype=torch.bool)
        for nodes in found.values():
            taken[nodes] = True
        draw = torch.Generator().manual_seed(self.split_seed)
        free = (~taken).nonzero()[:, 0]
        free = free[torch.randperm(len(free), generator=draw)]
        missing = [part for part in ("train", "val", "test") if part not in found]
        shares = {"train": 6, "val": 2, "test": 2} if len(missing) == 3 else {"val": 1, "test": 2, "train": 1}
        total, at = sum(shares[part] for part in missing), 0
        for part in missing:
            size = round(len(free) * shares[part] / total)
            found[part] = free[at:].sort().values if part == missing[-1] else free[at : at + size].sort().values
            at += size
        return found


def normalized(x: Tensor) -> Tensor:
    """Rows of counts or weights `(n, features)` scaled to a sum of 1; rows of zeros stay.

    Raises:
        ValueError: features below 0, which have no such scale.
    """
    if len(x) and x.min() < 0:
        raise ValueError(
            f"row_normalize=True scales counts or weights to a sum of 1, but features of these nodes go down to "
            f"{float(x.min()):.4g}; train with row_normalize=False"
        )
    total = x.sum(1, keepdim=True)
    return x / torch.where(total == 0, 1.0, total)


def _with_nodes(graphs: list[Any]) -> tuple[Any, Tensor]:
    """Graphs as a batch, and all its nodes."""
    from torch_geometric.data import Batch

    batch: Any = Batch.from_data_list(graphs)
    return batch, torch.arange(batch.num_nodes)


def _only(items: list[Any]) -> Any:
    return items[0]

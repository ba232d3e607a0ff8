"""Graphs packed into one list of nodes, and colours that tell their nodes apart whatever they are numbered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 16
_LOW_63 = (1 << 63) - 1


@dataclass(frozen=True, eq=False)
class Graphs:
    """Graphs whose nodes are packed into one list, each graph's nodes together: the layout of PyG's `Batch`.

    Attributes:
        edge_index: `(2, e)` int64: row 0 the sources, row 1 the targets.
        ptr: `(g + 1,)` int64, rising from 0 to the number of nodes: graph i owns nodes `ptr[i]` to `ptr[i + 1] - 1`.
        noise: `(n,)` numbers that break ties among nodes, instead of colours and then the stored order.

    Raises:
        ValueError: shapes that do not fit, or a node that does not exist.
    """

    edge_index: Tensor
    ptr: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        edges, ptr = self.edge_index, self.ptr
        if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point():
            raise ValueError(f"edge_index must be integers (2, e), not {edges.dtype} {tuple(edges.shape)}")
        if ptr.dim() != 1 or len(ptr) < 2:
            raise ValueError(f"ptr must be (g + 1,) boundaries of graphs, not {tuple(ptr.shape)}")
        if edges.shape[1] and (int(edges.min()) < 0 or int(edges.max()) >= self.num_nodes):
            odd = int(edges.min()) if int(edges.min()) < 0 else int(edges.max())
            raise ValueError(f"edge_index holds node {odd}, but there are {self.num_nodes} nodes, counted from 0")

    @classmethod
    def of(cls, data: Any, noise: Tensor | None = None) -> Graphs:
        """The graphs of a PyG `Data` or `Batch`, or of any object with `edge_index` and `x`, `num_nodes` or `ptr`.

        Raises:
            ValueError: no `edge_index`, nothing that tells the number of nodes, or a `batch` that is not ascending.
        """
        edge_index = getattr(data, "edge_index", None)
        if edge_index is None:
            found = "its edges as adj_t; leave ToSparseTensor out" if hasattr(data, "adj_t") else "no edge_index"
            raise ValueError(f"{type(data).__name__} has {found}; give a PyG Data or Batch")
        ptr, batch = getattr(data, "ptr", None), getattr(data, "batch", None)
        if ptr is None and batch is not None:
            if bool((batch[1:] < batch[:-1]).any()):
                raise ValueError("batch must be ascending, each graph's nodes together, as PyG's Batch makes it")
            graphs = int(batch[-1]) + 1 if len(batch) else 1
            ptr = torch.searchsorted(batch, torch.arange(graphs + 1, device=batch.device, dtype=batch.dtype))
        if ptr is None:
            x = getattr(data, "x", None)
            n = len(x) if x is not None else getattr(data, "num_nodes", None)
            if n is None:
                raise ValueError(f"{type(data).__name__} has neither x nor num_nodes: how many nodes are there?")
            ptr = torch.tensor([0, n])
        return cls(edge_index, ptr.to(edge_index.device), noise)

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs."""
        return self.lengths_and_total[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Nodes of each graph."""
        return self.lengths_and_total[0]

    @cached_property
    def lengths_and_total(self) -> tuple[tuple[int, ...], int]:
        """Nodes of each graph, and of all; read from the device once."""
        cuts = self.ptr.tolist()
        return tuple(high - low for low, high in pairwise(cuts)), cuts[-1]

    @cached_property
    def batch(self) -> Tensor:
        """Graph of each node, `(n,)` int64, on the device of `ptr`."""
        graphs = torch.arange(len(self.ptr) - 1, device=self.ptr.device)
        return torch.repeat_interleave(graphs, self.ptr.diff(), output_size=self.num_nodes)

    @cached_property
    def degree(self) -> Tensor:
        """Edges that leave each node, `(n,)` int64."""
        return torch.bincount(self.edge_index[0], minlength=self.num_nodes)

    @cached_property
    def colours(self) -> Tensor:
        """`(n,)` int64 in [0, 2^63): two nodes of equal colour look alike to 16 rounds of colour refinement.

        A node's first colour is its number of edges out and in; in each round the colours of its neighbours are mixed
        into it (Weisfeiler and Leman 1968). Integer arithmetic alone: the same on every machine, in any numbering of
        the nodes, and whatever other graphs are packed with it.
        """
        source, target = self.edge_index
        into = torch.bincount(target, minlength=self.num_nodes)
        colour = _mix(self.degree * 0x10001 + into)
        for _ in range(ROUNDS):  # always as many: the colours of a graph must not depend on its batch
            before, after = _mix(colour), _mix(colour + 0x5851F42D)  # of nodes: edges are several times as many
            seen = torch.zeros_like(colour).index_add_(0, target, before[source])
            seen = seen.index_add_(0, source, after[target])
            colour = _mix(colour * 3 + seen)
        return colour & _LOW_63

    @cached_property
    def graph_numpy(self) -> np.ndarray:
        """Graph of each node, `(n,)`."""
        return self.batch.cpu().numpy()

    @cached_property
    def tie_rank(self) -> np.ndarray:
        """Rank of each node by noise if there is any, otherwise by colour and then by where it is stored, `(n,)`."""
        keys = self.colours if self.noise is None else self.noise
        rank = np.empty(self.num_nodes, dtype=np.int64)
        rank[np.argsort(keys.cpu().numpy(), kind="stable")] = np.arange(self.num_nodes)
        return rank

    @cached_property
    def adjacency(self) -> Any:
        """Undirected and without loops, `scipy.sparse.csr_array (n, n)` of ones."""
        from scipy.sparse import csr_array

        source, target = self.edge_index.cpu().numpy()
        keep = source != target
        pairs = np.concatenate([source[keep], target[keep]]), np.concatenate([target[keep], source[keep]])
        found = csr_array((np.ones(len(pairs[0])), pairs), shape=(self.num_nodes, self.num_nodes))
        found.data[:] = 1.0  # edges given twice count once
        return found

    @cached_property
    def components(self) -> tuple[int, np.ndarray]:
        """How many connected parts there are in all graphs together, and the part of each node, `(n,)`."""
        from scipy.sparse.csgraph import connected_components

        count, label = connected_components(self.adjacency, directed=False)
        return int(count), label

    def renumbered(self, permutation: Tensor) -> Graphs:
        """The same graphs with node i stored at `permutation[i]`; nodes must stay within their graph."""
        noise = None
        if self.noise is not None:
            noise = torch.empty_like(self.noise).index_put((permutation,), self.noise)
        return Graphs(permutation[self.edge_index], self.ptr, noise)


def grid_graph(size: tuple[int, ...]) -> Graphs:
    """The graph of a grid: each cell is joined to its neighbours along every axis."""
    cells = torch.arange(int(np.prod(size))).view(size)
    pairs = []
    for axis, side in enumerate(size):
        low, high = cells.narrow(axis, 0, side - 1).reshape(-1), cells.narrow(axis, 1, side - 1).reshape(-1)
        pairs += [torch.stack([low, high]), torch.stack([high, low])]
    return Graphs(torch.cat(pairs, dim=1), torch.tensor([0, cells.numel()]))


def hashed(*parts: Tensor | int) -> Tensor:
    """Integers mixed into one, int64 in [0, 2^63), broadcast over the tensors; the same on every machine."""
    mixed: Tensor | int = 0x9E3779B9
    for part in parts:
        mixed = _mix(torch.as_tensor(mixed) * 5 + part)
    return torch.as_tensor(mixed) & _LOW_63


def uniform(hashes: Tensor) -> Tensor:
    """Hashes as numbers in [0, 1), float64."""
    return (hashes >> 10).double() / float(1 << 53)


def _mix(x: Tensor) -> Tensor:
    """Splitmix64 (Steele et al. 2014) of int64, which wraps around as unsigned integers do."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

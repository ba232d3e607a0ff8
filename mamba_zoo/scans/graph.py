"""Orders of the nodes of graphs: by centrality, along searches, by spectrum, in clusters.

Each is a function of `Graphs`, any number of graphs packed into one list of nodes, and orders every graph as if it
were alone. An order depends on the graph and not on how its nodes are numbered, as far as that is possible: ties are
broken by 16 rounds of colour refinement, which tells apart all nodes but those that a symmetry exchanges and a few
besides, and only then by the stored order. Numbers that are computed in floating point are rounded first, so that ties
are ties on every machine. Edges count in both directions, except for `degree` and `pagerank`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._graphs import Graphs, grid_graph, hashed, uniform
from ._registry import ScanLike, as_spec, register_sample_order, sample_scan
from ._sample import GRID_SAMPLES, Samples
from .core import Scan, uncompiled

__all__ = ["Graphs", "graph_order", "graph_orders", "graph_scan", "order_key", "register_graph_order", "sort_nodes"]

GRID_SAMPLES["graph"] = grid_graph
_STEPS = 1e7 * 2**0.5  # per largest score; irrational, so that no simple fraction lies between two steps
_DENSE = 1024  # nodes up to which all eigenvectors are computed
_POWER_STEPS = 100


def register_graph_order(name: str, replace: bool = False) -> Any:
    """Decorator: give an order of the nodes of graphs a name, usable in any spec.

    The function takes `Graphs` and options with defaults, and returns the nodes of all graphs, `(n,)` or `(k, n)`, in
    visiting order; it is enough that every graph's nodes are in their order among themselves. `sort_nodes` makes that
    from scores.

    Args:
        name: A Python identifier.
        replace: Take over a name that is taken.

    Example:
        >>> @register_graph_order("loops_last", replace=True)
        ... def loops_last(graphs):
        ...     source, target = graphs.edge_index
        ...     return sort_nodes(graphs, torch.bincount(source[source == target], minlength=graphs.num_nodes))
        >>> graphs = Graphs(torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.tensor([0, 2]))
        >>> graph_order("loops_last", graphs).tolist()
        [[1, 0]]
        >>> from mamba_zoo.scans import unregister_scan
        >>> unregister_scan("loops_last")
    """
    return register_sample_order(name, "graph", replace)


def graph_scan(scan: ScanLike, graphs: Graphs) -> Scan:
    """The scan that `scan` stands for, over the packed nodes of `graphs`.

    Args:
        scan: A name or spec of graph orders, such as "both_ways(degree)", or of scans of any grid, such as "raster"
            (the stored order) and "random(seed=1)".
        graphs: Any.

    Raises:
        ValueError: an unknown order, or one that needs a grid.
    """
    return sample_scan(as_spec(scan), Samples("graph", graphs, graphs.lengths))


@uncompiled
def graph_order(scan: ScanLike, graphs: Graphs) -> Tensor:
    """`graph_scan(scan, graphs).order`, `(k, n)` int64, on the device of the edges: goes into the op as it is.

    Raises:
        ValueError: as `graph_scan` does, or graphs without any node.
    """
    if not graphs.num_nodes:
        raise ValueError("graphs without any node have no order; leave them out")
    return graph_scan(scan, graphs).order.to(graphs.edge_index.device)


def graph_orders(scan: ScanLike, several: Sequence[Graphs]) -> list[Tensor]:
    """`graph_order` of each of several, computed for all of them at once, which is much faster where they are small."""
    sizes = [graphs.num_nodes for graphs in several]
    starts = np.cumsum([0, *sizes])
    edges = [graphs.edge_index.cpu() + int(start) for graphs, start in zip(several, starts, strict=False)]
    ptr = [graphs.ptr[1:].cpu() + int(start) for graphs, start in zip(several, starts, strict=False)]
    order = graph_order(scan, Graphs(torch.cat(edges, dim=1), F.pad(torch.cat(ptr), (1, 0))))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    order = order.gather(1, torch.argsort(owner, dim=1, stable=True))  # a direction may go from the last to the first
    return [part - int(start) for part, start in zip(order.split(sizes, dim=1), starts, strict=False)]


def order_key(scan: ScanLike) -> str:
    """The attribute of a PyG `Data` that holds a prepared order `(k, n)`.

    PyG joins attributes whose name holds "index" along their last axis and counts nodes on from graph to graph, which
    makes of the orders of graphs the order of their batch.
    """
    return f"order_index_{hashlib.sha1(as_spec(scan).encode()).hexdigest()[:8]}"


def sort_nodes(graphs: Graphs, score: Tensor | np.ndarray) -> np.ndarray:
    """Nodes of all graphs, lowest score first within each graph, `(n,)`.

    Args:
        graphs: Any.
        score: `(n,)`. Floats are rounded to a part in 10^7 of the largest in their graph; nodes that are equal then are
            ordered by colour and where they are stored, or by the noise of `graphs`.
    """
    score = score.cpu().numpy() if isinstance(score, Tensor) else score
    batch = graphs.graph_numpy
    if score.dtype.kind == "f":
        largest = np.zeros(len(graphs.lengths))
        np.maximum.at(largest, batch, np.abs(score))
        score = np.rint(score / np.maximum(largest, 1e-300)[batch] * _STEPS)
    return np.lexsort((graphs.tie_rank, score, batch))


@register_graph_order("degree")
def degree(graphs: Graphs) -> np.ndarray:
    """By the number of edges that leave a node, so that hubs come last and see all others. One direction.

    Graph-Mamba (arXiv:2402.00789) without its noise; see `backbones.graph_mamba` for that.
    """
    return sort_nodes(graphs, graphs.degree)


@register_graph_order("colour")
def colour(graphs: Graphs) -> np.ndarray:
    """By colour alone: an order as good as random, but one that does not depend on how nodes are numbered.

    One direction. A model with `ties="random"` draws it anew in every pass: the random orders of Graph-Mamba's code
    ("Permute", "Hybrid" and "Hybrid_Noise" there).
    """
    return sort_nodes(graphs, np.zeros(graphs.num_nodes, dtype=np.int64))


@register_graph_order("eigenvector")
def eigenvector(graphs: Graphs) -> np.ndarray:
    """By eigenvector centrality, the most central node last. One direction.

    100 steps of power iteration on adjacency plus identity; every connected part is scaled to a mean square of 1.
    """
    count, part = graphs.components
    sizes = np.bincount(part, minlength=count)
    v = np.ones(graphs.num_nodes)
    for _ in range(_POWER_STEPS):
        v = graphs.adjacency @ v + v
        v /= np.sqrt(np.bincount(part, v * v, count) / sizes)[part]
    return sort_nodes(graphs, v)


@register_graph_order("pagerank")
def pagerank(graphs: Graphs, damping: float = 0.85) -> np.ndarray:
    """By PageRank along the edges' direction, the highest last. One direction.

    100 steps of power iteration; walks that start anew, or find no way on, go to any node of their graph.
    """
    from scipy.sparse import csr_array

    source, target = graphs.edge_index.cpu().numpy()
    n, batch = graphs.num_nodes, graphs.graph_numpy
    sizes = np.maximum(graphs.lengths, 1)
    out = np.bincount(source, minlength=n)
    walk = csr_array((1 / out[source], (target, source)), shape=(n, n))
    rank = 1 / sizes[batch]
    for _ in range(_POWER_STEPS):
        lost = np.bincount(batch, rank * (out == 0), len(sizes))
        rank = damping * (walk @ rank + (lost / sizes)[batch]) + (1 - damping) / sizes[batch]
    return sort_nodes(graphs, rank)


@register_graph_order("rwse")
def rwse(graphs: Graphs, steps: int = 8) -> np.ndarray:
    """By the sum of a random walk's chances to be back after 1 to `steps` steps, the highest last. One direction.

    The sum of the random-walk structural encodings of arXiv:2110.07875, as an order in Graph-Mamba's code.
    """
    from scipy.sparse import diags_array

    out = np.maximum(np.asarray(graphs.adjacency.sum(axis=1)).reshape(-1), 1)
    walk = (diags_array(1 / out) @ graphs.adjacency).tocsr()
    score = np.zeros(graphs.num_nodes)
    power, earlier = walk, None
    for step in range(1, steps + 1):  # P^(a+b) has the diagonal rowsum(P^a * (P^b)^T): half of the powers are enough
        if step == 1:
            score += walk.diagonal()
            continue
        if step % 2 == 0:
            score += np.asarray((power * power.T).sum(axis=1)).reshape(-1)
        else:
            earlier, power = power, (power @ walk).tocsr()
            score += np.asarray((earlier * power.T).sum(axis=1)).reshape(-1)
    return sort_nodes(graphs, score)


@register_graph_order("bfs")
def bfs(graphs: Graphs) -> np.ndarray:
    """Breadth first from the node with most edges, neighbours with more edges first. One direction.

    Connected parts follow one another, the largest first.
    """
    rank = _rank(graphs, -graphs.degree.cpu().numpy())
    return _by_part(graphs, rank, _breadth_first(graphs, rank))


@register_graph_order("dfs")
def dfs(graphs: Graphs) -> np.ndarray:
    """Depth first from the node with most edges, neighbours with more edges first. One direction.

    Connected parts follow one another, the largest first.
    """
    rank = _rank(graphs, -graphs.degree.cpu().numpy())
    return _by_part(graphs, rank, _depth_first(graphs, rank))


@register_graph_order("rcm")
def rcm(graphs: Graphs) -> np.ndarray:
    """Reverse Cuthill-McKee: neighbours end up near one another. One direction.

    Breadth first from a node with fewest edges, neighbours with fewer edges first, then reversed within each connected
    part (Cuthill and McKee 1969). Not SciPy's, whose sort is not stable, so that its ties differ between machines.
    """
    rank = _rank(graphs, graphs.degree.cpu().numpy())
    return _by_part(graphs, rank, -_breadth_first(graphs, rank))


@register_graph_order("fiedler")
def fiedler(graphs: Graphs) -> np.ndarray:
    """By the slowest wave on each connected part, from one end of the graph to the other. One direction.

    That is the eigenvector of the Laplacian with the smallest eigenvalue above zero. Where there are several, and for
    its sign, the one most like a fixed function of the nodes' colours. Parts follow one another, the largest first.
    """
    count, part = graphs.components
    colours = uniform(hashed(graphs.colours.cpu(), 1)).numpy()
    wave = np.zeros(graphs.num_nodes)
    members = np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part, minlength=count))[:-1])
    for nodes in members:
        if len(nodes) > 2:
            wave[nodes] = _slowest_wave(graphs, nodes, colours[nodes])
    rank = _rank(graphs, np.rint(wave * _STEPS))
    return _by_part(graphs, rank, rank)


@register_graph_order("clusters")
def clusters(graphs: Graphs, resolution: float = 1.0, seed: int = 0) -> np.ndarray:
    """Communities one after another, the largest first; within each by degree, ascending. One direction.

    Louvain communities from networkx, over nodes numbered by their colours.
    """
    import networkx

    rank = _rank(graphs, graphs.degree.cpu().numpy())
    tie = graphs.tie_rank
    offsets, community = graphs.ptr.tolist(), np.zeros(graphs.num_nodes, dtype=np.int64)
    for low, high in pairwise(offsets):
        if low == high:
            continue
        nodes = low + np.argsort(tie[low:high], kind="stable")  # of the new numbers, the old ones
        found = networkx.from_scipy_sparse_array(graphs.adjacency[nodes][:, nodes])
        groups = networkx.algorithms.community.louvain_communities(found, resolution=resolution, seed=seed)
        for i, group in enumerate(sorted(groups, key=lambda group: (-len(group), min(group)))):
            community[nodes[sorted(group)]] = i
    return np.lexsort((rank, community, graphs.graph_numpy))


def _rank(graphs: Graphs, key: np.ndarray) -> np.ndarray:
    """Rank of each node by `key`, then by colour and storage, over all graphs."""
    rank = np.empty(graphs.num_nodes, dtype=np.int64)
    rank[np.lexsort((graphs.tie_rank, key))] = np.arange(graphs.num_nodes)
    return rank


def _by_part(graphs: Graphs, rank: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Nodes by graph, then connected part (the largest first, then that of the lowest rank), then `position`."""
    count, part = graphs.components
    first = np.full(count, graphs.num_nodes)
    np.minimum.at(first, part, rank)
    sizes = np.bincount(part, minlength=count)
    return np.lexsort((position, first[part], -sizes[part], graphs.graph_numpy))


def _neighbours(graphs: Graphs, rank: np.ndarray) -> Any:
    """The adjacency with node i at `rank[i]`, neighbours of a row ascending."""
    old = np.argsort(rank)
    found = graphs.adjacency[old][:, old].tocsr()
    found.sort_indices()
    return found


def _roots(graphs: Graphs, rank: np.ndarray) -> np.ndarray:
    """Lowest rank in each connected part, ascending."""
    count, part = graphs.components
    first = np.full(count, graphs.num_nodes)
    np.minimum.at(first, part, rank)
    return np.sort(first)


def _breadth_first(graphs: Graphs, rank: np.ndarray) -> np.ndarray:
    """When each node is reached, from the lowest rank of every part at once; it compares nodes of one part only."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order

    found, roots, n = _neighbours(graphs, rank), _roots(graphs, rank), graphs.num_nodes
    # One more node, before all others, whose neighbours are the roots: a single search instead of one for each part.
    indices = np.concatenate([found.indices, roots])
    indptr = np.append(found.indptr, len(indices))
    joined = csr_array((np.ones(len(indices)), indices, indptr), shape=(n + 1, n + 1))
    visited = breadth_first_order(joined, n, directed=True, return_predecessors=False)[1:]
    position = np.empty(n, dtype=np.int64)
    position[visited] = np.arange(n)
    return position[rank]


def _depth_first(graphs: Graphs, rank: np.ndarray) -> np.ndarray:
    """When each node is reached going down first; SciPy's own search changed its order between versions."""
    found = _neighbours(graphs, rank)
    indices, indptr = found.indices.tolist(), found.indptr.tolist()
    position = np.full(graphs.num_nodes, -1, dtype=np.int64)
    stack, step = _roots(graphs, rank)[::-1].tolist(), 0
    while stack:
        node = stack.pop()
        if position[node] < 0:
            position[node] = step
            step += 1
            stack += indices[indptr[node] : indptr[node + 1]][::-1]
    return position[rank]


def _slowest_wave(graphs: Graphs, nodes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Of one connected part: the slowest eigenvector most like `colours`, its largest entry 1 in size."""
    from scipy.sparse import csgraph
    from scipy.sparse.linalg import eigsh

    laplacian: Any = csgraph.laplacian(graphs.adjacency[nodes][:, nodes])
    laplacian = laplacian.tocsc()
    if len(nodes) <= _DENSE:
        values, vectors = np.linalg.eigh(laplacian.toarray())
    else:
        start = 1 + colours  # Lanczos from a fixed vector: SciPy's own is random
        values, vectors = eigsh(laplacian, k=4, sigma=-1e-3, which="LM", v0=start)
        vectors, values = vectors[:, np.argsort(values)], np.sort(values)
    space = vectors[:, (values > values[0] + 1e-12) & (values < values[1] * (1 + 1e-6) + 1e-9)]
    space = space if space.shape[1] else vectors[:, 1:2]
    wave = space @ (space.T @ (colours - colours.mean()))
    if np.abs(wave).max() < 1e-6:  # colours do not tell one end from the other: the stored order has to
        position = np.empty(len(nodes))
        position[np.argsort(graphs.tie_rank[nodes], kind="stable")] = np.arange(len(nodes))
        wave = space @ (space.T @ (uniform(hashed(torch.from_numpy(position).long(), 2)).numpy() - 0.5))
    return wave / np.abs(wave).max()

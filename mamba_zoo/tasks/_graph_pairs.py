"""Pairs of nodes: which edges join the same two, and which pairs none joins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def first_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    """For keys `(e,)` of which some may be equal: the number of each `(e,)`, and where each is first `(p,)`, ascending.

    Numbers follow the order in which keys first occur.
    """
    _, number = torch.unique(keys, return_inverse=True)
    first = torch.full((int(number.max()) + 1 if len(keys) else 0,), len(keys))
    first = first.scatter_reduce(0, number, torch.arange(len(keys)), "amin")
    order = first.argsort()
    return order.argsort()[number], first[order]


def pairs_of(edges: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of nodes that each edge joins, in whichever direction.

    Args:
        edges: `(2, e)`.

    Returns: The number of each edge's pair `(e,)`, and for each pair the edge that stands for it `(p,)`: the first from
        the lower node to the higher, or the first if there is none.
    """
    (source, target), count = edges, edges.shape[1]
    upwards = (source > target).argsort(stable=True)  # edges from the lower node come first
    ends = edges.sort(dim=0).values[:, upwards]
    number, first = first_of(ends[0] * (int(edges.max()) + 1 if count else 1) + ends[1])
    stands, order = upwards[first].sort()
    pair = torch.empty(count, dtype=torch.long)
    pair[upwards] = order.argsort()[number]
    return pair, stands


def draw_apart(edges: Tensor, nodes: int, count: int, draw: np.random.Generator) -> Tensor:
    """Pairs of nodes `(2, count)` that no edge joins in any direction, all different; fewer if there are not so many.

    Args:
        edges: `(2, e)`.
        nodes: Nodes of the graph.
        count: Pairs wanted.
        draw: Where they are drawn from.
    """
    low, high = np.sort(edges.numpy(), axis=0)
    # Pairs are numbered 0-1, 0-2, 1-2, 0-3 and so on; the r-th that is free is r and all joined ones before it.
    joined = np.unique((high * (high - 1) // 2 + low)[low < high])
    free = nodes * (nodes - 1) // 2 - len(joined)
    rank = draw.choice(free, min(count, free), replace=False)
    pair = rank + np.searchsorted(joined - np.arange(len(joined)), rank, side="right")
    high = ((1 + np.sqrt(1 + 8 * pair.astype(np.float64))) / 2).astype(np.int64)
    high -= high * (high - 1) // 2 > pair  # where the root was rounded
    high += high * (high + 1) // 2 <= pair
    return torch.from_numpy(np.stack([pair - high * (high - 1) // 2, high]))

"""Neighbourhoods of nodes as sequences of tokens, from far to near (GMN, arXiv:2402.08678, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._graphs import Graphs, hashed, uniform


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """The subgraphs that stand for the tokens of every node.

    Attributes:
        nodes: `(p,)` node of each member of a token.
        token: `(p,)` token that it is a member of, ascending; token `v * tokens + i` is the i-th of node v.
        edge_index: `(2, q)` edges among the members of a token, as places in `nodes`.
        tokens: Of each node; the last one is the node itself.
    """

    nodes: Tensor
    token: Tensor
    edge_index: Tensor
    tokens: int


def neighbourhoods(graphs: Graphs, length: int, walks: int = 4, samples: int = 1, seed: int = 0) -> Neighbourhoods:
    """Tokens of each node: for every walk length from `length` down to 1, `samples` subgraphs; then the node alone.

    A subgraph is induced by the nodes that `walks` random walks of that length from the node come across. Walks follow
    from `seed` and the colours of nodes: they are the same in any batch, and under any numbering as far as colours tell
    nodes apart.

    Args:
        graphs: Any; edges count in both directions.
        length: Longest walk m; 0 makes one token a node.
        walks: Walks M a subgraph.
        samples: Subgraphs s a length.
        seed: Of the walks.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> path = Graphs(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([0, 3]))
        >>> found = neighbourhoods(path, length=1, walks=8)
        >>> found.nodes.tolist(), found.token.tolist(), found.tokens
        ([0, 1, 0, 0, 1, 2, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2, 3, 4, 4, 5], 2)
    """
    if length < 0 or walks < 1 or samples < 1:
        raise ValueError(f"length={length} must be at least 0, and walks={walks} and samples={samples} at least 1")
    n, device = graphs.num_nodes, graphs.edge_index.device
    first, neighbours = _lists(graphs)
    degree = first.diff()
    tokens = length * samples + 1
    node = torch.arange(n, device=device)
    members = [node * tokens * n + (tokens - 1) * n + node]  # keys (token, node) as one number
    for l in range(1, length + 1):
        shape = (n, samples, walks)
        draw = torch.arange(samples * walks, device=device).view(1, samples, walks)
        start = graphs.colours[:, None, None]
        token = (node[:, None] * tokens + (length - l) * samples + torch.arange(samples, device=device))[..., None]
        at = node[:, None, None].expand(shape)
        members.append((token * n + at[..., :1]).flatten())
        for step in range(l):
            pick = (uniform(hashed(start, draw, seed, l, step)) * degree[at]).long()
            # A node without neighbours stays where it is.
            at = torch.where(degree[at] > 0, neighbours[(first[at] + pick).clamp(max=len(neighbours) - 1)], at)
            members.append((token * n + at).flatten())
    keys = torch.cat(members).unique()
    token, nodes = keys // n, keys % n
    place = torch.arange(len(keys), device=device).repeat_interleave(degree[nodes])
    turn = torch.arange(len(place), device=device) - (degree[nodes].cumsum(0) - degree[nodes])[place]
    other = token[place] * n + neighbours[first[nodes[place]] + turn]
    found = torch.searchsorted(keys, other).clamp(max=len(keys) - 1)
    inside = keys[found] == other
    return Neighbourhoods(nodes, token, torch.stack([found[inside], place[inside]]), tokens)


def _lists(graphs: Graphs) -> tuple[Tensor, Tensor]:
    """Neighbours of every node in a row, by colour: where each list begins `(n + 1,)`, and the lists."""
    edges = graphs.edge_index
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    edges = edges[:, edges[0] != edges[1]]
    edges = torch.stack([edges[0] * graphs.num_nodes + edges[1]]).unique()
    source, target = edges // graphs.num_nodes, edges % graphs.num_nodes
    by_colour = torch.argsort(graphs.colours[target], stable=True)
    by_source = by_colour[torch.argsort(source[by_colour], stable=True)]
    counts = torch.bincount(source, minlength=graphs.num_nodes)
    # One more entry, so that there is something to read where no node has neighbours.
    lists = torch.cat([target[by_source], target.new_zeros(1)])
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), lists

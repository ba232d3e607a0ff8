"""Local message passing, and encoders of node, edge and position features, over graphs packed into one list of nodes.

In plain torch, so that graph models need PyTorch Geometric for data only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._init import init_uniform_

# Values of each integer feature: of OGB's molecules, and of those that PyG's `from_smiles` makes.
ATOM_SIZES = {"atom": (119, 5, 12, 12, 10, 6, 6, 2, 2), "smiles": (119, 9, 11, 12, 9, 5, 8, 2, 2)}
BOND_SIZES = {"bond": (5, 6, 2), "smiles": (22, 6, 2)}


class GatedGCN(nn.Module):
    """Gated graph convolution with a stream of edge features (arXiv:1711.07553), as GraphGPS runs it.

    `x' = x + relu(norm(A x + sum(s * B x_source) / (sum(s) + 1e-6)))` over the edges that enter a node, with gates
    `s = sigmoid(e')`; `e' = D x_target + E x_source + C e`, and edges go on as `e + relu(norm(e'))`.

    Args:
        dim: Channels of nodes and edges.
        dropout: Of both updates.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    edges = True

    def __init__(self, dim: int, dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(dim, dim, **dd) for _ in range(5))
        self.norm_x, self.norm_e = nn.BatchNorm1d(dim, **dd), nn.BatchNorm1d(dim, **dd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nodes `(n, d)` and edges `(e, d)` to both, updated."""
        assert edges is not None
        source, target = edge_index
        arrived = self.D(x)[target] + self.E(x)[source] + self.C(edges)
        gate = torch.sigmoid(arrived)
        total = x.new_zeros(x.shape).index_add(0, target, (gate * self.B(x)[source]).to(x.dtype))
        weight = x.new_zeros(x.shape).index_add(0, target, gate.to(x.dtype))
        y = self.A(x) + total / (weight + 1e-6)
        return x + self.dropout(F.relu(self.norm_x(y))), edges + self.dropout(F.relu(_norm(self.norm_e, arrived)))


class GCN(nn.Module):
    """Graph convolution with self-loops and symmetric normalisation (arXiv:1609.02907), added to its input.

    Args:
        dim: Channels.
        dropout: Of the update.
        residual: Whether the input is added.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    edges = False

    def __init__(self, dim: int, dropout: float = 0.0, residual: bool = True, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.dropout, self.residual = nn.Dropout(dropout), residual

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Nodes `(n, d)` to `(n, d)`; edges pass through."""
        y = self.dropout(F.relu(propagate(self.linear(x), edge_index)))
        return (x + y if self.residual else y), edges


class GIN(nn.Module):
    """Graph isomorphism layer with edge features (arXiv:1905.12265), added to its input.

    `x + mlp((1 + eps) x + sum(relu(x_source + e)))` over the edges that enter a node.

    Args:
        dim: Channels of nodes and edges.
        dropout: Of the update.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    edges = True

    def __init__(self, dim: int, dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.eps = nn.Parameter(torch.zeros((), **dd))
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim, **dd), nn.BatchNorm1d(2 * dim, **dd), nn.ReLU(), nn.Linear(2 * dim, dim, **dd)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Nodes `(n, d)` and edges `(e, d)` to updated nodes; edges pass through."""
        source, target = edge_index
        message = x[source] if edges is None else F.relu(x[source] + edges)
        total = torch.zeros_like(x).index_add(0, target, message.to(x.dtype))
        return x + self.dropout(self.mlp((1 + self.eps) * x + total)), edges


LOCAL = {"gated": GatedGCN, "gcn": GCN, "gin": GIN}


def propagate(x: Tensor, edge_index: Tensor, steps: int = 1, keep: float = 0.0) -> Tensor:
    """`x <- (1 - keep) D^-1/2 (A + I) D^-1/2 x + keep x_0` for nodes `(n, d)`, over and over.

    With one step and `keep=0` this is the smoothing of GCN (arXiv:1609.02907); with more, personalised PageRank in the
    manner of APPNP (arXiv:1810.05997).

    Args:
        x: Nodes.
        edge_index: `(2, e)`; loops are left out, and one is added to each node.
        steps: How often.
        keep: Part of the first `x` that is mixed in again at each step.
    """
    source, target = edge_index
    other = source != target
    source, target = source[other], target[other]
    scale = (1 + torch.bincount(target, minlength=len(x))).to(x.dtype).rsqrt()[:, None]
    start = x
    for _ in range(steps):
        y = scale * x
        x = scale * y.index_add(0, target, y[source])
        x = x if keep == 0 else (1 - keep) * x + keep * start
    return x


class Sum(nn.Module):
    """The sum of one embedding for each integer feature, as of atoms and bonds.

    Args:
        sizes: Values of each feature.
        dim: Channels.
        device: Of the tables.
        dtype: Of the tables.
    """

    def __init__(self, sizes: Sequence[int], dim: int, device=None, dtype=None):
        super().__init__()
        tables = [nn.Embedding(size, dim, device=device, dtype=dtype) for size in sizes]
        for table in tables:
            nn.init.xavier_uniform_(table.weight)
        self.sizes, self.tables = tuple(sizes), nn.ModuleList(tables)

    def forward(self, x: Tensor) -> Tensor:
        """Integers `(n, features)` to `(n, dim)`."""
        if x.dim() != 2 or x.shape[1] != len(self.tables) or x.is_floating_point():
            raise ValueError(f"expected integers (n, {len(self.tables)}), not {x.dtype} {tuple(x.shape)}")
        if not x.is_cuda:  # there, the look would wait for the device
            for i, (size, column) in enumerate(zip(self.sizes, x.unbind(1), strict=True)):
                if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
                    found = f"{int(column.min())} to {int(column.max())}"
                    raise ValueError(f"integer feature {i} holds {found}, but must be below {size}")
        parts = [table(column) for table, column in zip(self.tables, x.unbind(1), strict=True)]
        return torch.stack(parts).sum(0)


class EveryEdge(nn.Module):
    """One learned vector for every edge, where edges have no features."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))
        init_uniform_(self.weight, 1)

    def forward(self, edges: int) -> Tensor:
        """`(edges, dim)`."""
        return self.weight.expand(edges, -1)


class LaplacianPE(nn.Module):
    """Positions from Laplacian eigenvectors, a small DeepSet over frequencies, as in GraphGPS (arXiv:2205.12454).

    Reads `EigVecs (n, f)` and `EigVals (n, f, 1)`, as `mamba_zoo.graphs.AddLaplacian` makes them; NaN where a graph has
    fewer nodes than frequencies. In training, the signs of eigenvectors are drawn at random.

    Args:
        dim: Channels.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    needs = ("EigVecs", "EigVals")

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.fc1, self.fc2 = nn.Linear(2, 2 * dim, **dd), nn.Linear(2 * dim, dim, **dd)

    def forward(self, vectors: Tensor, values: Tensor) -> Tensor:
        """Entries `(n, f)` and eigenvalues `(n, f, 1)` to `(n, dim)`."""
        if self.training:
            vectors = vectors * (torch.randint(0, 2, vectors.shape[1:], device=vectors.device) * 2 - 1)
        pairs = torch.stack([vectors, values.squeeze(-1)], dim=-1)
        absent = pairs.isnan().any(-1, keepdim=True)
        y = self.fc1(pairs.masked_fill(pairs.isnan(), 0).to(self.fc1.weight.dtype))
        return F.relu(self.fc2(F.relu(y))).masked_fill(absent, 0).sum(1)


class RandomWalkPE(nn.Module):
    """Positions from a random walk's chances to be back, normed and mapped linearly (arXiv:2110.07875).

    Reads `random_walk_pe (n, steps)`, as PyG's `AddRandomWalkPE` makes it.

    Args:
        dim: Channels.
        steps: Of the walk.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    needs = ("random_walk_pe",)

    def __init__(self, dim: int, steps: int, device=None, dtype=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(steps, device=device, dtype=dtype)
        self.linear = nn.Linear(steps, dim, device=device, dtype=dtype)

    def forward(self, chances: Tensor) -> Tensor:
        """`(n, steps)` to `(n, dim)`."""
        return self.linear(self.norm(chances.to(self.linear.weight.dtype)))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of what may be nothing: in training, batch norm refuses to have no rows."""
    return norm(x) if len(x) > 1 or not norm.training else x

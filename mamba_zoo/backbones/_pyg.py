"""What needs PyTorch Geometric: transforms that prepare data, Mamba inside its `GPSConv`, and a test of numbering."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import Graphs, ScanLike, as_spec, graph_order
from ..scans.graph import order_key
from ._mixer import Mamba
from ._ssm import resolve_scan

try:
    from torch_geometric.data import Data
    from torch_geometric.nn import GPSConv, MessagePassing
    from torch_geometric.transforms import BaseTransform
except ImportError as error:  # one that is installed but broken, too
    raise ModuleNotFoundError(
        "graph data and layers need PyTorch Geometric; install it with: pip install 'mamba_zoo[graph]'"
    ) from error


class AddOrder(BaseTransform):
    """Store the visiting order of each graph's nodes, so that models need not compute it again at every pass.

    `Batch` joins the orders of graphs by itself. A model whose `scan` is the same takes it; it goes stale when edges
    change afterwards.

    Args:
        scan: As the model's.
    """

    def __init__(self, scan: ScanLike = "degree"):
        self.scan = as_spec(scan)

    def forward(self, data: Any) -> Any:
        """A copy of `data` with the order `(k, n)`."""
        data[order_key(self.scan)] = graph_order(self.scan, Graphs.of(data)).int()
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.scan!r})"


class AddLaplacian(BaseTransform):
    """Smallest eigenvalues and eigenvectors of the Laplacian `D - A`, as GraphGPS prepares them.

    PyG's `AddLaplacianEigenvectorPE` leaves out the eigenvalues and the constant vector, which the published models
    read. Adds `EigVals (n, f, 1)` and `EigVecs (n, f)`, each vector of length 1; NaN where a graph has fewer nodes.

    Args:
        frequencies: How many, f.
    """

    def __init__(self, frequencies: int = 10):
        self.frequencies = frequencies

    def forward(self, data: Any) -> Any:
        """A copy of `data` with both."""
        adjacency = Graphs.of(data).adjacency
        n, f = adjacency.shape[0], self.frequencies
        laplacian = np.diag(np.asarray(adjacency.sum(axis=1)).reshape(-1)) - adjacency.toarray()
        values, vectors = np.linalg.eigh(laplacian)
        found = min(n, f)
        data.EigVals = torch.full((n, f, 1), float("nan"))
        data.EigVecs = torch.full((n, f), float("nan"))
        data.EigVals[:, :found, 0] = torch.from_numpy(values[:found]).float().clamp(min=0)
        data.EigVecs[:, :found] = torch.from_numpy(vectors[:, :found]).float()
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.frequencies})"


class MambaGPSConv(GPSConv):
    """PyG's `GPSConv` with a Mamba mixer in place of attention: linear in the number of nodes, nothing padded.

    Args:
        channels: Width.
        conv: Message passing layer of PyG; None leaves it out.
        scan: Order of the nodes, as for `GraphMamba`.
        dropout: After each part.
        act: As for `GPSConv`.
        act_kwargs: As for `GPSConv`.
        norm: As for `GPSConv`.
        norm_kwargs: As for `GPSConv`.
        d_state: States n.
        d_conv: Taps of the mixer's convolution.
        expand: Inner width of the mixer in units of `channels`.
    """

    def __init__(
        self,
        channels: int,
        conv: MessagePassing | None,
        scan: ScanLike = "degree",
        dropout: float = 0.0,
        act: str = "relu",
        act_kwargs: dict[str, Any] | None = None,
        norm: str | None = "batch_norm",
        norm_kwargs: dict[str, Any] | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 1,
    ):
        super().__init__(channels, conv, 1, dropout, act, act_kwargs, norm, norm_kwargs)
        self.scan, k = resolve_scan(scan, 1)
        if not k:
            raise ValueError("scan='none' leaves MambaGPSConv without a mixer; use the message passing layer alone")
        self.attn_type = "mamba"
        self._made = (channels, d_state, d_conv, expand, "auto", k)
        self.attn: nn.Module = Mamba(*self._made)

    def reset_parameters(self) -> None:
        """New parameters for everything."""
        attention, self.attn = self.attn, nn.MultiheadAttention(self.channels, 1)  # the parent resets one
        super().reset_parameters()
        device, dtype = attention.in_proj.weight.device, attention.in_proj.weight.dtype  # type: ignore[union-attr]
        self.attn = Mamba(*self._made, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, edge_index: Any, batch: Tensor | None = None, order: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Nodes `(n, channels)` to the same.

        Args:
            x: Nodes.
            edge_index: `(2, e)`.
            batch: Graph of each node, ascending; None is one graph.
            order: `(k, n)`, as `AddOrder` prepares it; None computes it from `scan`.
            kwargs: For the message passing layer, such as `edge_attr`.
        """
        graphs = Graphs.of(Data(x=x, edge_index=edge_index, batch=batch))
        order = graph_order(self.scan, graphs) if order is None else order
        h = F.dropout(self.attn(x[None], order, graphs.ptr)[0], self.dropout, self.training)
        out = self._normed(self.norm2, x + h, batch)
        if self.conv is not None:
            h = F.dropout(self.conv(x, edge_index, **kwargs), self.dropout, self.training)
            out = out + self._normed(self.norm1, x + h, batch)
        return self._normed(self.norm3, out + self.mlp(out), batch)

    def _normed(self, norm: nn.Module | None, x: Tensor, batch: Tensor | None) -> Tensor:
        if norm is None:
            return x
        return norm(x, batch=batch) if self.norm_with_batch else norm(x)


def relabelled(data: Any, permutation: Tensor) -> Any:
    """A copy of PyG `Data` or `Batch` whose node i is stored at `permutation[i]`; prepared orders are left out.

    Args:
        data: Graphs.
        permutation: `(n,)`; nodes of a batch stay within their graph.
    """
    found = copy.copy(data)
    inverse = torch.empty_like(permutation).scatter(0, permutation, torch.arange(len(permutation)))
    for key, value in data.to_dict().items():
        if key.startswith("order_index_"):
            del found[key]
        elif key in ("edge_index", "edge_label_index"):
            found[key] = permutation[value]
        elif key not in ("ptr", "batch") and isinstance(value, Tensor) and data.is_node_attr(key):
            found[key] = value[inverse]
    return found


@torch.no_grad()
def relabelling_sensitivity(model: nn.Module, data: Any, draws: int = 5, seed: int = 0) -> float:
    """How much a model's output depends on how nodes are numbered: 0 is not at all.

    The mean over random renumberings of `||f(renumbered) - f(data)|| / ||f(data)||`, in evaluation mode, rows of nodes
    compared with those of the same nodes. Everything the order of nodes decides goes into it: ties broken by where a
    node is stored, orders that do not depend on the graph, and random orders drawn anew at each pass.

    Args:
        model: Takes PyG data; returns a row for every graph or for every node.
        data: `Data` or `Batch` on the CPU.
        draws: Renumberings.
        seed: Of the renumberings.
    """
    graphs, generator = Graphs.of(data), torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        base, found = model(data).double(), []
        per_node = len(base) == graphs.num_nodes and graphs.num_nodes != len(graphs.lengths)
        for _ in range(draws):
            shuffled = torch.rand(graphs.num_nodes, generator=generator)
            within = torch.argsort(shuffled)
            permutation = within[torch.argsort(graphs.batch[within], stable=True)]
            y = model(relabelled(data, permutation)).double()
            found.append(((y[permutation] if per_node else y) - base).norm() / base.norm())
    finally:
        model.train(was_training)
    return float(torch.stack(found).mean())

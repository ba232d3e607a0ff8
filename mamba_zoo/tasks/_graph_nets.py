"""The networks of graph tasks: models of the zoo, and the baselines that they are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import mamba_zoo

from ..backbones._graph import GraphModel
from ..backbones._graph_layers import propagate
from ..backbones.graph_mamba import RESTART, NodeEncoder, edge_encoder, encode_edges
from ..scans import Graphs

BASELINES = ("gcn", "gin", "gps")


def build_graph_model(
    name: str, scan: str | None, level: str, num_classes: int, told: Mapping[str, Any], options: Mapping[str, Any]
) -> nn.Module:
    """A graph model of the zoo, or a baseline.

    Args:
        name: As in `list_models(modality="graph")`, or one of `BASELINES`.
        scan: Order of the nodes; None is the model's own. Baselines have none.
        level: "graph", "node" or "edge".
        num_classes: Outputs.
        told: What follows from the data.
        options: Further arguments of the model; they come before what was told.

    Raises:
        ValueError: an unknown name, or a scan for a baseline.
        TypeError: an argument that the model does not take.
    """
    common: dict[str, Any] = {"level": level, "num_classes": num_classes, **told, **options}
    if name not in BASELINES:
        order: dict[str, Any] = {} if scan is None else {"scan": scan}
        return mamba_zoo.create_model(name, **common, **order)
    if scan not in (None, "none"):
        raise ValueError(f"{name} reads nodes in no order; leave scan={scan!r} out")
    known = inspect.signature(GraphBaseline).parameters
    if odd := [key for key in options if key not in known]:
        raise TypeError(f"{name} takes no argument {odd[0]!r}; it takes {', '.join(known)}")
    return GraphBaseline(name, **common)


class GraphBaseline(GraphModel):
    """PyG's GCN, GIN or GPS with attention, between the encoders and the head of our own graph models.

    Args:
        kind: "gcn" (arXiv:1609.02907), "gin" (arXiv:1810.00826, with edge features arXiv:1905.12265) or "gps"
            (arXiv:2205.12454): GIN beside attention over all nodes of a graph.
        in_chans: Node features.
        num_classes: Outputs.
        level: "graph", "node" or "edge".
        global_pool: "mean", "add" or "max".
        dim: Width.
        depth: Layers.
        heads: Of attention.
        local: Message passing beside attention: "gin" or "gcn".
        encoder: As for `GraphMamba`.
        edges: As for `GraphMamba`.
        edge_chans: As for `GraphMamba`.
        pe: As for `GraphMamba`.
        pe_dim: As for `GraphMamba`.
        pe_steps: As for `GraphMamba`.
        smooth: As for `GraphMamba`.
        head_layers: As for `GraphMamba`.
        input_drop: Dropout of the node features.
        drop_rate: Dropout in the layers and the head.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        kind: str,
        in_chans: int = 16,
        num_classes: int = 10,
        level: str = "graph",
        global_pool: str = "mean",
        dim: int = 64,
        depth: int = 3,
        heads: int = 4,
        local: str = "gin",
        encoder: str = "linear",
        edges: str = "none",
        edge_chans: int = 1,
        pe: str = "none",
        pe_dim: int = 16,
        pe_steps: int = 16,
        smooth: int = 0,
        head_layers: int = 1,
        input_drop: float = 0.0,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        from torch_geometric.nn import GPSConv

        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, num_classes, level, global_pool, head_layers, False, drop_rate, **dd)
        self.smooth = smooth
        self.kind, self.uses_edges = kind, kind == "gin" or (kind == "gps" and local == "gin")
        self.encoder = NodeEncoder(in_chans, dim, encoder, pe, pe_dim, pe_steps, False, input_drop, **dd)
        self.edge_encoder = edge_encoder(edges, edge_chans, dim, **dd) if self.uses_edges else None
        self.dropout = nn.Dropout(drop_rate)
        if kind == "gps":
            layers: list[nn.Module] = [
                GPSConv(dim, _convolution(local, dim), heads, drop_rate, attn_kwargs={"dropout": drop_rate})
                for _ in range(depth)
            ]
        else:
            layers = [_convolution(kind, dim) for _ in range(depth)]
        self.layers = nn.ModuleList(layers)
        norms = [nn.BatchNorm1d(dim, **dd) for _ in range(depth)] if kind == "gin" else []
        self.norms = nn.ModuleList(norms)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward_features(self, data: Any) -> Tensor:
        """Nodes of PyG data to `(n, dim)`."""
        x = self.encoder(data)
        edges = {} if self.edge_encoder is None else {"edge_attr": encode_edges(self.edge_encoder, data)}
        batch = Graphs.of(data).batch
        for i, layer in enumerate(self.layers):
            if self.kind == "gps":
                x = layer(x, data.edge_index, batch, **edges)
            elif self.kind == "gin":
                x = self.dropout(F.relu(self.norms[i](layer(x, data.edge_index, **edges))))
            else:
                x = self.dropout(F.relu(layer(x, data.edge_index)))
        return propagate(x, data.edge_index, self.smooth, RESTART) if self.smooth else x


def _convolution(kind: str, dim: int) -> Any:
    from torch_geometric.nn import GCNConv, GINEConv

    if kind == "gcn":
        return GCNConv(dim, dim)
    if kind == "gin":
        mlp = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim))
        return GINEConv(mlp, train_eps=True)
    raise ValueError(f"local={kind!r} is unknown; choose 'gcn' or 'gin'")

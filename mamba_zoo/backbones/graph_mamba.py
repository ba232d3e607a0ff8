"""Graph-Mamba: local message passing and a scan over ordered nodes, side by side. Wang et al. 2024, arXiv:2402.00789.

Follows the arithmetic of bowang-lab/Graph-Mamba@acb4a2321d46 graphgps/layer/gps_layer.py and network/gps_model.py (no
licence stated), which builds on GraphGPS (arXiv:2205.12454). Packed graphs go straight into the op, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import Graphs, ScanLike
from ._graph import GraphModel, Orders, Visit, node_norm, read_nodes, visits_of
from ._graph_layers import ATOM_SIZES, BOND_SIZES, LOCAL, EveryEdge, LaplacianPE, RandomWalkPE, Sum, propagate
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._ssm import resolve_scan

PE = ("none", "lap", "rwse")
RESTART = 0.1


class GraphMambaLayer(nn.Module):
    """Message passing and a Mamba mixer read the same nodes; their sum goes through an MLP.

    Args:
        dim: Width.
        d_state: States n.
        d_conv: Taps of the mixer's convolution.
        expand: Inner width of the mixer in units of `dim`.
        k: Directions of the scan; 0 leaves the scan out, and the mixer then sees one node at a time.
        local: "gated", "gcn", "gin" or "none".
        norm: "batch", "layer" or "none", after each of the three parts.
        dropout: Of each part.
        reduce: "sum" or "mean" over directions.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown `local` or `norm`.
    """

    def __init__(
        self,
        dim: int = 64,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 1,
        k: int = 1,
        local: str = "gated",
        norm: str = "batch",
        dropout: float = 0.0,
        reduce: str = "sum",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if local != "none" and local not in LOCAL:
            raise ValueError(f"local={local!r} is unknown; choose one of {(*LOCAL, 'none')}")
        self.local = LOCAL[local](dim, dropout, **dd) if local != "none" else None
        self.norm_local = node_norm(norm, dim, **dd) if self.local is not None else None
        # Without a scan there is no order, so that the convolution must not mix nodes either.
        taps = d_conv if k else 1
        self.mixer = Mamba(dim, d_state, taps, expand, k=max(k, 1), reduce=reduce, ssm=k > 0, **dd)
        self.norm_mixer = node_norm(norm, dim, **dd)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim, **dd), nn.Linear(2 * dim, dim, **dd)
        self.norm = node_norm(norm, dim, **dd)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, edge_index: Tensor, edges: Tensor | None, visits: Sequence[Visit]
    ) -> tuple[Tensor, Tensor | None]:
        """Nodes `(n, d)` and edges `(e, d)` to both, updated; the mixer's results are averaged over `visits`."""
        mixed = torch.stack([visit.mix(self.mixer, x) for visit in visits]).mean(0)
        y = self.norm_mixer(x + self.dropout(mixed))
        if self.local is not None and self.norm_local is not None:
            near, edges = self.local(x, edge_index, edges)
            y = y + self.norm_local(near)
        return self.norm(y + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(y)))))), edges


class NodeEncoder(nn.Module):
    """Node features, and positions beside them, to the width of the model.

    Args:
        in_chans: Node features; ignored for atoms.
        dim: Width.
        kind: "linear", "atom" for the nine integers of OGB molecules, or "smiles" for those of PyG's.
        pe: "none", "lap" or "rwse".
        pe_dim: Part of the width that positions take.
        pe_steps: Steps of the random walk, for "rwse".
        norm: Whether a batch norm follows.
        drop: Dropout of the features; of their embedding, for atoms.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, in_chans: int, dim: int, kind: str, pe: str, pe_dim: int, pe_steps: int, norm: bool, drop: float = 0.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if kind not in ("linear", *ATOM_SIZES) or pe not in PE:
            raise ValueError(f"encoder={kind!r} must be one of {('linear', *ATOM_SIZES)}, and pe={pe!r} one of {PE}")
        own = dim - (pe_dim if pe != "none" else 0)
        self.in_chans, self.kind = in_chans, kind
        self.x = nn.Linear(in_chans, own, **dd) if kind == "linear" else Sum(ATOM_SIZES[kind], own, **dd)
        made = {"lap": lambda: LaplacianPE(pe_dim, **dd), "rwse": lambda: RandomWalkPE(pe_dim, pe_steps, **dd)}
        self.pe = made[pe]() if pe != "none" else None
        self.norm = nn.BatchNorm1d(dim, **dd) if norm else None
        self.drop = nn.Dropout(drop)

    def forward(self, data: Any) -> Tensor:
        """Nodes of PyG data to `(n, dim)`."""
        (x,) = read_nodes(data, ["x"], "give node features, or PyG's transform Constant or OneHotDegree")
        if not len(x):
            raise ValueError("the data have no nodes; graphs of a batch may be empty, but not all of them")
        if isinstance(self.x, nn.Linear):
            if x.dim() != 2 or x.shape[1] != self.in_chans:
                raise ValueError(f"x has shape {tuple(x.shape)}, but the model was made for in_chans={self.in_chans}")
            x = self.x(self.drop(x.to(self.x.weight.dtype)))
        else:
            x = self.drop(self.x(x))
        if self.pe is not None:
            hint = "add it once with mamba_zoo.graphs.AddLaplacian or PyG's AddRandomWalkPE as pre_transform"
            x = torch.cat([x, self.pe(*read_nodes(data, self.pe.needs, hint))], dim=1)
        return x if self.norm is None else self.norm(x)


class GraphMamba(GraphModel):
    """Graph-Mamba over PyG `Data` or `Batch`; every graph is a sequence of its nodes, packed without padding.

    Args:
        in_chans: Node features.
        num_classes: Outputs; 0 returns what the classifier would read.
        level: "graph", "node" or "edge", see `GraphModel`.
        global_pool: "mean", "add" or "max" of the nodes of a graph.
        dim: Width.
        depth: Layers.
        d_state: States n.
        d_conv: Taps of the mixer's convolution.
        expand: Inner width of the mixer in units of `dim`.
        scan: Order of the nodes: a graph order such as "degree", a spec such as "both_ways(rcm)", or "none" for a model
            without scans, as a control. An order that `AddOrder` prepared is taken from the data.
        local: Message passing: "gated" (published), "gcn", "gin" or "none".
        encoder: "linear", "atom" for the nine integers of OGB molecules, or "smiles" for those of PyG's MoleculeNet.
        edges: Edge features: "linear", "bond" or "smiles" for the three integers of either's molecules, or "none" for
            edges all alike.
        edge_chans: Edge features read by "linear".
        pe: Positions beside the features: "none", "lap" (Laplacian eigenvectors) or "rwse" (random walks).
        pe_dim: Part of the width that positions take.
        pe_steps: Steps of the random walk.
        encoder_norm: Batch norm after the node encoder.
        pre_layers: Layers between encoder and first layer: linear, batch norm, ReLU, rows scaled to length 1.
        smooth: Steps of personalised PageRank over the nodes before the head (APPNP, arXiv:1810.05997), for graphs
            whose neighbours are alike and whose labels are few. 0 is published.
        head_layers: Linear layers of the head.
        head_l2_norm: Scale rows to length 1 within the head, as the published models do.
        norm: "batch", "layer" or "none".
        reduce: "sum" or "mean" over directions.
        ties: "fixed", the same order at all times; "random", as published, draws the order among nodes of equal rank
            anew in every training pass and layer.
        buckets: Random groups that every graph's nodes are split into, each a sequence of its own; 3 in published
            models of large graphs.
        num_order_samples: Orders that evaluation averages the mixers over. Published models take 5; 1 is a fifth of
            their cost, and with `buckets=1` the order with fixed ties.
        order_seed: Of the orders in evaluation, which follow from it and each graph alone; None draws anew each time,
            as the published code does, so that no two evaluations agree.
        input_drop: Dropout of the node features.
        drop_rate: Dropout in the layers and the head.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown order or setting.
    """

    def __init__(
        self,
        in_chans: int = 16,
        num_classes: int = 10,
        level: str = "graph",
        global_pool: str = "mean",
        dim: int = 64,
        depth: int = 3,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 1,
        scan: ScanLike = "degree",
        local: str = "gated",
        encoder: str = "linear",
        edges: str = "none",
        edge_chans: int = 1,
        pe: str = "none",
        pe_dim: int = 16,
        pe_steps: int = 16,
        encoder_norm: bool = False,
        pre_layers: int = 0,
        smooth: int = 0,
        head_layers: int = 1,
        head_l2_norm: bool = False,
        norm: str = "batch",
        reduce: str = "sum",
        ties: str = "fixed",
        buckets: int = 1,
        num_order_samples: int = 1,
        order_seed: int | None = 0,
        input_drop: float = 0.0,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, num_classes, level, global_pool, head_layers, head_l2_norm, drop_rate, **dd)
        spec, k = resolve_scan(scan, 1)
        self.in_chans, self.scan, self.smooth = in_chans, spec, smooth
        self.orders = Orders(spec, ties, buckets, num_order_samples, order_seed)
        self.encoder = NodeEncoder(in_chans, dim, encoder, pe, pe_dim, pe_steps, encoder_norm, input_drop, **dd)
        self.edge_encoder = edge_encoder(edges, edge_chans, dim, **dd) if local in ("gated", "gin") else None
        self.pre = nn.ModuleList(PreLayer(dim, **dd) for _ in range(pre_layers))
        self.layers = nn.ModuleList(
            GraphMambaLayer(dim, d_state, d_conv, expand, k, local, norm, drop_rate, reduce, **dd) for _ in range(depth)
        )

    def visits(self, data: Any, graphs: Graphs) -> list[list[Visit]]:
        """For each layer, the ways it visits the nodes."""
        if self.scan == "none":
            return [[Visit(None, graphs.ptr)]] * len(self.layers)
        return self.orders.draw(data, graphs, len(self.layers), self.training)

    def forward_features(self, data: Any, visits: Sequence[Sequence[Visit]] | None = None) -> Tensor:
        """Nodes of PyG data to `(n, dim)`.

        Args:
            data: `Data` or `Batch` with `x`, `edge_index` and what the encoders read.
            visits: For each layer, the visits to average; None makes them from `scan`.
        """
        graphs = Graphs.of(data)
        visits = self.visits(data, graphs) if visits is None else visits_of(visits, len(self.layers))
        x = self.encoder(data)
        for layer in self.pre:
            x = layer(x)
        edges = None if self.edge_encoder is None else encode_edges(self.edge_encoder, data)
        for layer, several in zip(self.layers, visits, strict=True):
            x, edges = self._run(layer, x, graphs.edge_index, edges, several)
        return propagate(x, graphs.edge_index, self.smooth, RESTART) if self.smooth else x


class PreLayer(nn.Module):
    """Linear without bias, batch norm, ReLU, rows scaled to length 1: GraphGym's layer before message passing."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, d)` to `(n, d)`."""
        return F.normalize(F.relu(self.norm(self.linear(x))), dim=-1)


def edge_encoder(kind: str, in_chans: int, dim: int, **dd: Any) -> nn.Module:
    """The module that `encode_edges` runs.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind in BOND_SIZES:
        return Sum(BOND_SIZES[kind], dim, **dd)
    if kind == "linear":
        return nn.Linear(in_chans, dim, **dd)
    if kind == "none":
        return EveryEdge(dim, **dd)
    raise ValueError(f"edges={kind!r} is unknown; choose 'linear', 'bond', 'smiles' or 'none'")


def encode_edges(encoder: nn.Module, data: Any) -> Tensor:
    """Edges of PyG data to `(e, dim)`.

    Raises:
        ValueError: no edge features where the model reads them, or another number.
    """
    if isinstance(encoder, EveryEdge):
        return encoder(data.edge_index.shape[1])
    (features,) = read_nodes(data, ["edge_attr"], "build the model with edges='none' for edges all alike")
    if isinstance(encoder, nn.Linear):
        features = (features if features.dim() == 2 else features[:, None]).to(encoder.weight.dtype)
        if features.shape[1] != encoder.in_features:
            raise ValueError(f"edge_attr has {features.shape[1]} features, the model edge_chans={encoder.in_features}")
    return encoder(features)


_LAYER = r"^(layers\.\d+\.|)"
KEYS = [
    Key(rf"{_LAYER}local_model\.bn_node_x\.", r"\1local.norm_x."),
    Key(rf"{_LAYER}local_model\.bn_edge_e\.", r"\1local.norm_e."),
    Key(rf"{_LAYER}local_model\.", r"\1local."),
    Key(rf"{_LAYER}norm1_local\.", r"\1norm_local."),
    Key(rf"{_LAYER}norm1_attn\.", r"\1norm_mixer."),
    Key(rf"{_LAYER}norm2\.", r"\1norm."),
    Key(rf"{_LAYER}ff_linear([12])\.", r"\1fc\2."),
    Key(rf"{_LAYER}self_attn\.A_log$", r"\1mixer.ssm.A_log", 0),
    Key(rf"{_LAYER}self_attn\.D$", r"\1mixer.ssm.D", 0),
    Key(rf"{_LAYER}self_attn\.conv1d\.weight$", r"\1mixer.conv.weight", 0, lambda weight: weight.squeeze(1)),
    Key(rf"{_LAYER}self_attn\.conv1d\.bias$", r"\1mixer.conv.bias", 0),
    Key(rf"{_LAYER}self_attn\.x_proj\.weight$", r"\1mixer.ssm.x_proj.weight", 0),
    Key(rf"{_LAYER}self_attn\.dt_proj\.weight$", r"\1mixer.ssm.dt_proj.weight", 0),
    Key(rf"{_LAYER}self_attn\.dt_proj\.bias$", r"\1mixer.ssm.dt_bias", 0),
    Key(rf"{_LAYER}self_attn\.", r"\1mixer."),
    Key(r"^encoder\.node_encoder_bn\.bn\.", "encoder.norm."),
    Key(r"^encoder\.edge_encoder\.bond_embedding_list\.", "edge_encoder.tables."),
    Key(r"^encoder\.edge_encoder\.encoder\.", "edge_encoder."),
    Key(r"^encoder\.node_encoder\.(encoder1\.)?atom_embedding_list\.", "encoder.x.tables."),
    Key(r"^encoder\.node_encoder\.(encoder2\.)?linear_A\.", "encoder.pe.fc1."),
    Key(r"^encoder\.node_encoder\.(encoder2\.)?pe_encoder\.1\.", "encoder.pe.fc2."),
    Key(r"^encoder\.node_encoder\.(encoder1\.encoder|encoder|linear_x)\.", "encoder.x."),
    Key(r"^pre_mp\.Layer_(\d+)\.layer\.model\.", r"pre.\1.linear."),
    Key(r"^pre_mp\.Layer_(\d+)\.post_layer\.0\.", r"pre.\1.norm."),
    Key(r"^post_mp\.layer_post_mp\.model\.0\.Layer_(\d+)\.layer\.model\.", r"head.hidden.\1."),
    Key(r"^post_mp\.layer_post_mp\.model\.[01]\.model\.", "head.fc."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names; weights that were trained with random ties are evaluated as published.

    That is averaged over 5 orders, which here follow from a seed. Set `model.orders.samples` for another number.
    """
    published = any(name.startswith("post_mp.") for name in state_dict)
    if published and isinstance(model, GraphMamba) and model.orders.ties == "random":
        model.orders.samples = 5
    return rename(state_dict, KEYS)


_SOURCE = "bowang-lab/Graph-Mamba@acb4a2321d46 graphgps/network/gps_model.py"
_CFG: dict[str, Any] = {"num_classes": -1, "input_size": None, "classifier": "head.fc", "first_conv": "encoder.x"}


def _card(params: int, notes: str, source: str = _SOURCE, license: str = "unlicensed") -> Card:
    return Card("graph", source, license, "2402.00789", params, notes=notes)


def _build(name: str, pretrained: bool, **kwargs: Any) -> GraphMamba:
    return build_model(GraphMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


def _published(kwargs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"ties": "random", "head_l2_norm": True, **settings, **kwargs}


@register(_card(164_810, "For graphs of one's own.", "mamba_zoo", "Apache-2.0"), **_CFG)
def graph_mamba(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """Graph-Mamba with the defaults of this package: linear encoders, fixed ties; 0.1 M parameters."""
    return _build("graph_mamba", pretrained, **kwargs)


@register(_card(373_018, "Peptides-func: average precision 0.6739, published."), **_CFG)
def graph_mamba_peptides_func(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for Peptides-func, 10 labels: 3 layers of 96, 0.37 M parameters."""
    args = _published(kwargs, dim=96, depth=3, encoder="atom", edges="bond", pe="lap", num_classes=10)
    return _build("graph_mamba_peptides_func", pretrained, **args)


@register(_card(491_867, "Peptides-struct: mean absolute error 0.2478, published."), **_CFG)
def graph_mamba_peptides_struct(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for Peptides-struct, 11 targets: 4 layers of 96, 0.49 M parameters."""
    args = _published(kwargs, dim=96, depth=4, encoder="atom", edges="bond", pe="lap", num_classes=11)
    return _build("graph_mamba_peptides_struct", pretrained, **args)


@register(_card(497_781, "PascalVOC superpixels, nodes of 21 classes."), **_CFG)
def graph_mamba_voc(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for the superpixels of Pascal VOC, in three buckets: 4 layers of 96, 0.50 M parameters."""
    args = _published(
        kwargs, dim=96, depth=4, in_chans=14, edges="linear", edge_chans=2, pe="lap", num_classes=21, level="node",
        head_layers=3, buckets=3,
    )  # fmt: skip
    return _build("graph_mamba_voc", pretrained, **args)


@register(_card(285_125, "MalNet-Tiny, 5 classes; node features are PyG's LocalDegreeProfile."), **_CFG)
def graph_mamba_malnet(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for MalNet-Tiny, in three buckets: 5 layers of 64, 0.29 M parameters."""
    args = _published(
        kwargs, dim=64, depth=5, in_chans=5, num_classes=5, encoder_norm=True, pre_layers=1, head_layers=3,
        global_pool="max", buckets=3,
    )  # fmt: skip
    return _build("graph_mamba_malnet", pretrained, **args)


@register(_card(113_818, "CIFAR-10 superpixels."), **_CFG)
def graph_mamba_cifar10(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for the superpixels of CIFAR-10: 3 layers of 52, 0.11 M parameters."""
    args = _published(
        kwargs, dim=52, depth=3, in_chans=5, edges="linear", pe="lap", pe_dim=8, num_classes=10, head_layers=2
    )
    return _build("graph_mamba_cifar10", pretrained, **args)


@register(_card(116_486, "MNIST superpixels."), **_CFG)
def graph_mamba_mnist(pretrained: bool = False, **kwargs: Any) -> GraphMamba:
    """As published for the superpixels of MNIST: 3 layers of 52, 0.12 M parameters."""
    args = _published(
        kwargs, dim=52, depth=3, in_chans=3, edges="linear", pe="lap", pe_dim=8, num_classes=10, head_layers=3
    )
    return _build("graph_mamba_mnist", pretrained, **args)


@register(_card(54_336, "One layer: nodes, edges and visits in, nodes and edges out."), **_CFG)
def graph_mamba_layer(pretrained: bool = False, **kwargs: Any) -> GraphMambaLayer:
    """One layer of Graph-Mamba: nodes `(n, d)` and edges `(e, d)` to both; 0.05 M parameters at width 64."""
    return build_model(GraphMambaLayer, "graph_mamba_layer", pretrained, checkpoint_filter_fn, **kwargs)

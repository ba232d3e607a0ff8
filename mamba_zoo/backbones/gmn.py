"""GMN: each node reads its neighbourhood from far to near, then the nodes read one another.

Behrouz and Hashemi 2024, arXiv:2402.08678, whose repository holds no code: this follows the paper, with choices of our
own where it leaves them open (pre-norm residuals, mean-pooled subgraphs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..scans import Graphs, ScanLike, scan_order
from ..scans.neighbourhood import Neighbourhoods, neighbourhoods
from ._block import LayerNorm
from ._graph import GraphModel, Orders
from ._graph_layers import GIN, LOCAL
from ._register import Card, build_model, register
from ._ssm import CausalConv1d, DirectionLinear, SelectiveSSM, resolve_dt_rank, resolve_scan
from .graph_mamba import NodeEncoder, edge_encoder, encode_edges


class DirectionalMamba(nn.Module):
    """The paper's bidirectional Mamba: every direction has its own projection, convolution, scan and gate.

    The gated directions are added and projected together.

    Args:
        dim: Width.
        d_state: States n.
        d_conv: Taps of the convolutions.
        expand: Inner width in units of `dim`.
        k: Directions.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, d_state: int = 16, d_conv: int = 4, expand: float = 1, k: int = 2, device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = DirectionLinear(k, dim, 2 * inner, **dd)
        self.conv = CausalConv1d(k, inner, d_conv, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank("auto", dim), k, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, order: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order (k, l)`, to `(b, l, dim)`; `cu_seqlens` keeps packed ones apart."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(x, order, cu_seqlens)
        y = self.ssm(u, z.to(u.dtype), order, "sum", cu_seqlens)
        return self.out_proj(y.to(u.dtype))


class TokenEncoder(nn.Module):
    """Subgraphs to tokens: message passing within each, then the mean of its nodes.

    Args:
        dim: Width.
        depth: Layers of message passing.
        drop_rate: Their dropout.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, depth: int = 1, drop_rate: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.layers = nn.ModuleList(GIN(dim, drop_rate, device, dtype) for _ in range(depth))

    def forward(self, x: Tensor, found: Neighbourhoods) -> Tensor:
        """Nodes `(n, d)` to their tokens, `(n, tokens, d)`, the node itself last."""
        h = x[found.nodes]
        for layer in self.layers:
            h, _ = layer(h, found.edge_index, None)
        count = len(x) * found.tokens
        total = h.new_zeros(count, h.shape[1]).index_add(0, found.token, h)
        sizes = torch.bincount(found.token, minlength=count).to(h.dtype)
        return (total / sizes[:, None]).unflatten(0, (len(x), found.tokens))


class GMN(GraphModel):
    """Graph Mamba Network over PyG `Data` or `Batch`.

    Args:
        in_chans: Node features.
        num_classes: Outputs; 0 returns what the classifier would read.
        level: "graph", "node" or "edge", see `GraphModel`.
        global_pool: "mean", "add" or "max" of the nodes of a graph.
        dim: Width.
        token_depth: Layers over the tokens of each node; without effect if `walk_length` is 0.
        depth: Layers over the nodes.
        d_state: States n.
        d_conv: Taps of the convolutions.
        expand: Inner width of the mixers in units of `dim`.
        walk_length: Longest walk m that tokens are drawn with; 0 makes every node one token.
        walks: Walks M a token.
        samples: Tokens s a walk length.
        token_layers: Layers of message passing within each token's subgraph.
        seed: Of the walks in evaluation, which follow from it and the graph.
        resample: Draw new walks in every training pass.
        scan: Order of the nodes, as for `GraphMamba`; the directions of "both_ways(degree)" make the layers
            bidirectional, as in the paper.
        local: Message passing beside each layer over nodes, added to it: "gated", "gcn", "gin" or "none".
        encoder: As for `GraphMamba`.
        edges: Edge features that `local` reads, as for `GraphMamba`.
        edge_chans: Edge features read by "linear".
        pe: Positions beside the features: "none", "lap" or "rwse".
        pe_dim: Part of the width that positions take.
        pe_steps: Steps of the random walk of "rwse".
        head_layers: Linear layers of the head.
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
        token_depth: int = 1,
        depth: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 1,
        walk_length: int = 3,
        walks: int = 4,
        samples: int = 2,
        token_layers: int = 1,
        seed: int = 0,
        resample: bool = True,
        scan: ScanLike = "both_ways(degree)",
        local: str = "gated",
        encoder: str = "linear",
        edges: str = "none",
        edge_chans: int = 1,
        pe: str = "none",
        pe_dim: int = 16,
        pe_steps: int = 16,
        head_layers: int = 1,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, num_classes, level, global_pool, head_layers, False, drop_rate, **dd)
        spec, k = resolve_scan(scan, 1)
        if local != "none" and local not in LOCAL:
            raise ValueError(f"local={local!r} is unknown; choose one of {(*LOCAL, 'none')}")
        self.in_chans, self.scan, self.k = in_chans, spec, k
        self.walk_length, self.walks, self.samples = walk_length, walks, samples
        self.seed, self.resample = seed, resample
        self.orders = Orders(spec, "fixed", 1, 1, 0)
        self.encoder = NodeEncoder(in_chans, dim, encoder, pe, pe_dim, pe_steps, False, **dd)
        self.edge_encoder = edge_encoder(edges, edge_chans, dim, **dd) if local in ("gated", "gin") else None
        mixer = (dim, d_state, d_conv, expand)
        walking = walk_length > 0
        self.token_encoder = TokenEncoder(dim, token_layers, drop_rate, **dd) if walking else None
        self.token_layers = nn.ModuleList(TokenLayer(*mixer, drop_rate, **dd) for _ in range(token_depth * walking))
        self.layers = nn.ModuleList(NodeLayer(*mixer, k, local, drop_rate, **dd) for _ in range(depth))
        self.norm = LayerNorm(dim, **dd)

    def forward_features(self, data: Any) -> Tensor:
        """Nodes of PyG data to `(n, dim)`."""
        graphs = Graphs.of(data)
        x = self.encoder(data)
        if self.token_encoder is not None:
            tokens = self.token_encoder(x, self.neighbourhoods(graphs))
            order = scan_order("bidirectional", (tokens.shape[1],), x.device)
            for layer in self.token_layers:
                tokens = self._run(layer, tokens, order)
            x = tokens[:, -1]
        order = self.orders.prepared(data, graphs) if self.k else None
        edges = None if self.edge_encoder is None else encode_edges(self.edge_encoder, data)
        for layer in self.layers:
            x, edges = self._run(layer, x, graphs, edges, order)
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates: the layers of tokens before those of nodes."""
        nodes = super().group_matcher(coarse)
        return {
            "stem": nodes["stem"],
            "tokens": [(r"^token_encoder", (-1,)), (r"^token_layers\.(\d+)", None)],
            "blocks": nodes["blocks"],
        }

    def neighbourhoods(self, graphs: Graphs) -> Neighbourhoods:
        """The tokens of every node; drawn anew in training if `resample`."""
        fresh = self.training and self.resample
        seed = int(torch.randint(1 << 31, ())) if fresh else self.seed
        return neighbourhoods(graphs, self.walk_length, self.walks, self.samples, seed)


class TokenLayer(nn.Module):
    """A bidirectional mixer over the tokens of each node, added to them."""

    def __init__(self, dim: int, d_state: int, d_conv: int, expand: float, dropout: float, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm, self.dropout = LayerNorm(dim, **dd), nn.Dropout(dropout)
        self.mixer = DirectionalMamba(dim, d_state, d_conv, expand, 2, **dd)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """`(n, tokens, d)` to the same, tokens visited by `order (2, tokens)`."""
        return x + self.dropout(self.mixer(self.norm(x), order))


class NodeLayer(nn.Module):
    """A mixer over the nodes of each graph, with message passing beside it, both added to the nodes."""

    def __init__(
        self, dim: int, d_state: int, d_conv: int, expand: float, k: int, local: str, dropout: float,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm, self.dropout = LayerNorm(dim, **dd), nn.Dropout(dropout)
        # Without a scan, what is left of the layer is its message passing.
        self.mixer = DirectionalMamba(dim, d_state, d_conv, expand, k, **dd) if k else None
        self.local = LOCAL[local](dim, dropout, **dd) if local != "none" else None

    def forward(
        self, x: Tensor, graphs: Graphs, edges: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Nodes `(n, d)` and edges `(e, d)` to both, updated."""
        h = self.norm(x)
        y = x
        if self.mixer is not None and order is not None:
            y = y + self.dropout(self.mixer(h[None], order, graphs.ptr)[0])
        if self.local is not None:
            near, edges = self.local(h, graphs.edge_index, edges)
            y = y + near
        return y, edges


@register(
    Card(
        "graph",
        "mamba_zoo",
        "Apache-2.0",
        "2402.08678",
        146_891,
        notes="No code was published; this is written from the paper.",
    ),
    num_classes=-1,
    input_size=None,
    classifier="head.fc",
)
def gmn(pretrained: bool = False, **kwargs: Any) -> GMN:
    """GMN with subgraph tokens from walks of up to three steps; 0.15 M parameters."""
    return build_model(GMN, "gmn", pretrained, lambda state, model: state, **kwargs)

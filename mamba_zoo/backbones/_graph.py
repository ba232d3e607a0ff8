"""What graph models share: reading PyG data, visiting orders of packed nodes, pooling, heads, timm's contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.helpers import get_device_dtype
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..kernels._order import prepare_order
from ..scans import Graphs, graph_order
from ..scans._graphs import hashed, uniform
from ..scans.graph import order_key
from ._decay import undecayed
from ._mixer import Mamba

LEVELS = ("graph", "node", "edge")
POOLS = ("mean", "add", "max")


@dataclass(frozen=True, eq=False)
class Visit:
    """One way to visit the nodes of packed graphs.

    Attributes:
        order: `(k, n)`, or None for the stored order.
        cu_seqlens: `(s + 1,)` boundaries of the sequences.
        tokens: `(n,)` node of each token, where sequences are not stored one after another; `order` and `cu_seqlens`
            then count tokens.
    """

    order: Tensor | None
    cu_seqlens: Tensor
    tokens: Tensor | None = None

    @classmethod
    def split(cls, order: Tensor, graphs: Graphs, group: Tensor) -> Visit:
        """Every graph as one sequence for each group of its nodes; `order (k, n)`, `group (n,)` from 0 on."""
        sequence = group * len(graphs.lengths) + graphs.batch
        tokens = torch.argsort(sequence, stable=True)
        place = torch.empty_like(tokens).scatter(0, tokens, torch.arange(len(tokens), device=tokens.device))
        bounds = F.pad(torch.bincount(sequence).cumsum(0), (1, 0))
        return cls(place[order], bounds, tokens)

    def mix(self, mixer: Mamba, x: Tensor) -> Tensor:
        """Nodes `(n, d)` through a mixer, each sequence as if it were alone."""
        if self.tokens is None:
            return mixer(x[None], self.order, self.cu_seqlens)[0]
        y = mixer(x[self.tokens][None], self.order, self.cu_seqlens)[0]
        return torch.empty_like(y).index_copy(0, self.tokens, y)


class Orders:
    """Which visits a model makes of its graphs, in training and in evaluation.

    Args:
        scan: Spec of graph orders.
        ties: "fixed" breaks ties by colour refinement; "random" draws them anew in every layer of a training pass.
        buckets: Random groups that every graph's nodes are split into, each a sequence of its own.
        samples: Orders that evaluation averages over; 1 takes the order with fixed ties.
        seed: Of the draws in evaluation, which follow from it and the graph; None draws anew each time.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, scan: str, ties: str, buckets: int, samples: int, seed: int | None):
        if ties not in ("fixed", "random"):
            raise ValueError(f"ties={ties!r} is unknown; choose 'fixed' or 'random'")
        if buckets < 1 or samples < 1:
            raise ValueError(f"buckets={buckets} and num_order_samples={samples} must be at least 1")
        self.scan, self.ties, self.buckets, self.samples, self.seed = scan, ties, buckets, samples, seed

    def draw(self, data: Any, graphs: Graphs, layers: int, training: bool) -> list[list[Visit]]:
        """For each layer, the visits whose results it averages."""
        samples = 1 if training else self.samples
        if self.buckets == 1 and (self.ties == "fixed" or (samples == 1 and not training)):
            visit = Visit(self.prepared(data, graphs), graphs.ptr)
            return [[visit] for _ in range(layers)]
        fresh = training or self.seed is None
        return [[self._one(graphs, fresh, i * samples + j) for j in range(samples)] for i in range(layers)]

    def prepared(self, data: Any, graphs: Graphs) -> Tensor:
        """The order that was prepared for the data, or a new one.

        Raises:
            ValueError: it was prepared for other nodes.
        """
        found = getattr(data, order_key(self.scan), None)
        if found is None:
            return graph_order(self.scan, graphs)
        n = graphs.num_nodes
        try:
            prepare_order(found, 1, n, len(found), found.device)  # read once: the op asks for the same
            fits = found.shape[-1] == n
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"the order that AddOrder({self.scan!r}) prepared is not one of these {n} nodes: nodes were taken out "
                "or added afterwards; apply AddOrder last, or not at all, and the model orders every graph it is given"
            )
        return found

    def _one(self, graphs: Graphs, fresh: bool, number: int) -> Visit:
        n, device = graphs.num_nodes, graphs.edge_index.device
        if fresh:
            noise, group = torch.rand(n, device=device), torch.randint(self.buckets, (n,), device=device)
        else:  # from each node's place in its own graph, not in the batch
            assert self.seed is not None
            drawn = hashed(graphs.colours, self.seed, number)
            noise, group = uniform(drawn), hashed(drawn, 1) % self.buckets
        noise = noise if self.ties == "random" and (fresh or self.samples > 1) else None
        order = graph_order(self.scan, Graphs(graphs.edge_index, graphs.ptr, noise))
        return Visit(order, graphs.ptr) if self.buckets == 1 else Visit.split(order, graphs, group)


class Head(nn.Module):
    """Hidden layers of the same width, then the classifier.

    Args:
        dim: Width.
        num_classes: Outputs; 0 leaves the classifier out.
        hidden: Hidden layers: linear, ReLU, dropout.
        l2_norm: Scale every row to length 1 after each hidden layer, as GraphGym does.
        drop_rate: Dropout.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, num_classes: int, hidden: int = 0, l2_norm: bool = False, drop_rate: float = 0.0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.hidden = nn.ModuleList(nn.Linear(dim, dim, **dd) for _ in range(hidden))
        self.l2_norm, self.dropout = l2_norm, nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`(rows, dim)` to `(rows, num_classes)`."""
        for layer in self.hidden:
            x = F.relu(layer(x))
            x = F.normalize(x, dim=-1) if self.l2_norm else x
            x = self.dropout(x)
        x = x if self.hidden else self.dropout(x)
        return x if pre_logits else self.fc(x)


class GraphModel(nn.Module):
    """Encoders, layers, and a head over graphs, nodes or edges; takes PyG `Data` or `Batch`.

    Subclasses write `forward_features`.

    Args:
        dim: Width.
        num_classes: Outputs; 0 returns what the classifier would read.
        level: What is classified: "graph" pools the nodes of each graph, "node" takes every node, "edge" takes the
            pairs of nodes in `edge_label_index (2, p)`, each as the product of its two nodes.
        global_pool: "mean", "add" or "max".
        head_layers: Linear layers of the head, hidden ones included.
        head_l2_norm: See `Head`.
        drop_rate: Dropout of the head.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown level or pooling.

    Attributes:
        num_classes: Outputs.
        num_features: Width of `forward_features`.
        head_hidden_size: Width that the classifier reads.
    """

    def __init__(
        self, dim: int, num_classes: int, level: str, global_pool: str, head_layers: int, head_l2_norm: bool,
        drop_rate: float, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"level={level!r} is unknown; choose one of {LEVELS}")
        if head_layers < 1:
            raise ValueError(f"head_layers={head_layers} must be at least 1")
        self.num_features = self.head_hidden_size = dim
        self.num_classes, self.level, self.global_pool = num_classes, level, _check_pool(global_pool)
        self.grad_checkpointing = False
        self.head = Head(dim, num_classes, head_layers - 1, head_l2_norm, drop_rate, device, dtype)

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^encoder|^edge_encoder|^pre", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; None keeps the pooling."""
        dd: Any = get_device_dtype(self)
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.num_classes = num_classes
        self.head.fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.fc.train(self.training)

    def forward_features(self, data: Any) -> Tensor:
        """Nodes of PyG data to `(n, num_features)`."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, data: Any, pre_logits: bool = False) -> Tensor:
        """Pool or pair the nodes `(n, num_features)` of `data`, and classify."""
        if self.level == "graph":
            x = pool_nodes(x, Graphs.of(data), self.global_pool)
        elif self.level == "edge":
            pairs = getattr(data, "edge_label_index", None)
            if pairs is None:
                raise ValueError("level='edge' needs edge_label_index (2, p) in the data: the pairs to classify")
            x = x[pairs[0]] * x[pairs[1]]
        return self.head(x, pre_logits)

    def forward(self, data: Any) -> Tensor:
        """PyG `Data` or `Batch` to logits: `(graphs | nodes | pairs, num_classes)`.

        Raises:
            ValueError: data that do not fit the model, or without any node; a graph of a batch may have none.
        """
        return self.forward_head(self.forward_features(data), data)

    def _run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs)
        return layer(*inputs)


def pool_nodes(x: Tensor, graphs: Graphs, how: str) -> Tensor:
    """Nodes `(n, d)` to one row a graph `(g, d)`; zeros for a graph without nodes.

    Args:
        x: Nodes.
        graphs: Whose they are.
        how: "mean", "add" or "max".
    """
    out = x.new_zeros(len(graphs.lengths), x.shape[1])
    if how == "max":
        return out.scatter_reduce(0, graphs.batch[:, None].expand_as(x), x, "amax", include_self=False)
    total = out.index_add(0, graphs.batch, x)
    return total if how == "add" else total / graphs.ptr.diff().clamp(min=1)[:, None].to(x.dtype)


def read_nodes(data: Any, names: Iterable[str], hint: str) -> list[Tensor]:
    """Attributes of PyG data.

    Raises:
        ValueError: one is missing; `hint` says where it comes from.
    """
    found = [getattr(data, name, None) for name in names]
    if missing := [name for name, value in zip(names, found, strict=True) if value is None]:
        raise ValueError(f"the data have no {missing[0]}; {hint}")
    return [value for value in found if value is not None]


def _check_pool(how: str) -> str:
    if how not in POOLS:
        raise ValueError(f"global_pool={how!r} is unknown; choose one of {POOLS}")
    return how


def node_norm(kind: str, dim: int, **dd: Any) -> nn.Module:
    """The norm of `dim` channels that `kind` names: "batch", "layer" or "none".

    Raises:
        ValueError: another kind.
    """
    makers: dict[str, Callable[..., nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    if kind == "none":
        return nn.Identity()
    if kind not in makers:
        raise ValueError(f"norm={kind!r} is unknown; choose one of {(*makers, 'none')}")
    return makers[kind](dim, **dd)


def visits_of(visits: Sequence[Sequence[Visit]], layers: int) -> Sequence[Sequence[Visit]]:
    """The given visits.

    Raises:
        ValueError: not one entry a layer.
    """
    if len(visits) != layers:
        raise ValueError(f"visits has {len(visits)} entries for {layers} layers; give each layer its list")
    return visits

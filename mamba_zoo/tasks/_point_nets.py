"""The networks of point tasks: models of the zoo, and the baselines that they are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mamba_zoo

from ..backbones._identify import blueprint
from ..backbones._point_model import told_shapes
from ..backbones._points import furthest_points, nearest_points, take_points

BASELINES = ("dgcnn", "pointnet2")
FEATURES = {"normals": 3, "height": 1}  # numbers per point, in the order in which published models read them


def build_point_net(
    name: str,
    scan: str | None,
    num_classes: int,
    num_shapes: int | None,
    options: Mapping[str, Any],
    features: Sequence[str] = (),
) -> nn.Module:
    """A point model of the zoo, or a baseline.

    Args:
        name: As in `list_models(modality="points")`, or one of `BASELINES`.
        scan: Order of the points; None is the model's own. Baselines have none.
        num_classes: Outputs.
        num_shapes: Shapes whose labels the model is told, for parts; None for classification.
        options: Further arguments of the model.
        features: What the model is told of each point beside its place: "normals", "height" or both.

    Raises:
        ValueError: an unknown name, a scan for a baseline, a model of another task, or features for one without.
        TypeError: an argument that the model does not take.
    """
    more = dict(options)
    if name in BASELINES:
        if scan not in (None, "none"):
            raise ValueError(f"{name} reads points in no order; leave scan={scan!r} out")
        kind: Any = {"dgcnn": DGCNN, "pointnet2": PointNet2}[name]
        if features:
            raise ValueError(_places_only(name, features))
        if odd := [key for key in more if key not in inspect.signature(kind).parameters]:
            raise TypeError(f"{name} takes no argument {odd[0]!r}")
        return kind(num_classes, num_shapes, **more)
    if scan is not None:
        more["scan"] = scan
    kind: Any = type(blueprint(name)) if name in mamba_zoo.list_models(modality="points") else nn.Module
    if (num_shapes is not None) != ("num_shapes" in inspect.signature(kind).parameters):
        wanted = "parts of shapes, such as pointmamba_mini_parts" if num_shapes is not None else "whole shapes"
        raise ValueError(f"{name} is no model for {wanted}; see mamba_zoo.list_models(modality='points')")
    if num_shapes is not None:
        more["num_shapes"] = num_shapes
    if "in_chans" in inspect.signature(kind).parameters:
        more.setdefault("in_chans", 3 + sum(FEATURES[feature] for feature in features))
    elif features:
        raise ValueError(_places_only(name, features))
    return mamba_zoo.create_model(name, num_classes=num_classes, **more)


def with_features(net: nn.Module, x: Tensor, features: Sequence[str]) -> dict[str, Tensor]:
    """What a model reads beside the places of points, as the argument `features`; nothing where there are none.

    Args:
        net: Of the model; one with `combine_xyz` puts the places behind its features by itself.
        x: Points `(b, n, 3)`, or `(b, n, 6)` with their normals.
        features: See `build_point_net`. Height is that above the lowest point, along y.
    """
    if not features:
        return {}
    places = x[..., :3]
    made = {"normals": x[..., 3:], "height": places[..., 1:2] - places[..., 1:2].amin(1, keepdim=True)}
    first = [] if getattr(net, "combine_xyz", False) else [places]
    return {"features": torch.cat([*first, *(made[name] for name in FEATURES if name in features)], dim=-1)}


def _places_only(name: str, features: Sequence[str]) -> str:
    return f"{name} reads coordinates alone; leave data.features={list(features)} out, or take a form of pcm"


class _Baseline(nn.Module):
    """A head over points, or over the whole cloud, with the label of the shape if there is one.

    Args:
        width: Of what comes in of every point.
        num_classes: Outputs.
        num_shapes: Shapes whose label is told, for parts; None classifies the cloud.
        drop_rate: Dropout.
    """

    def __init__(self, width: int, num_classes: int, num_shapes: int | None, drop_rate: float):
        super().__init__()
        self.num_shapes = num_shapes
        self.whole = _mlp(width, 512)
        inside = 1024 if num_shapes is None else width + 1024 + num_shapes
        self.head = nn.Sequential(
            _mlp(inside, 256), nn.Dropout(drop_rate), _mlp(256, 128), nn.Dropout(drop_rate), nn.Linear(128, num_classes)
        )

    def finish(self, x: Tensor, shape: Tensor | None) -> Tensor:
        """Features `(b, n, width)` to logits `(b, n, classes)` for parts, else `(b, classes)`."""
        b, n, width = x.shape
        wide = self.whole(x.reshape(-1, width)).view(b, n, -1)
        whole = torch.cat([wide.amax(1), wide.mean(1)], dim=-1)
        if self.num_shapes is None:
            return self.head(whole)
        label: Any = told_shapes(shape, b, self.num_shapes)
        joint = torch.cat([x, torch.cat([whole, label.to(x.dtype)], dim=-1)[:, None].expand(-1, n, -1)], dim=-1)
        return self.head(joint.flatten(0, 1)).view(b, n, -1)


class DGCNN(_Baseline):
    """Edge convolutions on graphs of neighbours in the features of each layer (arXiv:1801.07829), PyG's `EdgeConv`.

    Args:
        num_classes: Outputs.
        num_shapes: See `build_point_net`.
        widths: Of the edge convolutions.
        neighbours: Of each point.
        drop_rate: Dropout in the head.
    """

    def __init__(
        self,
        num_classes: int,
        num_shapes: int | None = None,
        widths: Sequence[int] = (64, 64, 128, 256),
        neighbours: int = 20,
        drop_rate: float = 0.5,
    ):
        edge_conv = _pyg("EdgeConv")
        super().__init__(sum(widths), num_classes, num_shapes, drop_rate)
        self.neighbours = neighbours
        self.convs = nn.ModuleList(
            edge_conv(_mlp(2 * dim, out), aggr=_max_of_each())
            for dim, out in zip([3, *widths[:-1]], widths, strict=True)
        )

    def forward(self, x: Tensor, shape: Tensor | None = None) -> Tensor:
        """Clouds `(b, n, 3)`, and labels of their shapes for parts, to logits."""
        b, n, _ = x.shape
        seen, flat = [], x.reshape(b * n, -1)
        for conv in self.convs:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                dense = flat.detach().float().view(b, n, -1)
                index = torch.cdist(dense, dense).topk(min(self.neighbours, n), largest=False).indices
            flat = conv(flat, _edges(index, n))
            seen.append(flat)
        return self.finish(torch.cat(seen, dim=-1).view(b, n, -1), shape)


class PointNet2(_Baseline):
    """Set abstraction twice (PointNet++, arXiv:1706.02413), PyG's `PointNetConv` over nearest neighbours; for shapes.

    Args:
        num_classes: Outputs.
        num_shapes: Must be None: this one has no way back to the points.
        centres: Points that are kept by the two layers.
        neighbours: Of each of them.
        drop_rate: Dropout in the head.

    Raises:
        ValueError: it is asked for parts.
    """

    def __init__(
        self,
        num_classes: int,
        num_shapes: int | None = None,
        centres: Sequence[int] = (256, 64),
        neighbours: int = 32,
        drop_rate: float = 0.5,
    ):
        if num_shapes is not None:
            raise ValueError("pointnet2 names shapes only; take dgcnn for parts")
        conv = _pyg("PointNetConv")
        super().__init__(256 + 3, num_classes, None, drop_rate)
        self.centres, self.neighbours = tuple(centres), neighbours
        self.convs = nn.ModuleList(
            conv(nn.Sequential(_mlp(dim + 3, out), _mlp(out, out)), add_self_loops=False, aggr=_max_of_each())
            for dim, out in ((3, 128), (128, 256))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)` to logits `(b, classes)`."""
        b = len(x)
        places, features = x, x
        for conv, count in zip(self.convs, self.centres, strict=True):
            n = places.shape[1]
            kept = take_points(places, furthest_points(places, count))
            index = nearest_points(places, kept, min(self.neighbours, n))[1]
            flat = conv(
                (features.reshape(b * n, -1), None), (places.reshape(-1, 3), kept.reshape(-1, 3)), _edges(index, n)
            )
            places, features = kept, flat.view(b, count, -1)
        return self.finish(torch.cat([features, places.to(features.dtype)], dim=-1), None)


def _edges(index: Tensor, n: int) -> Tensor:
    """Neighbours `(b, m, k)` among `n` points of each cloud as edges `(2, b * m * k)` from neighbour to point."""
    b, m, k = index.shape
    source = index + n * torch.arange(b, device=index.device)[:, None, None]
    target = torch.arange(b * m, device=index.device).repeat_interleave(k)
    return torch.stack([source.flatten(), target])


def _max_of_each() -> Any:
    """The maximum over the neighbours of each point, which are as many for all and listed one point after the other."""
    base = _pyg("Aggregation", "aggr")

    class MaxOfEach(base):
        def forward(self, x: Tensor, index: Tensor, ptr: Any = None, dim_size: Any = None, dim: int = -2):
            # PyG's own scatters every message by atomic operations, forward and backward.
            return x.view(dim_size, -1, x.shape[-1]).amax(1)

    return MaxOfEach()


def _mlp(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out), nn.LeakyReLU(0.2))


def _pyg(name: str, part: str = "conv") -> Any:
    try:
        import torch_geometric.nn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the baselines of point tasks are layers of PyTorch Geometric: pip install 'mamba_zoo[graph]'"
        ) from error
    return getattr(getattr(torch_geometric.nn, part), name)

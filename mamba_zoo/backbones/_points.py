"""Geometry of point clouds in plain torch: furthest points, neighbours, groups, interpolation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import _triton

_BLOCK = 1 << 25  # distances held at once: 128 MB in float32
_ORIGIN = 1e-3  # squared distance from the origin up to which pointnet2_ops skips points
_ONE_PROGRAM = 8192  # points of a cloud that one Triton program keeps in registers


@torch.library.custom_op("mamba_zoo::furthest_points", mutates_args=())
def _furthest_points(xyz: Tensor, count: int) -> Tensor:
    points = xyz.float()
    b, n, _ = points.shape
    if xyz.is_cuda and 0 < n <= _ONE_PROGRAM and _triton.refuse("cuda", points.dtype) is None:
        from ..kernels._triton.furthest_points import furthest_points as in_one_kernel

        return in_one_kernel(points, count)
    chosen = torch.zeros(b, count, dtype=torch.int64, device=xyz.device)
    nearest = points.new_full((b, n), torch.inf)
    rows = torch.arange(b, device=xyz.device)
    last = chosen[:, 0]
    for i in range(1, count):
        nearest = torch.minimum(nearest, _squared(points[rows, last, None], points)[:, 0])
        last = nearest.argmax(dim=1)
        chosen[:, i] = last
    return chosen


@_furthest_points.register_fake
def _(xyz: Tensor, count: int) -> Tensor:
    return xyz.new_empty(len(xyz), count, dtype=torch.int64)


def furthest_points(xyz: Tensor, count: int, skip_origin: bool = False) -> Tensor:
    """Indices `(b, count)` of points that are far from each other: the first point, then ever the furthest one left.

    Squared distances in float32, as in the kernels that published models were trained with; those of pointnet2_ops also
    skip points near the origin, too.

    Args:
        xyz: Points `(b, n, 3)`.
        count: How many to choose, at most n.
        skip_origin: Choose no point within 0.0316 of the origin but the first, as pointnet2_ops does.

    Raises:
        ValueError: more points than there are.
    """
    if count > xyz.shape[1]:
        raise ValueError(
            f"{count} points are to be chosen from clouds of {xyz.shape[1]}; sample more points, or build the model "
            "with fewer groups"
        )
    xyz = xyz.detach()
    if skip_origin:  # what lies where the first point does is never the furthest
        near = xyz.float().square().sum(-1, keepdim=True) <= _ORIGIN
        xyz = torch.where(near, xyz[:, :1], xyz)
    return _furthest_points(xyz, count)


def nearest_points(xyz: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest points of each query, nearest first: squared distances and indices `(b, m, k)`.

    Distances are exact differences in float32, not expanded products, which lose the small ones.

    Args:
        xyz: Points `(b, n, 3)`.
        queries: `(b, m, 3)`.
        k: How many, at most n.

    Raises:
        ValueError: more neighbours than points.
    """
    if k > xyz.shape[1]:
        raise ValueError(f"k={k} neighbours are asked for among {xyz.shape[1]} points; sample more points")
    points, queries = xyz.detach().float(), queries.detach().float()
    rows = max(1, _BLOCK // (points.shape[0] * points.shape[1]))
    found = [_nearest(points, part, k) for part in queries.split(rows, dim=1)]
    if len(found) == 1:
        return found[0]
    return torch.cat([d for d, _ in found], dim=1), torch.cat([i for _, i in found], dim=1)


def _nearest(points: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _squared(queries, points).topk(k, dim=-1, largest=False)


def _squared(queries: Tensor, points: Tensor) -> Tensor:
    """Squared distances `(b, m, n)` of queries `(b, m, 3)` to points `(b, n, 3)`, axis by axis."""
    total = (queries[:, :, None, 0] - points[:, None, :, 0]).square()
    for axis in (1, 2):
        total += (queries[:, :, None, axis] - points[:, None, :, axis]).square()
    return total


def take_points(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x (b, n, c)` by `index (b, ...)`: `(b, ..., c)`."""
    flat = index.flatten(1)
    return x.gather(1, flat[..., None].expand(-1, -1, x.shape[-1])).view(*index.shape, x.shape[-1])


def group_points(xyz: Tensor, groups: int, size: int, skip_origin: bool = False) -> tuple[Tensor, Tensor]:
    """Patches of a cloud around its furthest points.

    Args:
        xyz: Points `(b, n, 3)`.
        groups: Patches.
        size: Points of a patch, its centre among them.
        skip_origin: See `furthest_points`.

    Returns:
        Patches relative to their centres, `(b, groups, size, 3)`, and the centres `(b, groups, 3)`.
    """
    centres = take_points(xyz, furthest_points(xyz, groups, skip_origin))
    return take_points(xyz, nearest_points(xyz, centres, size)[1]) - centres[:, :, None], centres


def interpolate_points(xyz: Tensor, known: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Features at points, from the `k` nearest known points, weighted by the inverse of squared distance.

    Args:
        xyz: Points `(b, n, 3)`.
        known: Points with features, `(b, m, 3)`; the sums of weights stay finite where they coincide.
        features: `(b, m, c)`.
        k: Neighbours; a single known point is copied to all.

    Returns: `(b, n, c)`.

    Source: PointNet++, arXiv:1706.02413, equation 2.
    """
    squared, index = nearest_points(known, xyz, min(k, known.shape[1]))
    weight = 1 / (squared + 1e-8)
    weight = (weight / weight.sum(-1, keepdim=True)).to(features.dtype)
    return (take_points(features, index) * weight[..., None]).sum(2)


def chamfer_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance to the nearest point, from `x (b, n, 3)` to `y (b, m, 3)` plus the other way; a scalar."""
    squared = (x[:, :, None] - y[:, None]).square().sum(-1)
    return squared.amin(2).mean() + squared.amin(1).mean()

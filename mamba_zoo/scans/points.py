"""Orders of the points of a cloud: curves through space, sorts along axes, a snake through slices, a spectrum.

Every order is a stable sort: points with equal keys are visited in the order they are stored, on every machine. Orders
belong to a cloud alone, whatever is in the batch with it, unless a published model needs it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ._cloud import PointScanLike, cloud_order, cloud_spec
from ._registry import register_sample_order

_CELL = 0.02  # side of a cell, in the units of the points: what PointMamba and PCM use in a unit sphere
_FEW = 256  # points whose spectrum is computed on a CPU
_DEEPEST = 21  # three axes of so many bits fit an int64
_AXES = {"x": 0, "y": 1, "z": 2}


def point_order(scan: PointScanLike, xyz: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The visiting order of the points of clouds.

    Args:
        scan: A name such as "hilbert", a spec such as "join(hilbert, reverse(sort_x))", or a function of `xyz`.
        xyz: Points `(b, n, 3)`; or `(l, 3)`, the points of `s` clouds one after the other.
        cu_seqlens: `(s + 1,)` boundaries of packed clouds, from 0 to l.

    Returns:
        `(b, k, n)`, or `(k, l)` for packed clouds, int64: direction k visits point `order[..., k, i]` at step i. Packed
        clouds are visited one after the other. Both go into `kernels.selective_scan` as they are.

    Raises:
        ValueError: an unknown scan, points of another shape, or none at all.

    Example:
        >>> cloud = torch.tensor([[[0.3, 0.0, 0.0], [0.1, 0.0, 0.0], [0.2, 0.0, 0.0]]])
        >>> point_order("both_ways(sort_x)", cloud).tolist()
        [[[1, 2, 0], [0, 2, 1]]]
    """
    spec = cloud_spec(scan)
    if cu_seqlens is None:
        if xyz.dim() != 3 or xyz.shape[-1] != 3:
            raise ValueError(
                f"xyz must be (b, n, 3), not {tuple(xyz.shape)}; for packed clouds give cu_seqlens as well"
            )
        _some(xyz)
        return cloud_order(spec, xyz)
    if xyz.dim() != 2 or xyz.shape[-1] != 3:
        raise ValueError(f"with cu_seqlens, xyz must be (l, 3), not {tuple(xyz.shape)}")
    _some(xyz)
    parts = [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    orders = [cloud_order(spec, xyz[None, start:end])[0] + start for start, end in parts]
    return torch.cat(orders, dim=-1)


def register_point_order(name: str, replace: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: give an order of points a name, usable wherever a scan of points is expected.

    The function takes coordinates `(b, n, 3)`, and options with defaults. It returns point indices `(b, n)`, or
    `(b, k, n)` for k directions, int64; every row must be a permutation.

    Args:
        name: A Python identifier that does not start with an underscore.
        replace: Take over a name that is taken. A function defined again in the same place may always do so.

    Raises:
        ValueError: the name is taken or is no identifier.

    Example:
        >>> from mamba_zoo.scans import unregister_scan
        >>> @register_point_order("top_down", replace=True)
        ... def top_down(xyz):
        ...     return xyz[..., 2].argsort(dim=-1, descending=True, stable=True)
        >>> point_order("both_ways(top_down)", torch.tensor([[[0.0, 0.0, 0.1], [0.0, 0.0, 0.2]]])).tolist()
        [[[1, 0], [0, 1]]]
        >>> unregister_scan("top_down", "points")
    """
    return register_sample_order(name, "points", replace)


@register_point_order("given")
def given(xyz: Tensor) -> Tensor:
    """The points as they are stored; for models that sample centres, furthest first."""
    return torch.arange(xyz.shape[1], device=xyz.device).expand(xyz.shape[:2])


@register_point_order("random")
def random(xyz: Tensor, seed: int = 0, k: int = 1) -> Tensor:
    """`k` shuffles, the same for all clouds of so many points: the control that any order has to beat."""
    b, n, _ = xyz.shape
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=draw) for _ in range(k)]).to(xyz.device).expand(b, -1, -1)


@register_point_order("sort_x")
def sort_x(xyz: Tensor) -> Tensor:
    """By the first coordinate; PointMamba's first version joins this with y and z (arXiv:2402.10739v1)."""
    return _sorted(xyz[..., 0])


@register_point_order("sort_y")
def sort_y(xyz: Tensor) -> Tensor:
    """By the second coordinate."""
    return _sorted(xyz[..., 1])


@register_point_order("sort_z")
def sort_z(xyz: Tensor) -> Tensor:
    """By the third coordinate."""
    return _sorted(xyz[..., 2])


@register_point_order("zcurve")
def zcurve(xyz: Tensor, cell: float | None = _CELL, depth: int | None = None) -> Tensor:
    """Morton's Z curve through cells of side `cell`; see `hilbert` for the options."""
    grid, _ = _cells(xyz, cell, depth)
    return _sorted(zcurve_code(grid))


@register_point_order("zcurve_trans")
def zcurve_trans(xyz: Tensor, cell: float | None = _CELL, depth: int | None = None) -> Tensor:
    """The Z curve with the first two axes exchanged."""
    grid, _ = _cells(xyz, cell, depth)
    return _sorted(zcurve_code(_transposed(grid)))


@register_point_order("hilbert")
def hilbert(xyz: Tensor, cell: float | None = _CELL, depth: int | None = None, shared_depth: bool = False) -> Tensor:
    """Hilbert's curve through cells of side `cell` (PointMamba, arXiv:2402.10739).

    Args:
        xyz: `(b, n, 3)`.
        cell: Side of a cell in the units of the points; None divides the cube around each cloud into `2**depth` cells a
            side, whatever its size.
        depth: Bits per axis; None takes as many as the cloud needs (10 if `cell` is None).
        shared_depth: Take the depth of the widest cloud of the batch for all of them, as published PointMamba does. The
            axes of the curve turn with every level, so that a cloud's order then depends on its batch.

    Returns:
        `(b, n)` int64.
    """
    grid, depths = _cells(xyz, cell, depth)
    return _sorted(hilbert_code(grid, depths.amax().expand_as(depths) if shared_depth else depths))


@register_point_order("hilbert_trans")
def hilbert_trans(
    xyz: Tensor, cell: float | None = _CELL, depth: int | None = None, shared_depth: bool = False
) -> Tensor:
    """Hilbert's curve with the first two axes exchanged; see `hilbert`."""
    grid, depths = _cells(xyz, cell, depth)
    depths = depths.amax().expand_as(depths) if shared_depth else depths
    return _sorted(hilbert_code(_transposed(grid), depths))


@register_point_order("cts")
def cts(xyz: Tensor, axes: str = "xyz", cell: float | None = _CELL, published: bool = False) -> Tensor:
    """Consistent traverse serialization (PCM, arXiv:2403.00762): a snake along one axis, then the next, then the last.

    Args:
        xyz: `(b, n, 3)`.
        axes: Fastest axis first, such as "zxy".
        cell: Side of a cell in the units of the points; None makes 1024 cells a side.
        published: As in PCM's published code, see `cts_code`.

    Raises:
        ValueError: `axes` is no arrangement of "xyz".
    """
    grid, _ = _cells(xyz, cell, None)
    return _sorted(cts_code(grid, axes, published))


@register_point_order("spectral")
def spectral(xyz: Tensor, neighbours: int = 8) -> Tensor:
    """By the Fiedler vector of the graph of distances: the slowest wave over the cloud, from one end to the other.

    Weights fall with the square of distance over the mean distance to the nearest `neighbours` points. The eigenvector
    is signed so that it grows with x. Quadratic in memory: for the centres of a model, not for whole scenes.

    Raises:
        ValueError: more than 4096 points.
    """
    b, n, _ = xyz.shape
    if n > 4096:
        raise ValueError(
            f"scan 'spectral' needs all {n} x {n} distances; use 'hilbert', or sample 4096 points or fewer"
        )
    # A GPU solves many small eigenproblems one after the other, slower than a CPU does.
    points = xyz.double().cpu() if n <= _FEW else xyz.double()
    squared = torch.cdist(points, points).square()
    near = squared.topk(min(neighbours + 1, n), dim=-1, largest=False).values[..., 1:]
    scale = near.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12) if n > 1 else squared.new_ones(b, 1, 1)
    weights = torch.exp(-squared / scale) + 1e-9  # no part is quite cut off, so that the vector is unique
    degree = weights.sum(-1).rsqrt()
    laplacian = torch.eye(n, dtype=points.dtype, device=points.device) - degree[:, :, None] * weights * degree[:, None]
    vector = torch.linalg.eigh(laplacian).eigenvectors[..., min(1, n - 1)] * degree
    sign = torch.where((vector * points[..., 0]).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return _sorted(vector * sign).to(xyz.device)


def zcurve_code(grid: Tensor) -> Tensor:
    """Interleaved bits of cells `(..., 3)`: x at bit `3i + 2`, y at `3i + 1`, z at `3i`; int64 `(...)`."""
    return sum((_spread(grid[..., axis]) << (2 - axis) for axis in range(3)), torch.zeros_like(grid[..., 0]))


def hilbert_code(grid: Tensor, depth: int | Tensor) -> Tensor:
    """Where cells lie along Hilbert's curve (J. Skilling, AIP Conf. Proc. 707, 2004).

    Args:
        grid: Cells `(b, n, 3)` or `(n, 3)`, int64, from 0 to `2**depth - 1`.
        depth: Bits per axis, for all clouds or `(b,)`. The curve's axes turn with every level: depths that differ by a
            multiple of three give the same order.

    Returns:
        `(b, n)` or `(n,)` int64.
    """
    deepest = int(depth.max()) if isinstance(depth, Tensor) else depth
    shape = grid.shape[:-1]
    levels = torch.as_tensor(depth, device=grid.device).view(-1, *[1] * (len(shape) - 1))
    digits, states = _hilbert_tables(grid.device)
    octants = [_octants(grid, bit) for bit in reversed(range(deepest))]
    state = torch.zeros(shape, dtype=torch.int64, device=grid.device)
    code = torch.zeros_like(state)
    for bit, octant in zip(reversed(range(deepest)), octants, strict=True):
        row = state + octant
        code = (code << 3) | digits[row]
        # Shallower clouds join in later: until then they stay in the first state, whose octant 0 has the digit 0.
        state = torch.where(levels > bit, states[row], 0)
    for shift in (1, 2, 4, 8, 16, 32):  # from Gray code
        code = code ^ (code >> shift)
    return code


def _octants(grid: Tensor, bit: int) -> Tensor:
    """Which eighth of its cube of this level each cell is in: bits of x, y and z, x highest."""
    x, y, z = ((grid >> bit) & 1).unbind(-1)
    return (x << 2) | (y << 1) | z


@lru_cache(maxsize=8)
def _hilbert_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each state and octant, at index `8 * state + octant`, a digit in Gray code and 8 times the next state.

    Skilling's loop exchanges and inverts the lower bits of axes by what it finds in the present ones, so that what it
    has done so far is one of 48 ways to exchange and invert axes: a state. The first is to leave them alone.
    """
    # Axis i of the curve is axis order[i] of the cube, inverted or not.
    queue: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0, 1, 2), (0, 0, 0))]
    known = {queue[0]: 0}
    found: list[tuple[int, int]] = []
    for order, inverted in queue:  # which grows
        for octant in range(8):
            cube = (octant >> 2, (octant >> 1) & 1, octant & 1)
            bits = [cube[axis] ^ flip for axis, flip in zip(order, inverted, strict=True)]
            axes = list(zip(order, inverted, strict=True))
            for i, bit in enumerate(bits):
                if bit:
                    axes[0] = (axes[0][0], axes[0][1] ^ 1)
                else:
                    axes[0], axes[i] = axes[i], axes[0]
            following = (tuple(axis for axis, _ in axes), tuple(flip for _, flip in axes))
            if following not in known:
                known[following] = len(known)
                queue.append(following)
            found.append((bits[0] << 2 | bits[1] << 1 | bits[2], 8 * known[following]))
    with torch.inference_mode(False):
        digits, states = torch.tensor(found, device=device).unbind(-1)
        return digits.contiguous(), states.contiguous()


def cts_code(grid: Tensor, axes: str, published: bool = False) -> Tensor:
    """Places along a snake through cells `(b, n, 3)`, int64 `(b, n)`.

    The first of `axes` is walked there and back, the second turns with every slice of the third. The published code
    took the maxima of the second and third axis, over the whole batch, where their coordinates were meant: what is left
    is a sort along the first axis, downwards if one of the two maxima is odd and the other even, with many ties.

    Raises:
        ValueError: `axes` is no arrangement of "xyz".
    """
    if sorted(axes) != ["x", "y", "z"]:
        raise ValueError(f"axes={axes!r} must be an arrangement of 'xyz', such as 'zxy'")
    first, second, third = (grid[..., _AXES[axis]] for axis in axes)
    if published:
        return torch.where((second.amax() + third.amax()) % 2 == 1, -first, first)
    side = grid.amax(dim=(-2, -1), keepdim=True)[..., 0] + 1
    turned = torch.where(third % 2 == 1, side - 1 - second, second)
    along = torch.where((second + third) % 2 == 1, side - 1 - first, first)
    return (third * side + turned) * side + along


def _some(xyz: Tensor) -> None:
    if not xyz.numel():
        raise ValueError(f"xyz {tuple(xyz.shape)} holds no points; leave empty clouds out")


def _cells(xyz: Tensor, cell: float | None, depth: int | None) -> tuple[Tensor, Tensor]:
    """Cells `(b, n, 3)` counted from each cloud's corner, and the bits per axis that each cloud needs, `(b,)`."""
    xyz = xyz.detach().float()
    if cell is None:
        low = xyz.amin(1, keepdim=True)
        side = (xyz - low).amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        bits = 10 if depth is None else depth
        grid = ((xyz - low) / side * 2**bits).long().clamp(max=2**bits - 1)
        return grid, torch.full((len(xyz),), bits, device=xyz.device)
    if cell <= 0:
        raise ValueError(f"cell={cell} must be positive, or None for cells that follow the size of the cloud")
    grid = torch.floor(xyz / cell).long()
    grid = grid - grid.amin(1, keepdim=True)
    widest = grid.amax(dim=(1, 2))
    powers = 2 ** torch.arange(_DEEPEST + 1, device=xyz.device)
    needed = (widest[:, None] >= powers).sum(1)  # bit length
    extent = (xyz.amax(1) - xyz.amin(1)).amax(1) / cell  # counts where cells overflow, and is NaN where points are
    needed = torch.where(extent < 2.0 ** (_DEEPEST + 1), needed, _DEEPEST + 1)
    most = _DEEPEST if depth is None else depth
    if not grid.is_meta and int(needed.max()) > most:
        if not bool(xyz.isfinite().all()):
            raise ValueError("points have coordinates that are not finite, and therefore no order; leave them out")
        raise ValueError(
            f"a cloud is {float(extent.max()):.3g} cells of side {cell} wide, more than "
            f"depth={most} has (2**{most}); "
            "give a larger cell, or cell=None"
        )
    return grid, needed if depth is None else torch.full_like(needed, depth)


def _transposed(grid: Tensor) -> Tensor:
    return grid[..., [1, 0, 2]]


def _spread(x: Tensor) -> Tensor:
    """Bit i to bit 3i, for 21 bits."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << shift)) & mask
    return x


def _sorted(keys: Tensor) -> Tensor:
    return torch.argsort(keys, dim=-1, stable=True)

"""Clouds cut into windows of successive points, for models that mix a few points at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._points import furthest_points, take_points

_SPAN = 1e-6  # below every extent, so that points in one plane do not divide by zero


@dataclass(frozen=True, eq=False)
class PointStream:
    """Points on their way through mixers.

    Attributes:
        xyz: `(b, n, 3)`.
        x: What the next mixer reads, `(b, n, d)`.
        residual: The residual stream `(b, n, d)`; None before the first mixer.
    """

    xyz: Tensor
    x: Tensor
    residual: Tensor | None = None

    def __len__(self) -> int:
        """Points n."""
        return self.xyz.shape[1]

    def take(self, index: Tensor) -> PointStream:
        """The points at `index (b, m)`."""
        residual = None if self.residual is None else take_points(self.residual, index)
        return PointStream(take_points(self.xyz, index), take_points(self.x, index), residual)

    def cut(self, window: int) -> PointStream:
        """Each window a cloud of its own, `(b * n / window, window, ...)`; `window` divides n."""
        xyz, x = (v.reshape(-1, window, v.shape[-1]) for v in (self.xyz, self.x))
        return PointStream(xyz, x, None if self.residual is None else self.residual.reshape(x.shape))

    def joined(self, b: int) -> PointStream:
        """Windows as the `b` clouds that they were cut from."""
        return self.cut(self.xyz.shape[0] * self.xyz.shape[1] // b)


def whole_windows(xyz: Tensor, window: int) -> Tensor:
    """Points `(b, n, 3)` that fill windows, without a rest: `(b, n // window * window)`, ascending.

    Those that are left out are the last ones that a choice of furthest points would take, so that what is left covers
    the cloud.
    """
    return furthest_points(xyz, xyz.shape[1] // window * window).sort(dim=1).values


def place_in_window(xyz: Tensor, for_each_point: bool = False) -> Tensor:
    """Coordinates `(w, n, 3)` from 0 to 1 between the smallest and the largest.

    Args:
        xyz: Points of windows.
        for_each_point: Between the smallest and the largest of each point's own three coordinates, as in the published
            code of PCM, instead of those of each axis over the window's points.
    """
    axis = 2 if for_each_point else 1
    low = xyz.amin(axis, keepdim=True)
    return (xyz - low) / (xyz.amax(axis, keepdim=True) - low + _SPAN)

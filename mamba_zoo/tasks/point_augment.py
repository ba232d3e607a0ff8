"""Random changes of whole batches of clouds, on their device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Rotation = Literal["none", "x", "y", "z", "cube", "any"]


class PointAugment:
    """Scale, move, turn, mirror and jitter clouds, each by itself.

    Args:
        scale: Smallest and largest factor, for every axis of its own; (1, 1) is off.
        translate: Largest shift along each axis.
        rotate: "x", "y" or "z" turn around that axis; "cube" takes one of the 24 turns of a cube, for shapes that lie
            along axes but not the same ones; "any" takes any rotation.
        tilt: Degrees of a further small rotation around a random axis, normal in its angle.
        flip: Mirror along x half of the time.
        jitter: Deviation of noise on every coordinate, cut at four times as much.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        scale: Sequence[float] = (1.0, 1.0),
        translate: float = 0.0,
        rotate: Rotation = "none",
        tilt: float = 0.0,
        flip: bool = False,
        jitter: float = 0.0,
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={tuple(scale)} must be two factors, the smaller one first")
        if rotate not in get_args(Rotation):
            raise ValueError(f"rotate={rotate!r} is unknown; choose one of {', '.join(get_args(Rotation))}")
        if min(translate, tilt, jitter) < 0:
            raise ValueError(f"translate={translate}, tilt={tilt} and jitter={jitter} must not be negative")
        self.scale, self.translate, self.rotate = (float(scale[0]), float(scale[1])), translate, rotate
        self.tilt, self.flip, self.jitter = tilt, flip, jitter

    def __call__(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)`, or `(b, n, 6)` with normals, to clouds of the same shape."""
        b = len(x)
        x, normals = x[..., :3], x[..., 3:]
        low, high = self.scale
        if (low, high) != (1.0, 1.0):
            factors = low + (high - low) * torch.rand(b, 1, 3, device=x.device)
            x = x * factors
            if normals.shape[-1]:
                normals = torch.nn.functional.normalize(normals / factors, dim=-1)
        x, normals = self.turn(torch.cat([x, normals], dim=-1)).tensor_split((3,), dim=-1)
        if self.translate:
            x = x + self.translate * (2 * torch.rand(b, 1, 3, device=x.device) - 1)
        if self.jitter:
            noise = torch.randn_like(x).clamp(-4, 4)
            x = x + self.jitter * noise
        return torch.cat([x, normals], dim=-1)

    def turn(self, x: Tensor) -> Tensor:
        """Only rotations and mirrors, of points and normals alike: what may be averaged over at test time."""
        b, device = len(x), x.device
        n = x.shape[1]
        x = torch.cat(x.split(3, dim=-1), dim=1)
        if self.rotate == "cube":
            x = x @ _cube(device)[torch.randint(24, (b,), device=device)]
        elif self.rotate != "none":
            x = x @ random_rotations(b, self.rotate, device)
        if self.tilt:
            x = x @ small_rotations(b, self.tilt, device)
        if self.flip:
            mirror = torch.ones(b, 1, 3, device=device)
            mirror[:, 0, 0] = 1 - 2 * (torch.rand(b, device=device) < 0.5).float()
            x = x * mirror
        return torch.cat(x.split(n, dim=1), dim=-1)


def random_rotations(b: int, around: str, device: torch.device) -> Tensor:
    """Matrices `(b, 3, 3)`: uniform around an axis ("x", "y", "z"), or of all rotations ("any")."""
    if around == "any":
        # The sign of the diagonal of r makes the distribution uniform; the determinant keeps the hand.
        q, r = torch.linalg.qr(torch.randn(b, 3, 3, device=device))
        q = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None]
        return q * torch.linalg.det(q).sign()[:, None, None]
    axis = torch.zeros(b, 3, device=device)
    axis[:, "xyz".index(around)] = 1
    return _around(axis, 2 * torch.pi * torch.rand(b, device=device))


def small_rotations(b: int, degrees: float, device: torch.device) -> Tensor:
    """Matrices `(b, 3, 3)` around random axes by normal angles of this deviation."""
    axis = torch.nn.functional.normalize(torch.randn(b, 3, device=device), dim=-1)
    return _around(axis, torch.randn(b, device=device) * degrees * torch.pi / 180)


def _around(axis: Tensor, angle: Tensor) -> Tensor:
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    return torch.linalg.matrix_exp(cross * angle[:, None, None])


def _cube(device: torch.device) -> Tensor:
    """The 24 rotations of a cube, `(24, 3, 3)`."""
    found = []
    for columns in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = torch.zeros(3, 3)
            matrix[torch.arange(3), torch.tensor(columns)] = torch.tensor(signs)
            if torch.linalg.det(matrix) > 0:
                found.append(matrix)
    return torch.stack(found).to(device)

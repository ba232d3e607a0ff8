"""Clouds that need no download: handwritten digits as points, and solids made of parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_DIGIT_POINTS = 128
_SOLID_POINTS = 512

SOLIDS: dict[str, tuple[str, ...]] = {
    "table": ("top", "leg"),
    "mug": ("wall", "handle"),
    "lamp": ("foot", "pole", "shade"),
    "dumbbell": ("bar", "weight"),
}


def digit_clouds() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits as points (x, y, intensity): `(1797, 128, 3)` and class numbers.

    Points are drawn within pixels, the darker the pixel, the more; x and y run from -1 to 1, intensity from 0 to 0.5.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    draw = np.random.default_rng(0)
    clouds = []
    for pixels in bunch.data:  # type: ignore[attr-defined]
        ink = pixels / 16
        index = draw.choice(64, _DIGIT_POINTS, p=ink / ink.sum())
        place = np.stack([index % 8, index // 8], axis=1) + draw.random((_DIGIT_POINTS, 2))
        clouds.append(np.concatenate([place / 4 - 1, ink[index, None] / 2], axis=1))
    return np.stack(clouds).astype(np.float32), bunch.target.astype(np.int64)  # type: ignore[attr-defined]


def solid_clouds(per_class: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables, mugs, lamps and dumbbells of random proportions.

    Returns: Points `(s, 512, 3)`, class numbers `(s,)`, and the part of every point within its class, `(s, 512)`.
    """
    draw = np.random.default_rng(0)
    clouds, parts, labels = [], [], []
    makers: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
        "table": _table, "mug": _mug, "lamp": _lamp, "dumbbell": _dumbbell,
    }  # fmt: skip
    for label, name in enumerate(SOLIDS):
        for _ in range(per_class):
            pieces = makers[name](draw)
            part = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
            keep = draw.permutation(len(part))[:_SOLID_POINTS]
            clouds.append(np.concatenate(pieces)[keep][:, [1, 2, 0]])  # y points upwards
            parts.append(part[keep])
            labels.append(label)
    return np.stack(clouds).astype(np.float32), np.array(labels), np.stack(parts).astype(np.int64)


def _table(draw: np.random.Generator) -> list[np.ndarray]:
    width, depth, height = draw.uniform((0.7, 0.4, 0.5), (1.2, 0.8, 1.0))
    top = draw.uniform(-0.5, 0.5, (400, 3)) * (width, depth, 0.06) + (0, 0, height)
    corners = np.array([(x, y, 0) for x in (-1, 1) for y in (-1, 1)]) * (width * 0.45, depth * 0.45, 0)
    legs = [draw.uniform((-0.03, -0.03, 0), (0.03, 0.03, height), (60, 3)) + corner for corner in corners]
    return [top, np.concatenate(legs)]


def _mug(draw: np.random.Generator) -> list[np.ndarray]:
    radius, height = draw.uniform((0.3, 0.6), (0.5, 1.0))
    wall = _ring(draw, 440, radius, 0.0) + draw.uniform(0, height, (440, 1)) * (0, 0, 1)
    turn = draw.uniform(-np.pi / 2, np.pi / 2, 160)
    size = draw.uniform(0.25, 0.4) * height
    handle = np.stack([radius + size * np.cos(turn), np.zeros(160), height / 2 + size * np.sin(turn)], axis=1)
    return [wall, handle + draw.normal(0, 0.03, (160, 3))]


def _lamp(draw: np.random.Generator) -> list[np.ndarray]:
    height, foot, shade = draw.uniform((0.8, 0.2, 0.3), (1.4, 0.4, 0.5))
    disc = _ring(draw, 200, foot, 1.0)
    pole = draw.uniform((-0.03, -0.03, 0), (0.03, 0.03, height), (160, 3))
    up = draw.random((240, 1))
    cone = _ring(draw, 240, 1.0, 0.0) * (shade * (1 - 0.5 * up)) + up * (0, 0, 0.4) + (0, 0, height - 0.2)
    return [disc, pole, cone]


def _dumbbell(draw: np.random.Generator) -> list[np.ndarray]:
    length, size = draw.uniform((0.5, 0.2), (1.0, 0.4))
    bar = draw.uniform((-length, -0.05, -0.05), (length, 0.05, 0.05), (240, 3))
    ball = draw.normal(size=(360, 3))
    ball *= size / np.linalg.norm(ball, axis=1, keepdims=True)
    return [bar, ball + np.where(draw.random((360, 1)) < 0.5, -1.0, 1.0) * (length, 0, 0)]


def _ring(draw: np.random.Generator, n: int, radius: float, fill: float) -> np.ndarray:
    """Points of a circle, or of the disc within it if `fill` is 1."""
    turn, out = draw.uniform(0, 2 * np.pi, n), radius * np.sqrt(1 - fill * draw.random(n))
    return np.stack([out * np.cos(turn), out * np.sin(turn), np.zeros(n)], axis=1)

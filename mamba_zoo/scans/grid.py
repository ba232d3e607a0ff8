"""Scans of a grid in rows, columns, windows, diagonals and rings.

Each is a pure function of the grid size that returns token indices `(k, m)`, token `(h, w)` being `h * width + w`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch

from ._registry import register_scan
from .core import Scan

ANY = ("image", "video", "audio", "series")
FLAT = ("image", "audio")  # images and spectrograms

# LocalMamba's windows of 7 are padded where the grid is smaller, and the state fades over empty steps: to cut them
# would change what its models compute.
_LARGEST_PADDED = 7


@register_scan("raster", modality=ANY)
def raster(*size: int) -> np.ndarray:
    """Tokens as they are stored: row by row, left to right. One direction; any number of dimensions.

    MambaVision (arXiv:2407.08083) within its windows.
    """
    return np.arange(math.prod(size))


@register_scan("column", modality=("image", "video", "audio"))
def column(*size: int) -> np.ndarray:
    """Column by column, top to bottom: the first dimension runs fastest. One direction."""
    return _tokens(*size).T.reshape(-1)


@register_scan("bidirectional", modality=ANY)
def bidirectional(*size: int) -> Scan:
    """Rows, and the same reversed; outputs are averaged. Two directions.

    Vim (arXiv:2401.09417), which halves the sum of its two directions. VideoMamba (arXiv:2403.06977) adds them.
    """
    rows = np.arange(math.prod(size))
    return Scan(torch.from_numpy(_both_ways(rows)), len(rows), "mean", size, "bidirectional")


@register_scan("cross", modality=FLAT)
def cross(height: int, width: int) -> np.ndarray:
    """Rows, columns, rows reversed, columns reversed. Four directions.

    The cross-scan of VMamba (arXiv:2401.10166).
    """
    grid = _tokens(height, width)
    return _both_ways(grid.reshape(-1), grid.T.reshape(-1))


@register_scan("snake", modality=FLAT)
def snake(height: int, width: int) -> np.ndarray:
    """Rows to and fro, the same reversed, columns to and fro, the same reversed. Four directions, no jumps.

    The continuous 2-D scan of PlainMamba (arXiv:2403.17695), in its order of directions.
    """
    rows, columns = _snake(_tokens(height, width)), _snake(_tokens(height, width).T)
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


@register_scan("window", modality=FLAT)
def window(height: int, width: int, size: int = 7) -> np.ndarray:
    """Windows one after another, rows within; the same with columns for rows; both reversed. Four directions.

    The grid is padded at the right and the bottom to whole windows with empty steps; windows of more than 7 are cut to
    a smaller grid instead. LocalMamba (arXiv:2403.09338) mixes such directions with plain rows and columns, see
    `local`.
    """
    return _both_ways(_windows(_tokens(height, width), size), _windows(_tokens(height, width).T, size))


@register_scan("local", modality=FLAT)
def local(height: int, width: int, directions: Sequence[str] = ("h", "h_flip", "w2", "w2_flip")) -> np.ndarray:
    """Directions by LocalMamba's names. As many directions as names.

    "h" rows, "v" columns, "w7" windows of 7 in rows with rows inside (any size; padded with empty steps to whole
    windows, see `window`), each also with "_flip": reversed, padding included. Shorter directions get empty steps at
    their end. LocalMamba (arXiv:2403.09338) searched four of these for every layer; the default is the list of
    LocalVim-S.

    Raises:
        ValueError: a name that is none of these, or no list of names.
    """
    if isinstance(directions, str) or not isinstance(directions, Sequence):
        raise ValueError(f"local: directions={directions!r} must be a list of names, such as ['h', 'w7_flip']")
    grid = _tokens(height, width)
    rows = []
    for name in directions:
        found = re.fullmatch(r"(h|v|w([1-9]\d*))(_flip)?", str(name))
        if not found:
            raise ValueError(f"local: direction {name!r} is unknown; use 'h', 'v' or 'w7', each also with '_flip'")
        kind, side, flip = found.groups()
        path = _windows(grid, int(side)) if side else (grid if kind == "h" else grid.T).reshape(-1)
        rows.append(path[::-1] if flip else path)
    if not rows:
        raise ValueError("local: directions is empty; name at least one, such as 'h'")
    m = max(map(len, rows))
    return np.stack([np.pad(row, (0, m - len(row)), constant_values=-1) for row in rows])


@register_scan("atrous", modality=FLAT)
def atrous(height: int, width: int, step: int = 2) -> np.ndarray:
    """Every `step`-th token of every `step`-th row, for each of the `step**2` offsets. `step**2` directions.

    Each token belongs to one direction, which has 1 / `step**2` of the length: the efficient scan of EfficientVMamba
    (arXiv:2403.09977; there `step` is 2). Offsets run down the rows first; even directions go along rows, odd ones
    along columns. The grid is padded at the right and the bottom with empty steps.
    """
    _positive(step, "atrous", "step")
    grid = _pad(_tokens(height, width), step, step)
    phases = [grid[p % step :: step, p // step :: step] for p in range(step * step)]
    return np.stack([(phase.T if p % 2 else phase).reshape(-1) for p, phase in enumerate(phases)])


@register_scan("diagonal", modality=FLAT)
def diagonal(height: int, width: int, zigzag: bool = False) -> np.ndarray:
    """Diagonals from the top left corner, diagonals from the top right corner, both reversed. Four directions.

    Every diagonal is walked downwards; with `zigzag` every other one upwards, so that the path has no long jumps.
    Diagonal directions are part of the omnidirectional scan of RS-Mamba (arXiv:2404.02668).
    """
    grid = _tokens(height, width)
    return _both_ways(_diagonals(grid, zigzag), _diagonals(grid[:, ::-1], zigzag))


@register_scan("spiral", modality=FLAT)
def spiral(height: int, width: int) -> np.ndarray:
    """Clockwise from the top left corner to the middle, and back out. Two directions, no jumps."""
    top, left, bottom, right = 0, 0, height - 1, width - 1
    grid, parts = _tokens(height, width), []
    while top <= bottom and left <= right:
        parts.append(grid[top, left : right + 1])
        parts.append(grid[top + 1 : bottom + 1, right])
        if top < bottom and left < right:
            parts.append(grid[bottom, left:right][::-1])
            parts.append(grid[top + 1 : bottom, left][::-1])
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1
    return _both_ways(np.concatenate(parts))


@register_scan("random", modality=ANY)
def random(*size: int, seed: int = 0, k: int = 4) -> np.ndarray:
    """`k` permutations without any structure: what a comparison of orders is measured against. `k` directions.

    The same for the same seed on every machine; any number of dimensions.
    """
    # Raw bits of a bit generator are stable between numpy versions; its permutations are not promised to be.
    bits = np.random.PCG64(seed).random_raw(_positive(k, "random", "k") * math.prod(size))
    return np.argsort(np.asarray(bits).reshape(k, -1), axis=1, kind="stable")


def _tokens(*size: int) -> np.ndarray:
    return np.arange(math.prod(size)).reshape(size)


def _both_ways(*paths: np.ndarray) -> np.ndarray:
    return np.stack([*paths, *(path[::-1] for path in paths)])


def _snake(grid: np.ndarray) -> np.ndarray:
    path = grid.copy()
    path[1::2] = path[1::2, ::-1]
    return path.reshape(-1)


def _pad(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    height, width = grid.shape
    return np.pad(grid, ((0, -height % rows), (0, -width % columns)), constant_values=-1)


def _windows(grid: np.ndarray, side: int) -> np.ndarray:
    _positive(side, "window", "size")
    rows, columns = (min(side, max(_LARGEST_PADDED, extent)) for extent in grid.shape)
    grid = _pad(grid, rows, columns)
    height, width = grid.shape
    return grid.reshape(height // rows, rows, width // columns, columns).swapaxes(1, 2).reshape(-1)


def _diagonals(grid: np.ndarray, zigzag: bool) -> np.ndarray:
    row, column = np.indices(grid.shape).reshape(2, -1)
    number = row + column
    within = np.where(number % 2, -row, row) if zigzag else row
    return grid.reshape(-1)[np.lexsort((within, number))]


def _positive(value: int, scan: str, option: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{scan}: {option}={value!r} must be an integer >= 1")
    return value

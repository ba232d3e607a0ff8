"""Numbers that describe a scan on its grid, for reports that compare orders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .core import Scan


def scan_statistics(scan: Scan, window: int = 16) -> dict[str, float]:
    """How far the paths jump, and how near neighbours of the grid stay in the sequence.

    Lengths are Euclidean on the grid, gaps are in steps. A pair of neighbours is two tokens that touch in one
    dimension (four neighbours in an image). Extra tokens, such as a class token, are left out.

    Args:
        scan: Any.
        window: Neighbours at most this many steps apart count as near.

    Returns:
        `directions`, `steps` (of each direction); `empty`: share of empty steps; `jump_mean` and `jump_max`: length of
        a move between successive tokens; `adjacent`: share of moves to a neighbour; `near`: share of neighbour pairs
        at most `window` steps apart, over all directions; `near_any`: share of pairs that are near in some direction;
        `gap_mean`: steps between neighbours, over all directions; `gap_best_mean`: the same for the direction that
        is best for each pair; `lost`: share of neighbour pairs that no single direction visits both of.
        Where there is nothing to count (one token), means and shares are 0.
    """
    order, places = scan.order.cpu().numpy(), scan.coordinates()
    jumps = [_jumps(places[row[(row >= 0) & (places[row, 0] >= 0)]]) for row in order]
    jump = np.concatenate(jumps)
    step = np.full((scan.k, scan.length), -1, dtype=np.int64)
    for row, found in zip(order, step, strict=True):
        found[row[row >= 0]] = np.flatnonzero(row >= 0)
    one, other = _neighbours(scan)
    visited = (step[:, one] >= 0) & (step[:, other] >= 0)
    gap = np.where(visited, np.abs(step[:, one] - step[:, other]), np.iinfo(np.int64).max)
    best = gap.min(axis=0, initial=np.iinfo(np.int64).max)
    met = visited.any(axis=0)
    return {
        "directions": float(scan.k),
        "steps": float(scan.m),
        "empty": float((order < 0).mean()),
        "jump_mean": _mean(jump),
        "jump_max": float(jump.max(initial=0.0)),
        "adjacent": _mean(jump == 1),
        "near": _mean(gap <= window),
        "near_any": _mean(best <= window),
        "gap_mean": _mean(gap[visited]),
        "gap_best_mean": _mean(best[met]),
        "lost": _mean(~met),
    }


def _jumps(path: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(path, axis=0), axis=1)


def _neighbours(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Both tokens of every pair of neighbours on the grid."""
    on_grid = np.setdiff1d(np.arange(scan.length), scan.extra)
    grid = on_grid.reshape(scan.size or -1)
    pairs = [(np.delete(grid, -1, axis).reshape(-1), np.delete(grid, 0, axis).reshape(-1)) for axis in range(grid.ndim)]
    one, other = zip(*pairs, strict=True)
    return np.concatenate(one), np.concatenate(other)


def _mean(values: npt.ArrayLike) -> float:
    values = np.asarray(values)
    return float(values.mean()) if values.size else 0.0

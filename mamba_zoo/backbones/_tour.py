"""A short path through all variates where going from one to another has a cost, not the same in both directions."""

from __future__ import annotations

import numpy as np

_PASSES = 50


def short_path(cost: np.ndarray, start: int) -> list[int]:
    """Visit every place once, from `start` to wherever the path ends.

    The nearest place next, then runs of up to three places are moved for as long as this makes the path shorter. The
    same costs always give the same path.

    Args:
        cost: `(n, n)`, from row to column, finite; the diagonal is not looked at.
        start: First place.
    """
    n = len(cost)
    left = np.ones(n, dtype=bool)
    path = [start]
    left[start] = False
    while left.any():
        path.append(int(np.where(left, cost[path[-1]], np.inf).argmin()))
        left[path[-1]] = False
    for _ in range(_PASSES):
        if not _move_runs(path, cost):
            break
    return path


def _move_runs(path: list[int], cost: np.ndarray) -> bool:
    """Move each run to its best place if that is shorter; whether anything moved. The first place stays first."""
    moved, n = False, len(path)
    for size in (1, 2, 3):
        i = 1
        while i + size <= n:
            run, rest = path[i : i + size], np.array(path[:i] + path[i + size :])
            following = np.append(rest[1:], -1)
            # Costs of the steps at the end of the path are zero: nothing follows.
            old = np.where(following < 0, 0.0, cost[rest, following])
            new = cost[rest, run[0]] + np.where(following < 0, 0.0, cost[run[-1], following])
            extra = new - old
            best = int(extra.argmin())
            if extra[best] < extra[i - 1] - 1e-9:
                path[:] = [*rest[: best + 1].tolist(), *run, *rest[best + 1 :].tolist()]
                moved = True
            i += 1
    return moved

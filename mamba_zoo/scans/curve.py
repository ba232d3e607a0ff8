"""Space-filling curves: neighbours on the grid stay near each other in the sequence, at every scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ._registry import register_scan


@register_scan("hilbert", modality=("image", "audio"))
def hilbert(height: int, width: int) -> np.ndarray:
    """A Hilbert curve, its transpose, and both reversed. Four directions, every step to a neighbour.

    Works on every grid: Hilbert's curve (Math. Ann. 38, 1891) on squares of a power of two, elsewhere the
    generalisation that splits a rectangle into three or two others (J. Cerveny's idea). Curves as scans of images:
    FractalMamba (arXiv:2405.14480).
    """
    return _curve_and_transpose(_hilbert_path, height, width)


@register_scan("zcurve", modality=("image", "video", "audio"))
def zcurve(*size: int) -> np.ndarray:
    """Morton's Z curve restricted to the grid, its transpose, and both reversed. Four directions, with jumps.

    Tokens sorted by the interleaved bits of their coordinates (G. M. Morton, IBM, 1966), the last dimension lowest;
    any number of dimensions.
    """
    return _curve_and_transpose(_zcurve_path, *size)


def _curve_and_transpose(path: Callable[..., np.ndarray], *size: int) -> np.ndarray:
    token = np.arange(math.prod(size)).reshape(size).T.reshape(-1)
    curve, transposed = path(*size), token[path(*size[::-1])]
    return np.stack([curve, transposed, curve[::-1], transposed[::-1]])


def _zcurve_path(*size: int) -> np.ndarray:
    places = np.indices(size).reshape(len(size), -1)
    code = np.zeros(places.shape[1], dtype=np.int64)
    for bit in range(max(size).bit_length()):
        for axis, place in enumerate(places[::-1]):
            code |= (place >> bit & 1) << (bit * len(size) + axis)
    return np.argsort(code, kind="stable")


def _hilbert_path(height: int, width: int) -> np.ndarray:
    # A walk over neighbours changes colour on a chessboard at every step, so it cannot join the two ends of an odd row
    # of an even number of tokens. Such a grid is walked along its height, which is even, from the right.
    if width % 2 and not height % 2:
        down, across = _hilbert_steps(height, width, {}).T
        return down * width + (width - 1 - across)
    across, down = _hilbert_steps(width, height, {}).T
    return down * width + across


def _hilbert_steps(length: int, depth: int, known: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """A walk over `length * depth` places `(along, across)`, `(length * depth, 2)`, from (0, 0) to (length - 1, 0).

    Every step is to a neighbour if `length` is even or `depth` odd. Halves are rounded to even numbers so that this
    holds for the parts as well.
    """
    if (length, depth) in known:
        return known[length, depth]
    line = np.arange(max(length, depth))
    if depth == 1 or length == 1:
        steps = np.stack([line, 0 * line] if depth == 1 else [0 * line, line], axis=1)
    elif 2 * length > 3 * depth:
        cut = _even_half(length)
        steps = np.concatenate(
            [_hilbert_steps(cut, depth, known), np.add(_hilbert_steps(length - cut, depth, known), (cut, 0))]
        )
    else:
        # Away along the near part, along the far part, and back along the near part.
        cut, far = _even_half(length), _even_half(depth)
        away = _hilbert_steps(far, cut, known)[:, ::-1]
        along = np.add(_hilbert_steps(length, depth - far, known), (0, far))
        back = np.subtract((length - 1, far - 1), _hilbert_steps(far, length - cut, known)[:, ::-1])
        steps = np.concatenate([away, along, back])
    known[length, depth] = steps
    return steps


def _even_half(n: int) -> int:
    half = n // 2
    return half + 1 if half % 2 and n > 2 else half

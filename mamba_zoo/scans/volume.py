"""Scans of a video: space first, time first, both, and walks without jumps through space and time.

Each is a pure function of frames, height and width that returns token indices `(k, m)`; token `(t, h, w)` is
`(t * height + h) * width + w`.
"""

from __future__ import annotations

import numpy as np

from ._registry import register_scan
from .curve import hilbert
from .grid import snake


@register_scan("spatial_first", modality="video")
def spatial_first(frames: int, height: int, width: int) -> np.ndarray:
    """Frame after frame, row by row in each; and the same reversed. Two directions.

    The scan that VideoMamba (arXiv:2403.06977) settled on, there called "Spatial-First".
    """
    tokens = _tokens(frames, height, width)
    return _both_ways(tokens.reshape(-1))


@register_scan("temporal_first", modality="video")
def temporal_first(frames: int, height: int, width: int) -> np.ndarray:
    """Place after place, row by row, through all frames at each; and the same reversed. Two directions.

    "Temporal-First" of VideoMamba (arXiv:2403.06977).
    """
    tokens = _tokens(frames, height, width)
    return _both_ways(tokens.transpose(1, 2, 0).reshape(-1))


@register_scan("spatiotemporal", modality="video")
def spatiotemporal(frames: int, height: int, width: int) -> np.ndarray:
    """Space first and time first, both reversed. Four directions.

    "Spatiotemporal" of VideoMamba (arXiv:2403.06977) combines these two.
    """
    tokens = _tokens(frames, height, width)
    return _both_ways(tokens.reshape(-1), tokens.transpose(1, 2, 0).reshape(-1))


@register_scan("cross_video", modality="video")
def cross_video(frames: int, height: int, width: int) -> np.ndarray:
    """Frames in rows, frames in columns, places through time, all reversed. Six directions.

    The cross-scan of VMamba (arXiv:2401.10166) with a third axis: along each of the three some direction runs fastest.
    """
    tokens = _tokens(frames, height, width)
    return _both_ways(*(tokens.transpose(axes).reshape(-1) for axes in ((0, 1, 2), (0, 2, 1), (1, 2, 0))))


@register_scan("snake_video", modality="video")
def snake_video(frames: int, height: int, width: int) -> np.ndarray:
    """Rows to and fro, frames to and fro; then a snake over the places, through time to and fro; both reversed.

    Four directions, every step to a neighbour in space or in time. PlainMamba's continuous scan (arXiv:2403.17695) with
    a third axis.
    """
    return _through_space_and_time(snake(height, width)[0], frames)


@register_scan("hilbert_video", modality="video")
def hilbert_video(frames: int, height: int, width: int) -> np.ndarray:
    """A Hilbert curve in every frame, every other frame backwards; then one over the places, through time to and fro.

    Four directions with both reversed, every step to a neighbour in space or in time. The first keeps neighbours in
    space near each other, the second neighbours in time.
    """
    return _through_space_and_time(hilbert(height, width)[0], frames)


def _through_space_and_time(path: np.ndarray, frames: int) -> np.ndarray:
    """Frame after frame along `path (h * w,)`, and place after place along it through time; both ways."""
    places = np.arange(frames * len(path)).reshape(frames, -1)[:, path]
    return _both_ways(_to_and_fro(places), _to_and_fro(places.T))


def _to_and_fro(runs: np.ndarray) -> np.ndarray:
    """One run after another, every other one backwards, so that each begins where the last one ended."""
    path = runs.copy()
    path[1::2] = path[1::2, ::-1]
    return path.reshape(-1)


def _tokens(*size: int) -> np.ndarray:
    return np.arange(np.prod(size)).reshape(size)


def _both_ways(*paths: np.ndarray) -> np.ndarray:
    return np.stack([*paths, *(path[::-1] for path in paths)])

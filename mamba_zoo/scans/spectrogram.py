"""Scans of a spectrogram: along time, along frequency, and window by window.

Each is a pure function of frequency bands and frames that returns token indices `(k, m)`; token `(f, t)` is
`f * frames + t`, band 0 the lowest. The scans of images serve spectrograms too: see `list_scans(modality="audio")`.
"""

from __future__ import annotations

import numpy as np

from ._registry import register_scan


@register_scan("time_first", modality="audio")
def time_first(bands: int, frames: int) -> np.ndarray:
    """One band after another through all frames; and the same reversed. Two directions.

    The order of AuM (arXiv:2406.03344) and of SSAMBA (arXiv:2405.11831).
    """
    return _both_ways(_tokens(bands, frames).reshape(-1))


@register_scan("frequency_first", modality="audio")
def frequency_first(bands: int, frames: int) -> np.ndarray:
    """One frame after another through all bands; and the same reversed. Two directions.

    Everything that sounds at one time is read before what comes next, so that its first direction is causal in time.
    """
    return _both_ways(_tokens(bands, frames).T.reshape(-1))


@register_scan("time_window", modality="audio")
def time_window(bands: int, frames: int, size: int = 4) -> np.ndarray:
    """Windows of `size` frames one after another, band by band through the window; and the same reversed.

    Two directions. Between `frequency_first`, which is `size` 1, and `time_first`, which is one window of all frames;
    the last window may be shorter.

    Raises:
        ValueError: `size` is no integer of at least 1.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"time_window: size={size!r} must be an integer >= 1")
    tokens = _tokens(bands, frames)
    return _both_ways(np.concatenate([tokens[:, start : start + size].reshape(-1) for start in range(0, frames, size)]))


def _tokens(bands: int, frames: int) -> np.ndarray:
    return np.arange(bands * frames).reshape(bands, frames)


def _both_ways(path: np.ndarray) -> np.ndarray:
    return np.stack([path, path[::-1]])

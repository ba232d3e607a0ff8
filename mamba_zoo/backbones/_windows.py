"""A map as a batch of square windows, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_windows(x: Tensor, side: int) -> Tensor:
    """A map in windows, zeros added at the right and the bottom to fill the last ones.

    Args:
        x: `(b, h, w, d)`.
        side: Positions per side of a window.

    Returns:
        `(b * windows, side * side, d)`; windows in raster order within each sample, and positions within each window.
    """
    b, h, w, d = x.shape
    if h % side or w % side:
        x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    return x.view(b, rows, side, columns, side, d).transpose(2, 3).reshape(-1, side * side, d)


def join_windows(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """Undo `split_windows` on a map of `height` and `width`, without what it added.

    Args:
        windows: `(b * windows, side * side, d)`.
        side: Positions per side of a window.
        height: Of the map.
        width: Of the map.

    Returns:
        `(b, height, width, d)`.
    """
    rows, columns = -(-height // side), -(-width // side)
    x = windows.view(-1, rows, columns, side, side, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, windows.shape[-1])[:, :height, :width]

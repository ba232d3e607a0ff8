"""What the MLP's backward pass needs between its products, through Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import as_dtype
from ._launch import launch, stored_dtype
from ._mlp_kernels import column_sums, gelu_backward

# Columns and rows of a tile: 16 of its numbers a thread, 72 registers on sm_90, nothing spilled.
BLOCK, TILE = 128, 16
PROGRAMS = 4096  # a few waves of any GPU, so that the last one costs little
LEAST = 4  # tiles that a program visits, if there are as many


def gelu_gradient(h: Tensor, g: Tensor, again: bool, bias: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the backward pass needs of the GELU of `h`, in one pass over memory.

    Args:
        h: `(rows, columns)`, contiguous.
        g: The gradient of `gelu(h)`, contiguous; overwritten.
        again: Whether to compute `gelu(h)`.
        bias: Whether to sum the gradient of `h` over rows.

    Returns:
        The gradient of `h`; `gelu(h)` or None; the sums `(columns,)` or None.
    """
    rows, columns = h.shape
    dtype = g.dtype
    g = as_dtype(g, stored_dtype(g))
    y = torch.empty_like(g) if again else None
    programs, parts = tiling(rows, columns)
    sums = h.new_empty((parts, columns), dtype=torch.float32) if bias else None
    launch(gelu_backward, programs, h, h, g, y, sums, rows, columns, BLOCK=BLOCK, TILE=TILE, num_warps=4)
    total = None if sums is None else _sum_parts(sums, dtype)
    return as_dtype(g, dtype), None if y is None else as_dtype(y, dtype), total


def sum_columns(x: Tensor) -> Tensor:
    """Sums `(columns,)` of a contiguous `(rows, columns)`, added in float32, in its dtype."""
    rows, columns = x.shape
    programs, parts = tiling(rows, columns)
    sums = x.new_empty((parts, columns), dtype=torch.float32)
    launch(column_sums, programs, x, x, sums, rows, columns, BLOCK=BLOCK, TILE=TILE, num_warps=4)
    return _sum_parts(sums, x.dtype)


def tiling(rows: int, columns: int) -> tuple[int, int]:
    """Programs, and the parts that they cut the rows into."""
    blocks = -(-columns // BLOCK)
    parts = max(1, min(PROGRAMS // max(1, blocks), -(-rows // (TILE * LEAST))))
    return parts * blocks, parts


def _sum_parts(sums: Tensor, dtype: torch.dtype) -> Tensor:
    parts, columns = sums.shape
    total = sums.new_empty(columns, dtype=stored_dtype(sums, dtype))
    # Few columns a program, as one program sums all rows.
    launch(column_sums, -(-columns // 8), sums, sums, total, parts, columns, BLOCK=8, TILE=512, num_warps=4)
    return as_dtype(total, dtype)

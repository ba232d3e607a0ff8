"""Residual addition and norm through Triton: one pass forward, one backward, and a sum over the parts of `dweight`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import as_dtype
from ._launch import launch, stored_dtype
from ._norm_kernels import add_norm_backward, add_norm_forward

_ELEMENTS = 2048  # of a tile of rows
_PARTS = 528  # programs of the backward pass, each with a partial sum of the weights' gradients


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream, the normed tokens, and what the gradient needs of each row; all tensors are contiguous."""
    d = x.shape[-1]
    rows, block, tile = _tiling(x)
    stream, stream_dtype = x, x.dtype
    if branch is not None:
        stream_dtype = torch.promote_types(x.dtype, branch.dtype)
        stream = torch.empty_like(x, dtype=stored_dtype(x, stream_dtype))
    y = torch.empty_like(x, dtype=stored_dtype(x, out_dtype))
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    launch(
        add_norm_forward, -(-rows // tile), x,
        x, branch, scale, weight, bias, stream, y, statistics, rows, d, rows // max(1, x.shape[0]), eps,
        RMS=rms, BLOCK=block, TILE=tile, num_warps=4,
    )  # fmt: skip
    return as_dtype(stream, stream_dtype), as_dtype(y, out_dtype), statistics


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    rms: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of x, branch (None without one, or if it is that of x), weight and bias; all tensors contiguous."""
    d = stream.shape[-1]
    rows, block, tile = _tiling(stream)
    parts = max(1, min(_PARTS, -(-rows // tile)))
    dx = torch.empty_like(stream, dtype=stored_dtype(stream, x_dtype))
    apart = branch_dtype is not None and (branch_dtype != x_dtype or scale is not None)
    dbranch = torch.empty_like(stream, dtype=stored_dtype(stream, branch_dtype)) if apart else None
    partial = stream.new_empty((2, parts, d), dtype=torch.float32)
    launch(
        add_norm_backward, parts, stream,
        dy, dstream, stream, scale, weight, statistics, dx, dbranch, partial, rows,
        rows // max(1, stream.shape[0]), RMS=rms, D=d, BLOCK=block, TILE=tile, num_warps=4,
    )  # fmt: skip
    dweight, dbias = partial.sum(1)
    return (
        as_dtype(dx, x_dtype),
        None if dbranch is None or branch_dtype is None else as_dtype(dbranch, branch_dtype),
        as_dtype(dweight, weight.dtype),
        None if bias_dtype is None else as_dtype(dbias, bias_dtype),
    )


def _tiling(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels of a tile (all of them), and rows of a tile."""
    d = x.shape[-1]
    block = 1 << (d - 1).bit_length()
    return x.numel() // d, block, max(1, _ELEMENTS // block)

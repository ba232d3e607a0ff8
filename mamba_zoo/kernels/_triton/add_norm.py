"""Residual addition and norm through Triton: one pass forward, one backward, and a sum over the parts of `dweight`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import contiguous, launch, stored_dtype
from ._norm_kernels import add_norm_backward, add_norm_forward

_ELEMENTS = 2048  # of a tile of rows
_PARTS = 528  # programs of the backward pass, each with a partial sum of the weights' gradients


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The stream and the normed tokens; see `kernels.add_norm`."""
    if branch is None:
        return x, _AddNorm.apply(x, None, None, weight, bias, eps, rms, out_dtype)
    return _AddNorm.apply(x, branch, scale, weight, bias, eps, rms, out_dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, scale, weight, bias, eps, rms, out_dtype):
        d = x.shape[-1]
        x, branch, scale, weight, bias = (contiguous(t) for t in (x, branch, scale, weight, bias))
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
        ctx.save_for_backward(stream, scale, weight, statistics)
        ctx.rms, ctx.dtypes = (
            rms,
            (x.dtype, None if branch is None else branch.dtype, None if bias is None else bias.dtype),
        )
        ctx.set_materialize_grads(False)
        y = _as(y, out_dtype)
        return y if branch is None else (_as(stream, stream_dtype), y)

    @staticmethod
    def backward(ctx, *grads):
        stream, scale, weight, statistics = ctx.saved_tensors
        x_dtype, branch_dtype, bias_dtype = ctx.dtypes
        dstream, dy = grads if branch_dtype is not None else (None, grads[0])
        if dy is None:  # the normed tokens were not used
            dy = torch.zeros_like(stream)
        dy, dstream = contiguous(dy), contiguous(dstream)
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
            rows // max(1, stream.shape[0]), RMS=ctx.rms, D=d, BLOCK=block, TILE=tile, num_warps=4,
        )  # fmt: skip
        dweight, dbias = partial.sum(1)
        dx = _as(dx, x_dtype)
        if branch_dtype is not None:
            dbranch = dx if dbranch is None else _as(dbranch, branch_dtype)
        return (
            dx, dbranch, None, _as(dweight, weight.dtype), None if bias_dtype is None else _as(dbias, bias_dtype),
            None, None, None,
        )  # fmt: skip


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _tiling(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels of a tile (all of them), and rows of a tile."""
    d = x.shape[-1]
    block = 1 << (d - 1).bit_length()
    return x.numel() // d, block, max(1, _ELEMENTS // block)

"""The MLP through Triton: torch multiplies, and one kernel does what lies between the products of the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import contiguous, launch, stored_dtype
from ._mlp_kernels import column_sums, gelu_backward

# Columns and rows of a tile: 16 of its numbers a thread, 72 registers on sm_90, nothing spilled.
BLOCK, TILE = 128, 16
PROGRAMS = 4096  # a few waves of any GPU, so that the last one costs little
LEAST = 4  # tiles that a program visits, if there are as many


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The MLP, computed in `dtype`; see `kernels.mlp`."""
    # Casts are nodes of their own, as autocast's are: with them gradients have the dtype of their tensors.
    return _Mlp.apply(*(t if t is None else _as(t, dtype) for t in (x, weight1, bias1, weight2, bias2)))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight1, bias1, weight2, bias2):
        h = F.linear(x, weight1, bias1)
        x_wanted, weight1_wanted, bias1_wanted, weight2_wanted, _ = ctx.needs_input_grad
        below = x_wanted or weight1_wanted or bias1_wanted
        ctx.save_for_backward(
            x if weight1_wanted else None, h if below or weight2_wanted else None,
            weight1 if x_wanted else None, weight2 if below else None,
        )  # fmt: skip
        return F.linear(F.gelu(h), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, weight1, weight2 = ctx.saved_tensors
        x_wanted, weight1_wanted, bias1_wanted, weight2_wanted, bias2_wanted = ctx.needs_input_grad
        dx = dweight1 = dbias1 = dweight2 = dbias2 = None
        dh: Any = None
        y: Any = None
        leading = dout.shape[:-1]
        dout = _matrix(dout)
        if weight2 is not None:
            dh, y, dbias1 = gelu_gradient(_matrix(h), dout @ weight2, weight2_wanted, bias1_wanted)
        elif weight2_wanted:
            y = F.gelu(_matrix(h))
        if weight2_wanted:
            dweight2 = dout.t() @ y
            del y
        if bias2_wanted:
            dbias2 = sum_columns(dout)
        if weight1_wanted:
            dweight1 = dh.t() @ _matrix(x)
        if x_wanted:
            dx = (dh @ weight1).view(*leading, weight1.shape[1])
        return dx, dweight1, dbias1, dweight2, dbias2


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
    g = _as(g, stored_dtype(g))
    y = torch.empty_like(g) if again else None
    programs, parts = tiling(rows, columns)
    sums = h.new_empty((parts, columns), dtype=torch.float32) if bias else None
    launch(gelu_backward, programs, h, h, g, y, sums, rows, columns, BLOCK=BLOCK, TILE=TILE, num_warps=4)
    return _as(g, dtype), None if y is None else _as(y, dtype), None if sums is None else _sum_parts(sums, dtype)


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
    return _as(total, dtype)


def _matrix(x: Tensor) -> Tensor:
    return contiguous(x).view(-1, x.shape[-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)

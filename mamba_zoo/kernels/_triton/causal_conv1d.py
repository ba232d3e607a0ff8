"""The causal convolution through Triton: launch shapes, buffers and the sums that follow the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import contiguous, with_unit_stride
from .._conv_args import ConvArgs
from .._plans import Plans
from ._conv_kernels import (
    conv_backward_state,
    conv_backward_weight,
    conv_backward_x,
    conv_final_state,
    conv_forward,
)
from ._launch import common_width, launch, needs_wide_offsets, stored_dtype, strides

_STEPS = 16  # of a tile
_RUN = 8  # tiles of a program that sums gradients of weights
_layouts: Plans[_Layout] = Plans()


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    x = with_unit_stride(s.x)
    c = _layout(s, x)
    weight, bias, initial = _parameters(s)
    y = (x.new_empty if s.complete else x.new_zeros)(c.rows_shape, dtype=stored_dtype(x))
    final = s.new_state() if want_final else None
    launch(
        conv_forward, c.programs(c.tiles), x,
        x, weight, bias, s.order, s.offsets, _row_of(s), initial, y, *c.sizes(c.tiles), *c.x_strides,
        SILU=s.silu, W=c.w, T=_STEPS, BD=c.channels, V=c.width, WIDE=c.wide,
    )  # fmt: skip
    if final is not None and c.w > 1:
        launch(
            conv_final_state, c.states * c.k * c.blocks, x,
            x, s.order, s.offsets, initial, final, *c.state_sizes, *strides(x), W=c.w, BD=c.channels, WIDE=c.wide,
        )  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype), final


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    x, dy = with_unit_stride(s.x), with_unit_stride(dy)
    c = _layout(s, x, dy)
    weight, bias, initial = _parameters(s)
    row_of = _row_of(s)
    dfinal = None if c.w == 1 else contiguous(dfinal)
    runs = max(1, -(-c.tiles // _RUN))
    new_rows, stored = x.new_empty if s.complete else x.new_zeros, stored_dtype(x)
    dx = new_rows(c.dx_shape, dtype=stored)
    g = new_rows(c.rows_shape, dtype=stored) if s.silu else dy
    g_strides = c.rows_strides if s.silu else c.dy_strides
    dweight = weight.new_empty((c.b * runs, c.k, c.w, c.d))
    dbias = None if bias is None else weight.new_empty((c.b * runs, c.k, c.d))
    dinitial = (
        None if s.initial_state is None else torch.empty_like(s.initial_state, memory_format=torch.contiguous_format)
    )
    fixed = {"W": c.w, "BD": c.channels, "WIDE": c.wide}
    launch(
        conv_backward_weight, c.programs(runs), x,
        x, weight, bias, s.order, s.offsets, row_of, initial, dy, g, dweight, dbias, *c.sizes(runs),
        *c.x_strides, *c.dy_strides, _RUN, SILU=s.silu, T=_STEPS, V=c.width, **fixed,
    )  # fmt: skip
    launch(
        conv_backward_x, c.programs(c.tiles), x,
        g, weight, s.order, s.offsets, row_of, dfinal, dx, *c.sizes(c.tiles), *g_strides,
        T=_STEPS, V=c.width, **fixed,
    )  # fmt: skip
    if dinitial is not None and c.w > 1:
        launch(
            conv_backward_state, c.states * c.k * c.blocks, x,
            g, weight, s.order, s.offsets, dfinal, dinitial, *c.state_sizes, *strides(g), **fixed,
        )  # fmt: skip
    if dx.dim() > s.x.dim():
        dx = dx.sum(2)
    grads = {
        "x": dx if dx.dtype == x.dtype else dx.to(x.dtype),
        "weight": dweight.sum(0).transpose(1, 2).contiguous(),
    }
    if dbias is not None:
        grads["bias"] = dbias.sum(0)
    if dinitial is not None:
        grads["initial_state"] = dinitial
    return grads


class _Layout:
    """What shapes, strides and alignment decide, worked out once for all calls that share them."""

    def __init__(self, s: ConvArgs, x: Tensor, dy: Tensor | None):
        self.b, l, self.k, self.d = self.rows_shape = (s.b, s.l, s.k, s.d)
        self.w, self.states = s.w, s.states
        self.dx_shape = (
            tuple(x.shape) if self.k == 1 else self.rows_shape
        )  # a part per direction, summed if x is shared
        self.width = width = common_width([x, dy], self.d)
        self.wide = l * self.k * self.d >= 2**31 or needs_wide_offsets(x, dy)
        self.channels = min(64, max(8, 1 << (self.d - 1).bit_length()))
        self.blocks = -(-self.d // self.channels)
        self.tiles = -(-s.m // _STEPS)
        self.x_strides = strides(x, width)
        self.dy_strides = (0, 0, 0) if dy is None else strides(dy, width)
        row = self.k * self.d // width
        self.rows_strides = (l * row, row, self.d // width)
        order = (s.order.stride(0) if s.order.shape[0] > 1 else 0, s.order.stride(1))
        self.state_sizes = (s.m, self.k, self.d, self.blocks, self.states, *order)
        self._sizes = (l, s.m, self.k, self.d, self.blocks), (self.states, *order)

    def programs(self, tiles: int) -> int:
        return self.b * self.k * tiles * self.blocks

    def sizes(self, tiles: int) -> tuple[int, ...]:
        before, after = self._sizes
        return *before, tiles, *after


def _layout(s: ConvArgs, x: Tensor, dy: Tensor | None = None) -> _Layout:
    """The layout of a call; working it out takes 10 us, finding it one."""
    key = (
        x.shape, x.stride(), x.dtype, s.weight.shape, s.order.shape, s.order.stride(),
        None if s.offsets is None else s.offsets.shape, None if dy is None else dy.stride(),
        (x.data_ptr() | (0 if dy is None else dy.data_ptr())) & 15,
    )  # fmt: skip
    found = _layouts.get(key)
    return _layouts.keep(key, _Layout(s, x, dy)) if found is None else found


def _parameters(s: ConvArgs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and the state before the first step, as the kernels read them."""
    return contiguous(s.weight), contiguous(s.bias), None if s.w == 1 else contiguous(s.initial_state)


def _row_of(s: ConvArgs) -> Tensor | None:
    """The packed sequence that each step belongs to."""
    if s.offsets is None:
        return None
    step = torch.arange(s.m, dtype=torch.int32, device=s.x.device).expand(s.k, -1).contiguous()
    row = torch.searchsorted(s.offsets[:, 1:].contiguous(), step, right=True, out_int32=True)
    return row.clamp_(max=s.states - 1)

"""The causal convolution through Triton: launch shapes, buffers and the sums that follow the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._conv_args import ConvArgs
from ._conv_kernels import (
    conv_backward_state,
    conv_backward_weight,
    conv_backward_x,
    conv_final_state,
    conv_forward,
)
from ._launch import common_width, contiguous, launch, needs_wide_offsets, stored_dtype, strides, with_unit_stride

_STEPS = 16  # of a tile
_RUN = 8  # tiles of a program that sums gradients of weights


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    c = _Call(s, with_unit_stride(s.x))
    y = c.new_rows()
    final = s.new_state() if want_final else None
    launch(
        conv_forward, c.programs(c.tiles), s.x,
        c.x, c.weight, c.bias, s.order, s.offsets, c.row_of, c.initial, y, *c.sizes(c.tiles), *c.strides_of(c.x),
        SILU=s.silu, W=s.w, T=_STEPS, BD=c.channels, V=c.width, WIDE=c.wide,
    )  # fmt: skip
    if final is not None and s.w > 1:
        launch(
            conv_final_state, s.states * s.k * c.blocks, s.x,
            c.x, s.order, s.offsets, c.initial, final, *c.state_sizes(), *strides(c.x),
            W=s.w, BD=c.channels, WIDE=c.wide,
        )  # fmt: skip
    return y if y.dtype == s.x.dtype else y.to(s.x.dtype), final


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    dy = with_unit_stride(dy)
    c = _Call(s, with_unit_stride(s.x), dy)
    dfinal = None if dfinal is None or s.w == 1 else dfinal.contiguous()
    runs = max(1, -(-c.tiles // _RUN))
    dx = c.new_rows()
    g = c.new_rows() if s.silu else dy
    dweight = s.weight.new_empty((s.b * runs, s.k, s.w, s.d))
    dbias = None if s.bias is None else s.weight.new_empty((s.b * runs, s.k, s.d))
    dinitial = (
        None if s.initial_state is None else torch.empty_like(s.initial_state, memory_format=torch.contiguous_format)
    )
    fixed = {"W": s.w, "BD": c.channels, "WIDE": c.wide}
    launch(
        conv_backward_weight, c.programs(runs), s.x,
        c.x, c.weight, c.bias, s.order, s.offsets, c.row_of, c.initial, dy, g, dweight, dbias, *c.sizes(runs),
        *c.strides_of(c.x), *c.strides_of(dy), _RUN, SILU=s.silu, T=_STEPS, V=c.width, **fixed,
    )  # fmt: skip
    launch(
        conv_backward_x, c.programs(c.tiles), s.x,
        g, c.weight, s.order, s.offsets, c.row_of, dfinal, dx, *c.sizes(c.tiles), *c.strides_of(g),
        T=_STEPS, V=c.width, **fixed,
    )  # fmt: skip
    if dinitial is not None and s.w > 1:
        launch(
            conv_backward_state, s.states * s.k * c.blocks, s.x,
            g, c.weight, s.order, s.offsets, dfinal, dinitial, *c.state_sizes(), *strides(g), **fixed,
        )  # fmt: skip
    if s.x.dim() == 3:
        dx = dx[:, :, 0] if s.k == 1 else dx.sum(2)
    grads = {
        "x": dx if dx.dtype == s.x.dtype else dx.to(s.x.dtype),
        "weight": dweight.sum(0).transpose(1, 2).contiguous(),
    }
    if dbias is not None:
        grads["bias"] = dbias.sum(0)
    if dinitial is not None:
        grads["initial_state"] = dinitial
    return grads


class _Call:
    """The arguments as the kernels read them, and the sizes that every launch needs."""

    def __init__(self, s: ConvArgs, x: Tensor, dy: Tensor | None = None):
        self.s, self.x = s, x
        self.weight, self.bias = contiguous(s.weight), contiguous(s.bias)
        self.initial = None if s.w == 1 else contiguous(s.initial_state)
        self.width = common_width([x, dy], s.d)
        self.wide = s.l * s.k * s.d >= 2**31 or needs_wide_offsets(x, dy)
        self.channels = min(64, max(8, 1 << (s.d - 1).bit_length()))
        self.blocks = -(-s.d // self.channels)
        self.tiles = -(-s.m // _STEPS)
        self.row_of = None
        if s.offsets is not None:
            step = torch.arange(s.m, dtype=torch.int32, device=x.device).expand(s.k, -1).contiguous()
            self.row_of = torch.searchsorted(s.offsets[:, 1:].contiguous(), step, right=True, out_int32=True)
            self.row_of.clamp_(max=s.states - 1)
        per_sample = s.order.shape[0] > 1
        self.order_strides = (s.order.stride(0) if per_sample else 0, s.order.stride(1))

    def new_rows(self) -> Tensor:
        """`(b, l, k, d)`, zero under tokens that are not visited."""
        s = self.s
        make = s.x.new_empty if s.complete else s.x.new_zeros
        return make((s.b, s.l, s.k, s.d), dtype=stored_dtype(s.x))

    def programs(self, tiles: int) -> int:
        return self.s.b * self.s.k * tiles * self.blocks

    def sizes(self, tiles: int) -> tuple[int, ...]:
        s = self.s
        return s.l, s.m, s.k, s.d, self.blocks, tiles, s.states, *self.order_strides

    def state_sizes(self) -> tuple[int, ...]:
        s = self.s
        return s.m, s.k, s.d, self.blocks, s.states, *self.order_strides

    def strides_of(self, x: Tensor) -> tuple[int, int, int]:
        return strides(x, self.width)

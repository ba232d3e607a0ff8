"""The causal convolution on the CPU: float32 loops compiled by numba, several threads, deterministic.

Half-precision tokens are converted by torch before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._conv_args import ConvArgs
from ._conv import backward_kernel, forward_kernel, scratch_floats
from ._simd import W
from ._tensors import address, new, plain, rows, token_rows, visits


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    x = token_rows(s.x)
    weight, bias, initial = plain(s.weight), plain(s.bias), plain(s.initial_state)
    y = new((s.b, s.l, s.k, s.d), s.complete)
    final = s.new_state() if want_final else None
    blocks = -(-s.d // W)
    forward_kernel(
        items=s.states * blocks * s.k, scratch_floats=scratch_floats(s.w),
        rows=s.states, blocks=blocks, split=True, k=s.k, d=s.d, w=s.w, m=s.m, silu=s.silu,
        weight=address(weight), bias=address(bias), initial=address(initial), offsets=address(s.offsets),
        final=address(final), **visits(s.order), **rows("x", x), **rows("y", y),
    )  # fmt: skip
    return y.to(s.x.dtype), final


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    x, dy = token_rows(s.x), token_rows(dy)
    weight, bias, initial, dfinal = plain(s.weight), plain(s.bias), plain(s.initial_state), plain(dfinal)
    dx = new(tuple(s.x.shape), s.complete)
    dinitial = None if s.initial_state is None else torch.empty(s.initial_state.shape)
    blocks, row_groups = -(-s.d // W), min(s.states, 32)
    dweight, dbias = torch.empty(row_groups, *s.weight.shape), torch.empty(row_groups, s.k, s.d)
    split = s.k == 1 or s.x.dim() == 4
    backward_kernel(
        items=row_groups * blocks * (s.k if split else 1), scratch_floats=scratch_floats(s.w),
        rows=s.states, row_groups=row_groups, blocks=blocks, split=split, k=s.k, d=s.d, w=s.w, m=s.m, silu=s.silu,
        add=not split, complete=s.complete, weight=address(weight), bias=address(bias), initial=address(initial),
        offsets=address(s.offsets), dfinal=address(dfinal), dinitial=address(dinitial), dweight=address(dweight),
        dbias=address(dbias), **visits(s.order), **rows("x", x), **rows("dy", dy), **rows("dx", dx),
    )  # fmt: skip
    grads = {"x": dx, "weight": dweight.sum(0), "bias": dbias.sum(0), "initial_state": dinitial}
    return {name: grads[name].to(given.dtype) for name, given in s.differentiable().items()}

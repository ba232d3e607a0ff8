"""Formulas with which `torch.utils.flop_counter.FlopCounterMode` counts the ops, on any device, meta included.

A multiply-add is 2. Counted are steps visited, m per direction, not tokens: a scan that skips tokens is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import causal_conv1d, selective_scan, ssd  # noqa: F401 - the ops must exist

Shape = Sequence[int]


def selective_scan_flops(dt: Shape, A: Shape, order: Shape, skip: bool, gate: bool) -> int:
    """Of one forward pass: `9 b m d n` per direction, plus `b m d` for `D` and as much for the gate.

    The convention of the VMamba code (arXiv:2401.10166), which counts the exponential as one multiplication and leaves
    softplus out.

    Args:
        dt: Shape `(b, l, k, d)`.
        A: Shape `(k, d, n)`.
        order: Shape `(1 | b, k, m)`.
        skip: Whether `D` is given.
        gate: Whether `z` is given.
    """
    per_state = dt[0] * order[-2] * order[-1] * dt[3]
    return per_state * (9 * A[2] + skip + gate)


def causal_conv1d_flops(x: Shape, weight: Shape, order: Shape) -> int:
    """Of one forward pass: `2 b m d w` per direction; bias and activation are left out, as torch does for conv1d.

    Args:
        x: Shape `(b, l, d)` or `(b, l, k, d)`.
        weight: Shape `(k, d, w)`.
        order: Shape `(1 | b, k, m)`.
    """
    return 2 * x[0] * order[-2] * order[-1] * weight[1] * weight[2]


def ssd_flops(x: Shape, dt: Shape, B: Shape, order: Shape, skip: bool) -> int:
    """Of one forward pass: `5 b m h p n` per direction, plus `2 b m h p` for `D`.

    Of the recurrence, whatever the chunks: decay, input and sum of a state are 3, the product with C is 2. Products of
    matrices, by which it is computed, are more, and how many depends on the backend.

    Args:
        x: Shape `(b, l, h, p)` or `(b, l, k, h, p)`.
        dt: Shape `(b, l, k, h)`.
        B: Shape `(b, l, k, g, n)`.
        order: Shape `(1 | b, k, m)`.
        skip: Whether `D` is given.
    """
    return dt[0] * order[-2] * order[-1] * dt[3] * x[-1] * (5 * B[-1] + 2 * skip)


@register_flop_formula(torch.ops.mamba_zoo.selective_scan)
def _scan(u, dt, A, B, C, D, z, dt_bias, order, *others: Any, **keywords: Any) -> int:
    return selective_scan_flops(dt, A, order, D is not None, z is not None)


@register_flop_formula(torch.ops.mamba_zoo.selective_scan_backward)
def _scan_backward(dy, dfinal, saved, u, dt, A, B, C, D, z, dt_bias, order, *others: Any, **keywords: Any) -> int:
    # Like torch's own formulas: what is recomputed counts as nothing, and every product has two gradients.
    return 2 * selective_scan_flops(dt, A, order, D is not None, z is not None)


@register_flop_formula(torch.ops.mamba_zoo.ssd)
def _ssd(x, dt, A, B, C, D, decay, dt_bias, order, *others: Any, **keywords: Any) -> int:
    return ssd_flops(x, dt, B, order, D is not None)


@register_flop_formula(torch.ops.mamba_zoo.ssd_backward)
def _ssd_backward(dy, dfinal, saved, x, dt, A, B, C, D, decay, dt_bias, order, *others: Any, **keywords: Any) -> int:
    return 2 * ssd_flops(x, dt, B, order, D is not None)


@register_flop_formula(torch.ops.mamba_zoo.causal_conv1d)
def _conv(x, weight, bias, order, *others: Any, **keywords: Any) -> int:
    return causal_conv1d_flops(x, weight, order)


@register_flop_formula(torch.ops.mamba_zoo.causal_conv1d_backward)
def _conv_backward(dy, dfinal, x, weight, bias, order, *others: Any, **keywords: Any) -> int:
    return 2 * causal_conv1d_flops(x, weight, order)

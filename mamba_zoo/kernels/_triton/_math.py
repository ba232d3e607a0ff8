"""Scalar functions shared by the Triton kernels: rational to the last few bits in float32, without libdevice."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_of_negative(x):
    """e^x for x <= 0 with the rounding of x * log2(e) made good; exp2 alone loses a digit at x = -30."""
    y = x * LOG2E
    lost = tl.fma(x, LOG2E, -y) + x * 1.925963033500011e-8
    e = tl.exp2(y)
    return e + e * (lost * LN2)


@triton.jit
def softplus_and_slope(x):
    """log(1 + e^x) and its derivative, relative error under 1e-6 from -85 up.

    log1p(e) / e is a minimax polynomial on 0 <= e <= 1: log2(1 + e) would lose the relative accuracy of small steps.
    """
    e = exp_of_negative(-tl.abs(x))
    p = e * 0.0054235478 - 0.0302387524
    p = p * e + 0.0793619638
    p = p * e - 0.137542084
    p = p * e + 0.191463041
    p = p * e - 0.24852876
    p = p * e + 0.333204102
    p = p * e - 0.499995861
    p = p * e + 1.0
    slope = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return tl.maximum(x, 0.0) + p * e, slope


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); an overflow of e^-x ends in 0, as it should."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))

"""The depthwise convolution of maps whose channels lie last, and SiLU after it, as one pass over memory on a GPU.

In plain torch the forward pass is two kernels and the backward pass three, or four with a bias, which move 1.6 times
the bytes; and cuDNN prepares each new shape of a map when a process first meets it (docs/kernels.md has the times).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import asked_for, autocast, check_floating, check_tensors, contiguous, with_unit_stride
from ._backend import choose, gpu_backend, implementation
from ._op import applied, differentiable_once, watched

ACTIVATIONS = (None, "silu")
_MOST_TAPS = 9  # whose gradients a thread holds in registers


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, backend: str = "auto"
) -> Tensor:
    """Convolve every channel of a map with its own taps, at stride 1, with zeros beyond the edges.

        y[i, j] = act(bias + (weight[a, c] * x[i + a - kh // 2, j + c - kw // 2]).sum(a, c))

    Sums are float32 (float64 for float64 maps); kernels take weights as they are. Under autocast x is cast to its
    dtype. Differentiable once with kernels, otherwise at will.

    Args:
        x: Maps `(b, h, w, d)`; nothing is copied if channels are neighbours in memory.
        weight: Taps `(d, 1, kh, kw)` as `torch.nn.Conv2d` keeps them, both sizes odd.
        bias: `(d,)`.
        activation: None or "silu".
        backend: "auto", "cuda" or "reference"; "auto" takes kernels on an NVIDIA GPU for up to 9 taps.

    Returns:
        `(b, h, w, d)`, in the dtype of `x` or of autocast.

    Raises:
        ValueError: shapes or devices that disagree, even sizes, an unknown `activation`, a `backend` that is unknown
            or cannot run here.
        TypeError: no tensors, or maps of integers.
    """
    _check(x, weight, bias, activation)
    (x,) = autocast(x)
    inputs = (x, weight, bias)
    dtype = asked_for(x.dtype, weight, bias)
    size = weight.shape[2:]
    few = size.numel() <= _MOST_TAPS
    seen = watched(inputs)
    if backend != "auto":
        backend = choose(backend, x.device, dtype, "depthwise_conv2d")
        if backend != "reference" and not few:
            raise ValueError(
                f"backend={backend!r} takes up to {_MOST_TAPS} taps, not {tuple(size)}; use backend='auto'"
            )
    elif few and x.is_cuda and not seen:
        backend = gpu_backend(dtype, "depthwise_conv2d")
    if backend == "cuda" and 0 < x.numel() < len(weight) * 2**31:  # positions are counted in 31 bits
        run = DepthwiseConv2d.apply if seen else partial(applied, DepthwiseConv2d)
        return run(implementation(backend, "depthwise_conv2d"), *inputs, activation == "silu")
    # A channels-last map seen as (b, d, h, w) is what torch calls channels_last: nothing is copied on either side.
    y = F.conv2d(
        x.permute(0, 3, 1, 2), weight.to(x.dtype), None if bias is None else bias.to(x.dtype),
        padding=(size[0] // 2, size[1] // 2), groups=len(weight),
    ).permute(0, 2, 3, 1)  # fmt: skip
    return F.silu(y) if activation == "silu" else y


def has_kernels(weight: Tensor) -> bool:
    """Whether "auto" takes kernels for these taps, on the device where they are."""
    few = weight.shape[2:].numel() <= _MOST_TAPS
    return few and weight.is_cuda and gpu_backend(weight.dtype, "depthwise_conv2d") != "reference"


class DepthwiseConv2d(torch.autograd.Function):
    """`depthwise_conv2d` by kernels."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x, weight, bias, silu):
        """Called by autograd."""
        x, weight, bias = with_unit_stride(x), contiguous(weight), contiguous(bias)
        ctx.save_for_backward(x, weight, bias)
        ctx.kernels, ctx.silu = kernels, silu
        return kernels.forward(x, weight, bias, silu)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by autograd."""
        x, weight, bias = ctx.saved_tensors
        _, x_wanted, *weights_wanted, _ = ctx.needs_input_grad
        wanted = x_wanted, any(weights_wanted)
        return None, *ctx.kernels.backward(with_unit_stride(dy), x, weight, bias, ctx.silu, *wanted), None

    @staticmethod
    def convolved(ctx: Any) -> Tensor:
        """The result again."""
        return ctx.kernels.forward(*ctx.saved_tensors, ctx.silu)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensors(("x", x, False), ("weight", weight, False), ("bias", bias, True))
    if not x.dtype.is_floating_point:
        check_floating(x=x.dtype)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected maps (b, h, w, d)")
    d = x.shape[-1]
    if weight.dim() != 4 or weight.shape[:2] != (d, 1) or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({d}, 1, kh, kw), kh and kw odd")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({d},)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {ACTIVATIONS}")

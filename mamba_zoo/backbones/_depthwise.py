"""Depthwise convolutions of channels-last maps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..kernels._op import watched
from ..kernels.depthwise_conv2d import depthwise_conv2d, has_kernels
from ._block import are_hooked
from ._recompute import recomputed


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of maps `(b, h, w, dim)` that keeps their size, and an activation after it.

    Args:
        dim: Channels.
        size: Side of the window, an odd number.
        bias: Whether there is one.
        activation: None or "silu".
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, size: int = 3, bias: bool = True, activation: str | None = None, device=None, dtype=None
    ):
        super().__init__(dim, dim, size, padding=size // 2, groups=dim, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """`(b, h, w, dim)` to the same shape."""
        if self._as_built():
            return depthwise_conv2d(input, self.weight, self.bias, self.activation)
        y = super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.silu(y) if self.activation == "silu" else y

    def has_kernels(self) -> bool:
        """Whether kernels, which take weights as they are, compute it where it is."""
        return self._as_built() and has_kernels(self.weight)

    def _as_built(self) -> bool:
        """Whether nobody has changed what kernels take for granted, such as the padding."""
        same = tuple(n // 2 for n in self.kernel_size)
        return self.padding_mode == "zeros" and self.padding == same and self.stride == self.dilation == (1, 1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


def again(layer: nn.Module, y: Tensor, x: Tensor) -> AbstractContextManager[Any]:
    """A context within which autograd keeps `x` instead of `y = layer(x)`, where kernels make it and nobody looks."""
    if not y.requires_grad or type(layer) is not DepthwiseConv or watched((y,)):
        return nullcontext()
    if are_hooked(layer) or not layer.has_kernels():
        return nullcontext()
    # The weights of now: by the time of the backward pass others may be in their place.
    weights = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    activation = layer.activation
    return recomputed(y, lambda *given: depthwise_conv2d(*given, activation=activation), x, *weights)


# torch.fx takes it whole: it looks at shapes and dtypes. Not as a decorator, which would hide its type.
register_notrace_module(DepthwiseConv)

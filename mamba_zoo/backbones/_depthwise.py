"""Depthwise convolutions of channels-last maps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..kernels import depthwise_conv2d
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
        return depthwise_conv2d(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


def again(layer: nn.Module, y: Tensor, x: Tensor) -> AbstractContextManager[Any]:
    """A context within which autograd keeps `x` instead of `y = layer(x)`, unless somebody looks at the layer."""
    plain = type(layer) is DepthwiseConv and not are_hooked(layer)
    return recomputed(y, layer.forward, x) if plain else nullcontext()


# torch.fx takes it whole: it looks at shapes and dtypes. Not as a decorator, which would hide its type.
register_notrace_module(DepthwiseConv)

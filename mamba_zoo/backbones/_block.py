"""Norms and residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn


def _widened(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """The parameter in the dtype of `x` if that is the wider one: a float32 stream through a bfloat16 model."""
    if parameter is None or parameter.dtype.itemsize >= x.dtype.itemsize:
        return parameter
    return parameter.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, which may be wider in dtype than the weights; the output keeps its dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., d)` to `(..., d)`."""
        weight, bias = _widened(self.weight, input), _widened(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis, which may be wider in dtype than the weights.

    Args:
        dim: Channels.
        eps: Added to the mean square.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` to `(..., d)`, in the dtype of `x`."""
        return F.rms_norm(x, self.weight.shape, _widened(self.weight, x), self.eps)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}"


class MapBlock(nn.Module):
    """A mixer of channels-last maps, and optionally an MLP, each `x + drop_path(f(norm(x)))`.

    Args:
        dim: Width.
        mixer: Makes the mixer, given the width.
        mlp_ratio: Hidden width of the MLP in units of `dim`; 0 is no MLP.
        drop_path: Rate at which a sample skips a branch in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[[int], nn.Module],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        else:
            self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class AddNormBlock(nn.Module):
    """Add, then norm, then mix: the block of Mamba's published code, whose residual stream stays float32.

    The pair `(hidden, residual)` stands for the stream `residual + hidden`; a block returns the output of its mixer and
    the stream before it. In exact arithmetic this is the usual `x + mixer(norm(x))`.

    Args:
        dim: Width.
        mixer: Takes `(x, order)`, or `(x, order, cu_seqlens)` if its batches are packed.
        drop_path: Rate at which a sample drops the incoming `hidden`, the previous mixer's output, in training.
        norm: Makes the norm, given the width.
        device: Of the norm.
        dtype: Of the norm.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        drop_path: float = 0.0,
        norm: Callable[..., nn.Module] = RMSNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.norm = norm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, hidden: Tensor, residual: Tensor | None, order: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """`(hidden, residual)`, both `(b, l, dim)`, to the next pair; no residual before the first block.

        `order` of a packed batch is the pair `(order, cu_seqlens)`.
        """
        residual = add_residual(self.drop_path(hidden), residual)
        visits = order if isinstance(order, tuple) else (order,)
        return self.mixer(self.norm(residual).to(hidden.dtype), *visits), residual


def add_residual(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """`residual + hidden`, in float32 at least."""
    if residual is None:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return residual + hidden


# torch.fx takes these whole, because they look at dtypes. Not as decorators, which would hide their types.
for _leaf in (LayerNorm, RMSNorm):
    register_notrace_module(_leaf)
torch.fx.wrap("add_residual")

"""Norms and residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
from timm.layers._fx import register_notrace_module
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import add_norm
from ..kernels.mlp import in_one_node, mlp
from ._recompute import recomputed


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, which may be wider in dtype than the weights."""

    def forward(
        self, input: Tensor, branch: Tensor | None = None, scale: Tensor | None = None, narrow: bool = False
    ) -> Any:  # Tensor, or (Tensor, Tensor) with a branch
        """`(b, ..., d)` to `(b, ..., d)`.

        Args:
            input: The stream.
            branch: Added to the stream first; the sum is then returned as well, before the normed tokens.
            scale: Of each sample's branch `(b,)`, from `branch_scale`.
            narrow: Give the normed tokens in the dtype that a linear layer computes in; else in their own.
        """
        return _normed(input, self.weight, self.bias, branch, scale, self.eps, "layer", narrow)


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

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None, narrow: bool = False
    ) -> Any:  # Tensor, or (Tensor, Tensor) with a branch
        """As for `LayerNorm`."""
        return _normed(x, self.weight, None, branch, scale, self.eps, "rms", narrow)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}"


def _normed(x, weight, bias, branch, scale, eps, kind, narrow) -> Any:
    dtype = linear_dtype(x if branch is None else branch) if narrow else x.dtype
    stream, y = add_norm(x, weight, bias, branch, scale, eps, kind, dtype)
    return y if branch is None else (stream, y)


def normed_again(y: Tensor, norm: nn.Module, stream: Tensor) -> AbstractContextManager[Any]:
    """A context within which autograd keeps `stream`, as the norm does anyway, in the place of `y`, if that is large.

    Args:
        y: `norm(stream, narrow=True)`, the stream with its branch added.
        norm: `LayerNorm` or `RMSNorm`.
        stream: `(b, ..., d)`.
    """
    if type(norm) not in (LayerNorm, RMSNorm):
        return nullcontext()
    dtype = y.dtype  # a branch may have given it
    # The weights of now: by the time of the backward pass others may be in their place.
    weights: list[Any] = [*norm._parameters.values()]
    eps: Any = norm.eps
    kind = "rms" if isinstance(norm, RMSNorm) else "layer"

    def again(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _normed(x, weight, bias, None, None, eps, kind, True).to(dtype)

    return recomputed(y, again, stream, *[weight for weight in weights if weight is not None])


def branch_scale(branch: Tensor, drop_path: float) -> Tensor | None:
    """A factor for each sample's branch `(b,)`: 0 with probability `drop_path`, otherwise what keeps the mean."""
    if drop_path == 0:
        return None
    scale = branch.new_empty(len(branch), dtype=torch.float32).bernoulli_(1 - drop_path)
    return scale / (1 - drop_path) if drop_path < 1 else scale


def skip_rate(drop_path: nn.Module) -> float:
    """The rate of timm's `DropPath` as it is now; 0 for an identity."""
    return drop_path.drop_prob if isinstance(drop_path, DropPath) and drop_path.training else 0.0


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer given `x` computes in: autocast's, where it is on, or its own."""
    kind = x.device.type
    if kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def are_hooked(*layers: Any) -> bool:
    """Whether hooks would see that one of the layers is called."""
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return True
    return bool(_has_any_global_hook())


def are_as_built(*layers: Any) -> bool:
    """Whether the layers do what their classes say and nothing besides: no hooks, no `forward` of their own, and not
    compiled.
    """
    for layer in layers:
        if "forward" in layer.__dict__ or layer._compiled_call_impl is not None:
            return False
    return not are_hooked(*layers)


class LeanMlp(Mlp):
    """timm's MLP with its activations computed again: on a GPU in one node of autograd, elsewhere if they are large."""

    def forward(self, x: Tensor) -> Tensor:
        """`(b, ..., dim)` to the same shape."""
        fc1, fc2 = self.fc1, self.fc2
        if type(fc1) is type(fc2) is nn.Linear:
            weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
            if (backend := in_one_node(x, *weights)) and self.is_ordinary():
                return mlp(x, *weights, backend=backend)
        x = fc1(x)
        y = self.act(x)
        with recomputed(y, self.act, x):
            return self.drop2(fc2(self.norm(self.drop1(y))))

    def is_ordinary(self) -> bool:
        """Whether an exact GELU is all between the linear layers, and nobody has hung anything on the parts."""
        parts = self._modules
        act = parts["act"]
        if type(act) is not nn.GELU or act.approximate != "none":
            return False
        for name in ("drop1", "norm", "drop2"):
            part: Any = parts[name]
            if type(part) is not nn.Identity and (type(part) is not nn.Dropout or (part.training and part.p > 0)):
                return False
        return are_as_built(*parts.values())


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
        visits = order if isinstance(order, tuple) else (order,)
        if residual is None:
            stream = add_residual(self.drop_path(hidden), None)
            y = self.norm(stream, narrow=True).to(linear_dtype(hidden))
        else:
            stream, y = self.norm(residual, hidden, branch_scale(hidden, skip_rate(self.drop_path)), narrow=True)
        return self.mixer(y, *visits), stream


def add_residual(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """`residual + hidden`, in float32 at least."""
    if residual is None:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return residual + hidden


# torch.fx takes these whole, because they look at dtypes. Not as decorators, which would hide their types.
for _leaf in (LayerNorm, LeanMlp, RMSNorm):
    register_notrace_module(_leaf)
for _name in ("add_residual", "branch_scale", "linear_dtype"):
    torch.fx.wrap(_name)

"""Tensors that the backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.graph import saved_tensors_hooks

from ..kernels._op import watched

LEAST = 2**26  # bytes; of smaller tensors the memory matters less than the time


def recomputed(x: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> AbstractContextManager[Any]:
    """A context within which autograd keeps `inputs` in the place of `x`, and calls `make(*inputs)` when it needs `x`.

    For large tensors that little work makes of small ones, or of tensors that are kept anyway. May be nested. Nothing
    changes where gradients are off, where a compiler or a transform looks on, or where others decide what is kept, such
    as activation checkpointing.

    Args:
        x: `make(*inputs)`, computed already; has to live as long as the context.
        make: Without random numbers; called under the autocast of now, without gradients. Must not hold `x`.
        inputs: Tensors.
    """
    # First whether somebody looks on: sizes may then be symbols.
    if not torch.is_grad_enabled() or not x.requires_grad or watched((x,)) or not worth_making_again(x):
        return nullcontext()
    return saved_tensors_hooks(_Recipe(x, make, inputs, _recipe()), _unpack)


def worth_making_again(x: Tensor) -> bool:
    """Whether `x` is large, and nobody else decides what is kept."""
    return x.nbytes >= LEAST and (_top_saved_tensors_default_hooks(False) is None or _recipe() is not None)


def _recipe() -> _Recipe | None:
    """The innermost context of `recomputed`, if nobody else's is within it."""
    hooks = _top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None and isinstance(hooks[0], _Recipe) else None


class _Recipe:
    """How to make a tensor again; called with every tensor that autograd would keep, it takes the place of that one."""

    def __init__(self, x: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor, ...], outer: _Recipe | None):
        self.make, self.outer = make, outer
        self.inputs = tuple(_Kept(tensor.detach()) for tensor in inputs)
        self.address, self.dtype, self.shape, self.strides = x.data_ptr(), x.dtype, x.shape, x.stride()
        self.plain, self.count, self.kind = x.is_contiguous(), x.numel(), x.device.type
        self.autocast = {
            "dtype": torch.get_autocast_dtype(self.kind), "enabled": torch.is_autocast_enabled(self.kind),
        }  # fmt: skip
        self.uses = self.due = 0
        self.made: Tensor | None = None

    def __call__(self, tensor: Tensor) -> tuple[_Recipe, torch.Size] | _Kept:
        if tensor.data_ptr() == self.address and tensor.dtype == self.dtype:
            same = tensor.shape == self.shape and tensor.stride() == self.strides
            # Linear layers flatten what they keep.
            if same or (self.plain and tensor.is_contiguous() and tensor.numel() == self.count):
                self.uses += 1
                return self, tensor.shape
        if self.outer is not None:
            return self.outer(tensor)
        # A result that its own node keeps would hold that node, and both would stay if no backward pass came.
        return _Kept(tensor if tensor.is_leaf else tensor.detach())

    def again(self) -> Tensor:
        """The tensor, held until all who would have kept it have asked for it."""
        made = self.made
        if made is None:
            with torch.no_grad(), torch.autocast(self.kind, cache_enabled=False, **self.autocast):
                made = self.made = self.make(*(kept.unchanged() for kept in self.inputs))
            self.due = self.uses
        self.due -= 1
        if self.due <= 0:
            self.made = None
        return made


class _Kept:
    """A tensor, and how often it had been written to: torch does not look where hooks decide what is kept."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor, tensor._version

    def unchanged(self) -> Tensor:
        """It, unless it has been written to since."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs has been modified by an "
                f"inplace operation: it is at version {self.tensor._version}, expected {self.version}; change it after "
                "the backward pass"
            )
        return self.tensor


def _unpack(kept: _Kept | tuple[_Recipe, torch.Size]) -> Tensor:
    if isinstance(kept, _Kept):
        return kept.unchanged()
    recipe, shape = kept
    made = recipe.again()
    return made if made.shape == shape else made.view(shape)

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

    For large tensors that little work makes of small ones. Nothing changes where gradients are off, where a compiler or
    a transform looks on, or where others decide what is kept, such as activation checkpointing.

    Args:
        x: `make(*inputs)`, computed already.
        make: Without random numbers; called under the autocast of now, without gradients.
        inputs: Tensors.
    """
    # First whether somebody looks on: sizes may then be symbols.
    if not torch.is_grad_enabled() or not x.requires_grad or _observed(x) or x.nbytes < LEAST:
        return nullcontext()
    kept = tuple(tensor.detach() for tensor in inputs)
    address, dtype, shape, strides, kind = x.data_ptr(), x.dtype, x.shape, x.stride(), x.device.type
    plain, count = x.is_contiguous(), x.numel()
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        if tensor.data_ptr() != address or tensor.dtype != dtype:
            return tensor
        same = tensor.shape == shape and tensor.stride() == strides
        flat = plain and tensor.is_contiguous() and tensor.numel() == count  # linear layers flatten what they keep
        return tensor.shape if same or flat else tensor

    def unpack(tensor: Tensor | torch.Size) -> Tensor:
        if isinstance(tensor, Tensor):
            return tensor
        with torch.no_grad(), torch.autocast(kind, cache_enabled=False, **autocast):
            made = make(*kept)
        return made if made.shape == tensor else made.view(tensor)

    return saved_tensors_hooks(pack, unpack)


def _observed(x: Tensor) -> bool:
    return watched((x,)) or _top_saved_tensors_default_hooks(False) is not None

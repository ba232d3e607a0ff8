"""Weights that autocast would cast one after another, cast together.

Called from Python on an H100, 128 images, medians of five turns each, together and one by one: vmamba_tiny 15.1 and
16.6 ms, training 56 and 66; mambavision_t 11.2 and 12.6, 43 and 44; vim_tiny no difference beyond its spread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from ..kernels._op import watched
from ._block import are_hooked
from ._depthwise import DepthwiseConv
from ._findings import findings
from ._ssm import DirectionLinear

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DirectionLinear)
_Place = tuple[nn.Module, str, nn.Parameter]  # a layer, the name of a parameter of its own, and what is there


def weights_cast(model: nn.Module, x: Any) -> AbstractContextManager[Any]:
    """A context within which the float32 weights of linear layers and convolutions have autocast's dtype.

    The numbers are those of autocast, which launches a kernel for every weight, and in the backward pass another for
    its gradient: of the kernels of VMamba-T a third. All gradients arrive together at the end of the backward pass.
    Nothing changes without autocast, where a compiler or a transform looks on, or where processes exchange gradients as
    they come; nor for layers with hooks, which would meet the casts in the place of the parameters. Threads that call
    one model take turns.

    Args:
        model: Called within the context.
        x: What it is called with; says on which device autocast must be on.
    """
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    if watched((x,)) or _distributed():
        return nullcontext()
    return _with_casts(model, x.device)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _places(model: nn.Module, device: torch.device) -> list[_Place]:
    found = [
        (layer, name, weight)
        for layer in model.modules()
        # The kernels of depthwise convolutions read float32.
        if isinstance(layer, _LAYERS) and not (isinstance(layer, DepthwiseConv) and layer.has_kernels())
        for name, weight in layer._parameters.items()
        # No subclass of tensors, and nothing that was put there for a while, as this file does.
        if type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device == device
        if weight.is_contiguous()
    ]
    # Odd sizes last, so that all others begin at a multiple of 16 bytes.
    return sorted(found, key=lambda place: place[2].numel() % 8 != 0)


@contextmanager
def _with_casts(model: nn.Module, device: torch.device) -> Iterator[None]:
    known = findings(model)
    with known.lock:  # a thread must not meet another one's casts, which may have no gradient
        if known.get("is_cast"):  # around this call already
            yield
            return
        places: list[_Place] = known.get("places", [])
        if not places or any(
            layer._parameters.get(name) is not weight or weight.dtype != torch.float32 for layer, name, weight in places
        ):
            places = known["places"] = _places(model, device)
        if are_hooked(*(layer for layer, _, _ in places)):  # asking all of them at once takes a third of the time
            places = [place for place in places if not are_hooked(place[0])]
        weights, dtype = [weight for _, _, weight in places], torch.get_autocast_dtype(device.type)
        casts: Sequence[Tensor] = ()
        if places:
            casts = _Cast.apply(dtype, *weights) if torch.is_grad_enabled() else _as_dtype(weights, dtype)
        for (layer, name, _), cast in zip(places, casts, strict=True):
            layer._parameters[name] = cast  # pyright: ignore[reportArgumentType] (no parameter, for a while)
        known["is_cast"] = True
        try:
            yield
        finally:
            known["is_cast"] = False
            for layer, name, weight in places:
                layer._parameters[name] = weight


def _as_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Contiguous tensors of one dtype, copied to another within one piece of memory."""
    flat = tensors[0].new_empty(sum(x.numel() for x in tensors), dtype=dtype)
    parts = _unflatten_dense_tensors(flat, tensors)
    torch._foreach_copy_(parts, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return tuple(parts)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        casts = _as_dtype(weights, dtype)
        # What is frozen stays so: nothing is kept for layers that only lead to frozen ones.
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(cast for cast, graded in zip(casts, wanted, strict=True) if not graded))
        return casts

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(grads)
        together: dict[int, Tensor] = {}
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if grad.is_contiguous():
                together[i] = grad
            else:
                found[i] = grad.to(ctx.dtype)
        if together:
            for i, grad in zip(together, _as_dtype(list(together.values()), ctx.dtype), strict=True):
                found[i] = grad
        return None, *found

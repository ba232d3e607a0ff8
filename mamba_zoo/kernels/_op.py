"""Ops as torch knows them: a schema, one kernel for all devices, shapes without data, and a gradient.

`torch.library.custom_op` does the same, but reads the schema back argument by argument on every call: with the 18
arguments of the scan that is 1.1 ms of host time a training step of one op instead of 0.6 (`benchmarks/README.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mamba_zoo", "DEF")


def define(name: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register the op `mamba_zoo::<name>`.

    Args:
        name: Of the op.
        kernel: Computes it on any device; its annotations are the schema.
        fake: The same with shapes, dtypes and devices only.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # A compiled model runs its ops with dynamo still watching: it must not trace into the kernel's Python.
    _LIBRARY.impl(name, torch.compiler.disable(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mamba_zoo::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mamba_zoo, name).default


def set_gradient(op: torch._ops.OpOverload, save: Callable, gradient: Callable) -> None:
    """Register the gradient of an op.

    Args:
        op: From `define`.
        save: `(ctx, inputs, outputs)`, keeps what the gradient needs.
        gradient: `(ctx, *gradients of outputs)` to one gradient or None for every input.
    """

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = below(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)
        return below(*inputs)

    _LIBRARY.impl(op._schema.name.split("::")[1], autograd, "Autograd")

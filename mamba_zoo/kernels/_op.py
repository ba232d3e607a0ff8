"""Ops as torch knows them: a schema, one kernel for all devices, shapes without data, and a gradient.

`torch.library.custom_op` does the same, but reads the schema back argument by argument on every call: with the 18
arguments of the scan that is 1.1 ms of host time a training step of one op instead of 0.6 (`benchmarks/README.md`).
Whoever watches the calls of ops (a compiler, an exporter, a FLOP counter) sees the registered op; where nobody does,
the same kernel and gradient are called without the dispatcher: with empty kernels a forward call took 31 us, not 45.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("mamba_zoo", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """The op `mamba_zoo::<name>`, to be called like its kernel.

    Args:
        name: Of the op.
        kernel: Computes it on any device; its annotations are the schema. Its last argument is the backend, and one
            named `save` whether to keep what the gradient needs. Of several outputs it may leave out, as None, those
            that were not asked for; the registered op returns an empty float32 tensor in their place.
        fake: The same with shapes, dtypes and devices only.
    """

    def __init__(self, name: str, kernel: Callable, fake: Callable) -> None:
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # A compiled model runs its ops with dynamo still watching: it must not trace into the kernel's Python.
        _LIBRARY.impl(name, torch.compiler.disable(_filled(kernel)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"mamba_zoo::{name}", fake, lib=_LIBRARY)
        self.name, self.kernel = name, kernel
        self.registered = getattr(torch.ops.mamba_zoo, name).default
        self._differentiable = kernel

    def __call__(self, *inputs: Any) -> Any:
        """Run it."""
        if watched(inputs) or torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
            return self.registered(*inputs)
        return self._differentiable(*inputs)

    def set_gradient(self, save: Callable, gradient: Callable) -> None:
        """Register the gradient; the backend "reference" computes it of operations that torch differentiates again.

        Args:
            save: `(ctx, inputs, outputs)`, keeps what the gradient needs.
            gradient: `(ctx, *gradients of outputs)` to one gradient or None for every input.
        """

        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.registered(*inputs)

        record = recording(_recorded(self.kernel, save, gradient))
        self._differentiable = _differentiable(self.kernel, record)
        recorded = _saving(self.kernel, _recorded(below, save, gradient).apply)
        _LIBRARY.impl(self.name, _differentiable(below, recorded), "Autograd")


def _filled(kernel: Callable) -> Callable:
    """`kernel`, with a tensor in the place of every output that it leaves out."""

    def run(*inputs: Any) -> Any:
        outputs = kernel(*inputs)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(inputs[0].new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)

    return run


def _recorded(run: Callable, save: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """`run` with its gradient."""
    once = differentiable_once(gradient)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = run(*inputs)
            save(ctx, inputs, outputs)
            ctx.gradient = gradient if inputs[-1] == "reference" else once
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            return ctx.gradient(ctx, *grads)

    return Differentiable


def _saving(kernel: Callable, record: Callable) -> Callable:
    """`record`, which keeps what the gradient needs whatever the call says.

    A program that was exported without gradients says for ever that none will be wanted.
    """
    names = [*inspect.signature(kernel).parameters]
    if "save" not in names:
        return record
    place = names.index("save")
    return lambda *inputs: record(*inputs[:place], True, *inputs[place + 1 :])


def _differentiable(run: Callable, record: Callable) -> Callable:
    """`run`, or `record` where a gradient is wanted."""

    def call(*inputs: Any) -> Any:
        return record(*inputs) if differentiated(inputs) else run(*inputs)

    return call


def differentiated(inputs: tuple) -> bool:
    """Whether a gradient is wanted of something computed of these now."""
    if forward_ad._current_level >= 0:  # of which there is none: torch says so where one is asked for
        return True
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def recording(function: Any) -> Callable:
    """The `apply` of an `autograd.Function` for inputs that are not `watched`.

    Nothing of functorch is active then. Not asking again halves what recording costs.
    """
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def applied(function: Any, *inputs: Any) -> Any:
    """The same, or where no gradient is wanted the forward pass alone."""
    return recording(function)(*inputs) if differentiated(inputs) else Alone(function).forward(*inputs)


class Alone:
    """The context of an `autograd.Function` whose forward pass nobody will differentiate."""

    def __init__(self, function: Any):
        self.function = function
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def forward(self, first: Any, *inputs: Any) -> Any:
        """The forward pass; `first` is no tensor."""
        self.needs_input_grad = (False,) * (1 + len(inputs))
        return self.function.forward(self, first, *inputs)

    def save_for_backward(self, *_: Tensor | None) -> None:
        """Keep nothing."""

    def set_materialize_grads(self, _: bool) -> None:
        """There will be none."""


class Part(Alone):
    """The context of an `autograd.Function` that is called within a larger one, which keeps its tensors."""

    def forward(self, first: Any, *inputs: Any) -> Any:
        """The forward pass; all tensors are to have a gradient."""
        self.needs_input_grad = (False, *[isinstance(x, Tensor) for x in inputs])
        return self.function.forward(self, first, *inputs)

    def backward(self, *grads: Tensor | None) -> Any:
        """The backward pass."""
        return self.function.backward(self, *grads)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Hold them until the larger function takes them."""
        self.saved_tensors = tensors

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Part:
        """A copy that has saved these; two backward passes may come at once."""
        copy = Part.__new__(Part)
        copy.__dict__.update(self.__dict__, saved_tensors=tensors)
        return copy


def differentiable_once(gradient: Callable) -> Callable:
    """The `backward` of an `autograd.Function` whose results must not be differentiated again: trying is an error.

    As torch's `once_differentiable`, which takes a gradient for a constant if what came from above is one, whatever it
    was computed of besides.
    """
    once = once_differentiable(lambda ctx, _, *grads: gradient(ctx, *grads))

    @functools.wraps(gradient)
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return once(ctx, torch.ones((), requires_grad=True), *grads)
        return gradient(ctx, *grads)

    return backward


def watched(inputs: tuple) -> bool:
    """Whether anybody would see the op called, or a tensor is of a kind that the kernel cannot read."""
    if torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for x in inputs:  # noqa: SIM110 (any() over a generator takes twice as long)
        if x.is_meta if type(x) in _PLAIN else isinstance(x, Tensor):
            return True
    return False

"""Where the first NaN or infinity of a model comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Something that is not finite.

    Attributes:
        kind: "parameter", "buffer", "input", "output" or "gradient".
        name: Of the parameter, buffer or input; of the module for outputs and gradients ("" is the model itself).
        module: Class of the module for outputs and gradients, else "".
        nan: Number of NaN values.
        inf: Number of infinities.
        total: Number of values.
        detail: What else is known of it.
    """

    kind: str
    name: str
    module: str
    nan: int
    inf: int
    total: int
    detail: str = ""

    def __str__(self) -> str:
        what = " and ".join(f"{n:,} {word}" for n, word in ((self.nan, "NaN"), (self.inf, "infinite")) if n)
        name = f"{self.name or 'the model itself'} ({self.module})" if self.module else self.name
        of = "of " if self.module else ""
        return f"{self.kind} {of}{name}: {what} of {self.total:,} values" + (f"; {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class NonFinite:
    """What `find_nonfinite` found; false if everything is finite.

    Attributes:
        weights: Parameters and buffers that are not finite to begin with.
        inputs: Inputs that are not finite to begin with.
        forward: The first module that turned finite inputs and weights into an output that is not.
        backward: Where the gradient first stopped being finite, though the gradient that came in was.
    """

    weights: tuple[Place, ...] = ()
    inputs: tuple[Place, ...] = ()
    forward: Place | None = None
    backward: Place | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        """Everything found, causes first."""
        return (*self.inputs, *self.weights, *(p for p in (self.forward, self.backward) if p))

    def __bool__(self) -> bool:
        return bool(self.places)

    def __str__(self) -> str:
        return "\n".join(map(str, self.places)) or "all values are finite"


def find_nonfinite(
    model: nn.Module, *inputs: Any, backward: bool = True, loss: Callable[[Any], Tensor] | None = None
) -> NonFinite:
    """Run `model` once and name the first module whose output, or gradient, is not finite while its inputs are.

    The model is run as it is: in its mode (train or eval), under the autocast of the caller. Buffers, gradients and the
    random state are left as they were.

    Args:
        model: Any module.
        inputs: Its positional arguments: tensors, or lists, dicts and PyG batches of them.
        backward: Also look at gradients, if the forward pass is finite.
        loss: From the model's output to the scalar that is differentiated; None is the mean square of every output.

    Raises:
        TypeError: the output holds no floating-point tensor, so there is nothing to look at.
    """
    weights = [("parameter", n, p) for n, p in model.named_parameters()]
    weights += [("buffer", n, b) for n, b in model.named_buffers()]
    bad_weights = tuple(_place(kind, name, "", t) for kind, name, t in weights if not _finite(t))
    bad_inputs = tuple(
        _place("input", name, "", t) for i, x in enumerate(inputs) for name, t in _tensors(x, str(i)) if not _finite(t)
    )
    watch = _Watch(model, {place.name for place in bad_weights})
    saved = {name: b.clone() for name, b in model.named_buffers()}
    # Gradients of values that were not finite to begin with say nothing.
    gradients = backward and not bad_weights and not bad_inputs and any(p.requires_grad for p in model.parameters())
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients):
            output = model(*inputs)
            values = [t for _, t in _tensors(output, "")]
            if not values:
                raise TypeError(f"the model returned {type(output).__name__} without a floating-point tensor")
            if gradients and watch.forward is None:
                scalar = sum(t.float().square().mean() for t in values) if loss is None else loss(output)
                wanted = [p for p in model.parameters() if p.requires_grad]
                if isinstance(scalar, Tensor) and scalar.requires_grad:
                    torch.autograd.grad(scalar, wanted, allow_unused=True)
    finally:
        watch.remove()
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(saved[name])
    return NonFinite(bad_weights, bad_inputs, watch.forward, watch.backward)


class _Watch:
    """Hooks on every module and on the tensors between them."""

    def __init__(self, model: nn.Module, bad_weights: set[str]):
        self._bad_weights = bad_weights
        self.forward: Place | None = None
        self.backward: Place | None = None
        self._finite_inputs: dict[nn.Module, list[bool]] = {}
        self._receiver = ""  # innermost module that was handed a value already not finite
        self._finite_gradient: dict[str, bool] = {}  # of each module's output, as it arrived
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                module.register_forward_hook(partial(self._after, name), with_kwargs=True),
            ]
            for key, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    self._handles.append(p.register_hook(partial(self._weight_gradient, name, module, key)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = [t for _, t in _tensors((args, kwargs), "")]
        finite = all(map(_finite, given)) and not any(_inside(weight, name) for weight in self._bad_weights)
        # Kept now: a module may overwrite its input.
        self._finite_inputs.setdefault(module, []).append(finite)
        if self.forward is None and not all(map(_finite, given)):
            self._receiver = name
        for t in given:
            if t.requires_grad:
                self._handles.append(t.register_hook(partial(self._input_gradient, name, module)))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        finite_inputs = self._finite_inputs[module].pop()
        given = [t for _, t in _tensors(output, "")]
        bad = next((t for t in given if not _finite(t)), None)
        if bad is not None and finite_inputs and self.forward is None:
            detail = f"in its own code, before {self._receiver}" if _inside(self._receiver, name) else ""
            self.forward = _place("output", name, type(module).__name__, bad, detail or _range(given, args))
        for t in given:
            if t.requires_grad:
                self._handles.append(t.register_hook(partial(self._output_gradient, name)))

    def _output_gradient(self, name: str, grad: Tensor) -> None:
        self._finite_gradient[name] = _finite(grad)

    def _input_gradient(self, name: str, module: nn.Module, grad: Tensor) -> None:
        if self.backward is None and not _finite(grad) and self._finite_gradient.get(name, True):
            self.backward = _place("gradient", name, type(module).__name__, grad, "with respect to its input")

    def _weight_gradient(self, name: str, module: nn.Module, key: str, grad: Tensor) -> None:
        if self.backward is None and not _finite(grad) and self._finite_gradient.get(name, True):
            self.backward = _place("gradient", name, type(module).__name__, grad, f"with respect to its {key}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in nested tuples, lists, mappings and PyG batches, with a name."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
    elif callable(to_dict := getattr(value, "to_dict", None)):
        yield from _tensors(to_dict(), name)


def _inside(name: str, module: str) -> bool:
    """Whether a dotted name belongs to something within a module; everything named is within the model itself, ""."""
    return bool(name) and name.startswith(f"{module}." if module else "")


def _finite(t: Tensor) -> bool:
    return t.is_meta or not (t.is_floating_point() or t.is_complex()) or bool(torch.isfinite(t).all())


def _place(kind: str, name: str, module: str, t: Tensor, detail: str = "") -> Place:
    return Place(kind, name, module, int(t.isnan().sum()), int(t.isinf().sum()), t.numel(), detail)


def _range(outputs: list[Tensor], args: Any) -> str:
    """How large the finite inputs were, to tell an overflow from an undefined value."""
    largest = max(
        (float(t.detach().abs().max()) for _, t in _tensors(args, "") if t.numel() and _finite(t)), default=0.0
    )
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in outputs}))
    return f"its inputs reach {largest:.3g}, its output is {kinds}"

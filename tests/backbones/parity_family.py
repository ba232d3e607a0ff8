"""What each family of published models says to `test_parity.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]


@dataclass
class Family:
    """How to rebuild and run the published models of one family."""

    arguments: Callable[[Arguments], tuple[str, Arguments]]  # published arguments to a name and our arguments
    run: Callable[[Any, dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]  # model, inputs, fixture to outputs
    container: Callable[[dict[str, Tensor]], Any]  # state dict to what the authors' file holds
    check: Callable[[dict[str, Any]], None] | None = None  # for fixtures that hold no weights, such as orders
    dead: str = ""  # regular expression for keys of published weights that no output depends on


def require(kwargs: Arguments, **expected: Any) -> None:
    """Raise on published arguments that our model does not have."""
    for name, value in expected.items():
        if kwargs.get(name, value) != value:
            raise ValueError(f"published argument {name}={kwargs[name]!r} has no counterpart here, only {value!r}")


@contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect the outputs of modules by name."""
    outputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def classify(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Features before the classifier, and logits, of one pass."""
    read: list[Tensor] = []
    hook = model.get_classifier().register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    logits = model(x)
    hook.remove()
    return {"features": read[0], "logits": logits}

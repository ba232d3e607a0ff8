"""`mixer=` of every model: another state-space layer in the place of the selective scan's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ._mamba2 import DualSSM
from ._mamba3 import TrapezoidSSM
from ._ssm import SelectiveSSM

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mamba2": DualSSM,
    "mamba3": TrapezoidSSM,
    "mamba3_mimo": partial(TrapezoidSSM, rank=4),
}
MIXERS = ("mamba", *LAYERS)


def exchange(model: nn.Module, mixer: str, name: str = "this model") -> None:
    """Replace every selective state-space layer of `model` by one of the same width, states and directions.

    What surrounds it (projections, convolutions, gates, norms, the order of visits) stays. The parameters are new, so
    published weights no longer fit.

    Args:
        model: On any device.
        mixer: "mamba" changes nothing; "mamba2" is the state-space dual, "mamba3" the trapezoidal rule, "mamba3_mimo"
            that with four inputs and outputs a head.
        name: Of the model, for the error.

    Raises:
        ValueError: an unknown mixer, or a model without a selective scan.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer={mixer!r} is unknown; choose one of {', '.join(MIXERS)}")
    if mixer == "mamba":
        return
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if isinstance(child, SelectiveSSM)
    ]
    if not places:
        raise ValueError(f"mixer={mixer!r} cannot be set: {name} has no selective scan to exchange")
    for parent, key, old in places:
        k, dim, states = old.A_log.shape
        new = LAYERS[mixer](dim, states, k, device=old.A_log.device, dtype=old.A_log.dtype)
        setattr(parent, key, old.called_as_this(new))

"""Which registered models a set of weights belongs to, found by names and shapes alone, without allocating any."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import timm
from timm.models import PretrainedCfg, model_entrypoint
from torch import Tensor, nn

from ._match import Match, match, variants

FilterFn = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def zoo_models() -> list[str]:
    """Names of the models that this package registered with timm."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("mamba_zoo.")]


@lru_cache(maxsize=256)
def blueprint(name: str) -> nn.Module:
    """The registered model `name` with its default arguments, on the meta device."""
    return timm.create_model(name, device="meta")


def published_cfg(model: nn.Module) -> PretrainedCfg:
    """The published configuration that timm's builder left on `model`; an empty one if it was built by hand."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    # The builder leaves out what is None, and 3 x 224 x 224 would come back where there is no size.
    return PretrainedCfg(**{"input_size": None, **cfg})


def filter_of(module: str) -> FilterFn:
    """The `checkpoint_filter_fn` of a backbone file, or one that changes nothing."""
    return getattr(sys.modules.get(module), "checkpoint_filter_fn", lambda state, model: state)


def renamed(state: Mapping[str, Tensor], model: nn.Module, filter_fn: FilterFn) -> tuple[dict[str, Tensor], bool]:
    """`state` under the model's names, and whether the filter changed how many values there are."""
    new = filter_fn(dict(state), model)
    sizes = [sum(v.numel() for v in weights.values() if v.is_floating_point()) for weights in (new, state)]
    return new, sizes[0] != sizes[1]


def identify(state: Mapping[str, Tensor]) -> dict[str, Match]:
    """Every registered model that the weights fit, up to the number of classes.

    Families can share names and shapes (Vim and VideoMamba do), so there may be several. Models that the weights fit
    as they are come alone; those that need a resized table are only listed when there is no other.
    """
    from ._register import cards  # which builds on this file

    found: dict[str, Match] = {}
    size = sum(value.numel() for value in state.values())
    for name in zoo_models():
        # Building every model, even without memory, takes seconds. Classifiers differ by less than this.
        if name in cards() and (params := cards()[name].params) and not params / 2 < size < params * 2:
            continue
        model = blueprint(name)
        cfg, filter_fn = published_cfg(model), filter_of(model_entrypoint(name).__module__)
        for weights in variants(state):
            try:
                new, resized = renamed(weights, model, filter_fn)
            except (ValueError, KeyError, IndexError, RuntimeError):  # weights of another family
                continue
            fit = match(new, model, cfg, new_classes=True)
            fit.resized = resized
            if not fit.differences:
                found[name] = fit
                break
    exact = {name: fit for name, fit in found.items() if not fit.resized}
    return exact or found

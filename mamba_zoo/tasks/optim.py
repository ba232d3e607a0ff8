"""What is decayed, at which rate each layer learns, and how the rate moves over a run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from ..backbones._decay import undecayed

RECIPES = ("recommended", "as-published")

# What the published training code decays although its authors marked it otherwise, or that a rule on the number of
# dimensions catches by accident: the first pattern that matches a model's name, and the parameters.
# Vim, MambaVision, LocalMamba, VideoMamba, PointMamba: timm's rule reads names and dimensions only, never the
# `_no_weight_decay` mark on the 2-D A_log. VMamba: the same, and its step biases are one 2-D tensor for all directions.
# AuM and SSAMBA: Adam over all parameters.
_PUBLISHED_DECAY: tuple[tuple[str, str], ...] = (
    (r"^(vmamba|local_vmamba|efficient_vmamba)", r"(^|\.)(A_logs?|dt_bias|dt_projs_bias)$"),
    (r"^plainmamba", r"^$"),
    (r"^(aum|ssamba)", r""),
    (r"", r"(^|\.)A(_b)?_logs?$"),
)


def check_optimizer(name: str) -> None:
    """Raise ValueError unless timm has an optimizer of that name."""
    from timm.optim._optim_factory import list_optimizers

    known = list_optimizers()
    if name.lower().rpartition("_")[2] not in known:  # before it may stand "lookahead_"
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use one such as adamw, lamb or sgd"
        raise ValueError(f"opt={name!r} is no optimizer of timm; {hint}")


def no_decay_names(model: nn.Module, recipe: str = "recommended", name: str = "") -> set[str]:
    """Names of the parameters that weight decay must leave alone.

    Args:
        model: Its `no_weight_decay()` is honoured, and so is a true `_no_weight_decay` on a parameter.
        recipe: "recommended" also exempts whatever else is no weight, see `undecayed`. "as-published" decays what the
            published training code of this architecture decays, state decay rates included.
        name: The model's registered name, to find its published code.

    Raises:
        ValueError: unknown `recipe`.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    marked = set(cast(Any, model).no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    flagged = {key for key, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    exempt = undecayed(model) | marked | flagged
    if recipe == "recommended":
        return exempt
    decayed = next(re.compile(keys) for models, keys in _PUBLISHED_DECAY if re.match(models, name))
    return {key for key in exempt if not decayed.search(key)}


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    recipe: str = "recommended",
    name: str = "",
) -> list[dict[str, Any]]:
    """Optimizer groups with the true exemptions from weight decay and, if asked, a smaller rate for early layers.

    Args:
        model: Its trainable parameters are grouped; `group_matcher` is read for `layer_decay`.
        lr: Rate of the head.
        weight_decay: Of the parameters that are decayed.
        layer_decay: Each layer learns this factor slower than the next one; None gives every layer `lr`.
        recipe: See `no_decay_names`.
        name: See `no_decay_names`.

    Raises:
        ValueError: `layer_decay` outside (0, 1], unknown `recipe`, or nothing to train.
    """
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    exempt = no_decay_names(model, recipe, name)
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, False, exempt)
    elif not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must lie in (0, 1], such as 0.75; None gives every layer lr")
    else:
        groups = param_groups_layer_decay(
            model, weight_decay, exempt, weight_decay_exclude_1d=False, layer_decay=layer_decay
        )
    if not groups:
        raise ValueError("no parameter is trainable; use another freeze")
    return [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": lr * g.get("lr_scale", 1.0)} for g in groups
    ]


def warmup_cosine(total_steps: int, warmup_steps: int, floor: float) -> Callable[[int], float]:
    """The factor on the rate at each optimizer step: a linear rise, then a half cosine down to `floor`.

    Args:
        total_steps: Steps of the whole run.
        warmup_steps: Steps of the rise; cut to the run's length less one.
        floor: Last factor, between 0 and 1.
    """
    warmup = min(warmup_steps, max(total_steps - 1, 0))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        part = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    return factor

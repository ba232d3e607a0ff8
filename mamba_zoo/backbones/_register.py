"""Registering a model with timm, together with the card that says what it is and where its weights are."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._checkpoint import build_with_weights

Model = TypeVar("Model", bound=nn.Module)
Entrypoint = TypeVar("Entrypoint", bound=Callable[..., Any])

_COMMERCIAL = ("MIT", "Apache-2.0", "BSD-3-Clause")
_cards: dict[str, Card] = {}


@dataclass(frozen=True)
class Card:
    """What is known of a model, as its authors published it.

    Attributes:
        modality: "image", "sequence" and so on.
        source: Repository and commit whose arithmetic this follows; "mamba_zoo" for models of our own.
        license: SPDX name of the licence of the published code and weights.
        paper: arXiv number.
        params: Trainable parameters.
        gflops: Billions of operations for one input of the published size, as the authors state them.
        top1: ImageNet-1k accuracy in percent, as the authors state it.
        drop_path: Stochastic depth they trained with; for models of our own, the one advised.
        checkpoint: Name of the published file.
        url: Where it is published.
        notes: What a user should know.
        convention: How the authors counted `gflops`, a name in `mamba_zoo._counting.CONVENTIONS`; None if not known.
        name: The registered name; filled in by `register`.
    """

    modality: str
    source: str
    license: str
    paper: str | None = None
    params: int | None = None
    gflops: float | None = None
    top1: float | None = None
    drop_path: float | None = None
    checkpoint: str | None = None
    url: str | None = None
    notes: str = ""
    convention: str | None = None
    name: str = ""

    @property
    def commercial(self) -> bool:
        """Whether the licence allows commercial use."""
        return self.license in _COMMERCIAL

    @property
    def published(self) -> bool:
        """Whether authors published weights for this architecture."""
        return self.checkpoint is not None


def register(
    card: Card, tag: str = "", others: Mapping[str, Mapping[str, Any]] | None = None, **cfg: Any
) -> Callable[[Entrypoint], Entrypoint]:
    """Register the decorated function, whose name is the model's, with timm and with `card`.

    Args:
        card: Without its name.
        tag: Of the published weights, as in "vmamba_tiny.in1k".
        others: Further published weights: for each tag, where its configuration differs.
        cfg: Entries of timm's `PretrainedCfg`, e.g. from `image_cfg`.
    """

    def wrap(entrypoint: Entrypoint) -> Entrypoint:
        name = entrypoint.__name__
        _cards[name] = dataclasses.replace(card, name=name)
        entry = {"url": card.url or "", "license": card.license.lower(), "origin_url": card.source, **cfg}
        if card.paper is not None:
            entry["paper_ids"] = f"arXiv:{card.paper}"
        # timm looks for this name in the module of the function that it registers.
        cfgs = vars(sys.modules[entrypoint.__module__]).setdefault("default_cfgs", {})
        tags = {tag: entry, **{other: {**entry, **changes} for other, changes in (others or {}).items()}}
        cfgs.update(generate_default_cfgs({f"{name}.{key}" if key else name: value for key, value in tags.items()}))
        register_model(entrypoint)
        return entrypoint

    return wrap


def image_cfg(first_conv: str, classifier: str, size: int = 224, **cfg: Any) -> dict[str, Any]:
    """ImageNet preprocessing, as all published image models here were evaluated."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **cfg,
    }


def card(name: str) -> Card:
    """The card of a registered model.

    Raises:
        ValueError: no model of that name.
    """
    if name not in _cards:
        raise ValueError(f"no model named {name!r} has a card; known are {', '.join(sorted(_cards))}")
    return _cards[name]


def cards() -> dict[str, Card]:
    """All cards, by name."""
    return dict(_cards)


def build_model(
    cls: type[Model],
    name: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    taps: tuple[int, ...] = (0, 1, 2, 3),
    /,
    **kwargs: Any,
) -> Model:
    """`build_with_weights`; `features_only=True` gives NCHW maps of `out_indices`, else of `taps`.

    All that has a name is the model's own.
    """
    return build_with_weights(
        cls,
        name,
        pretrained,
        filter_fn=filter_fn,
        feature_cfg={"out_indices": taps, "feature_cls": "getter"},
        **kwargs,
    )

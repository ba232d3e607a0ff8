"""Finding, describing and creating models by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from . import backbones
from .backbones._register import Card, card, cards
from .scans import as_spec
from .scans._cloud import cloud_spec


def register_all() -> None:
    """Import every backbone file, which registers its models with timm."""
    for module in pkgutil.iter_modules(backbones.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{backbones.__name__}.{module.name}")


def create_model(
    name: str,
    checkpoint_path: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A model by name, like `timm.create_model`, with published weights that go in whole or not at all.

    Args:
        name: As in `list_models()`, or any model of timm.
        checkpoint_path: File of published or own weights: `.pth`, `.pt`, `.bin`, `.ckpt` or `.safetensors`, as the
            authors published it; or the folder of a run of `mamba-zoo fit`, for its best one. Every weight is used and
            none is missing; only a classifier of another size (when `num_classes` is given) keeps its initialisation.
            Works with `features_only=True` as well. None and "" are no file. Of plain and averaged weights in one file,
            those are taken that its scores belong to: the average from a run of this package or of timm's scripts, as
            timm does, the plain ones from published files; which, is logged at level INFO.
        pretrained: Load the published file from its published address.
        kwargs: Arguments of the model, such as `num_classes`, `in_chans`, `scan`, `drop_path_rate`, `device`, and of
            timm's builder, such as `features_only` and `out_indices`. None stands for the default. A function as `scan`
            is kept as the name that `scans.as_spec` gives it.

    Returns: The model in training mode, as from timm.

    Raises:
        ValueError: unknown name or scan, or a file that does not fit; the message says what the file is.
        TypeError: an argument the model does not take.
        FileNotFoundError: no file at `checkpoint_path`.
        ConnectionError: the published address cannot be reached.

    Example:
        >>> model = create_model("vmamba_tiny", num_classes=10, device="meta")
        >>> model.get_classifier()
        Linear(in_features=768, out_features=10, bias=True)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'vmamba_tiny', not {type(name).__name__}")
    architecture = split_model_name_tag(name)[0]
    if architecture not in cards():
        if ":" in name or timm.is_model(architecture):
            return timm.create_model(name, pretrained=pretrained, checkpoint_path=_text(checkpoint_path), **kwargs)
        near = difflib.get_close_matches(name, list(cards()), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see mamba_zoo.list_models()"
        raise ValueError(f"no model named {name!r}; {hint}")
    if "out_indices" in kwargs and not kwargs.get("features_only"):
        raise TypeError("out_indices= needs features_only=True")
    kwargs = _with_names(kwargs, cards()[architecture].modality)
    if not checkpoint_path:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    if pretrained:
        raise ValueError("give either checkpoint_path= or pretrained=True; both name the weights")
    # As a source of pretrained weights the file is loaded before features_only=True takes the model apart.
    overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), "file": _text(checkpoint_path), "source": None}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def _with_names(arguments: dict[str, Any], modality: str) -> dict[str, Any]:
    """`arguments` with names in place of functions that order tokens: timm keeps them all with the model."""
    name_of: Any = cloud_spec if modality == "points" else as_spec
    return {
        key: name_of(value) if key.endswith("scan") and callable(value) else value for key, value in arguments.items()
    }


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.expanduser(os.fspath(path))


def list_models(
    filter: str = "", modality: str | None = None, pretrained: bool = False, commercial: bool | None = None
) -> list[str]:
    """Names of this package's models, sorted.

    Args:
        filter: With `*` and `?` as wildcards, such as "vmamba*"; a plain word matches anywhere in the name.
        modality: "image", "video", "audio", "series", "graph", "points" or "sequence"; None lists all.
        pretrained: Only models whose authors published weights.
        commercial: True for models whose licence allows commercial use, False for the others; None lists all.

    Raises:
        ValueError: unknown modality.

    Example:
        >>> list_models("vmamba_tiny*", modality="image")
        ['vmamba_tiny', 'vmamba_tiny_s2l5', 'vmamba_tiny_v0']
    """
    modalities = sorted({entry.modality for entry in cards().values()})
    if modality is not None and modality not in modalities:
        raise ValueError(f"modality={modality!r} is unknown; choose one of {', '.join(modalities)}")
    pattern = filter if any(mark in filter for mark in "*?[") else f"*{filter}*"
    return sorted(
        name
        for name, entry in cards().items()
        if fnmatch.fnmatch(name, pattern)
        and (modality is None or entry.modality == modality)
        and (not pretrained or entry.published)
        and (commercial is None or entry.commercial == commercial)
    )


@dataclass(frozen=True)
class ModelCard(Card):
    """What is known of a model; printing it gives a table.

    Attributes:
        counted_params: Trainable parameters of the model as it is built here; None until counted.
        counted_gmacs: Billions of multiply-adds of one forward pass for one input, counted on the meta device as half
            of torch's `FlopCounterMode` total; None until counted.
        counted_as_published: Billions of operations of the same pass, counted as the authors do (`convention`); None
            until counted, and where their way is not known.
        input_size: Input of that pass, without the batch.
    """

    counted_params: int | None = None
    counted_gmacs: float | None = None
    counted_as_published: float | None = None
    input_size: tuple[int, ...] | None = None

    def __str__(self) -> str:
        rows = {
            "model": self.name,
            "modality": self.modality,
            "parameters": self.params and f"{self.params:,}",
            "parameters, counted": self.counted_params and f"{self.counted_params:,}",
            "operations": self.gflops and f"{self.gflops:g} G (published)",
            "counted the same way": self.counted_as_published and f"{self.counted_as_published:.2f} G: {self._way()}",
            "multiply-adds, counted": self.counted_gmacs
            and f"{self.counted_gmacs:.{2 if self.counted_gmacs >= 0.1 else 5}f} G at {self.input_size}: "
            "products and convolutions, and half of the scan's 9 b m d n + b m d operations",
            "ImageNet-1k top-1": self.top1 and f"{self.top1:g} % (published)",
            "licence": f"{self.license}, {'' if self.commercial else 'not '}for commercial use",
            "paper": self.paper and f"arXiv:{self.paper}",
            "source": self.source,
            "checkpoint": self.checkpoint or "none published",
            "address": self.url,
            "notes": self.notes,
        }
        shown = {key: value for key, value in rows.items() if value}
        width = max(map(len, shown))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())

    def _way(self) -> str:
        from ._counting import CONVENTIONS

        return CONVENTIONS[self.convention].text if self.convention else ""


def model_card(name: str, count: bool = False) -> ModelCard:
    """Parameters, FLOPs, licence, paper, source, published score and checkpoint file of a model.

    Args:
        name: As in `list_models()`.
        count: Also build the model on the meta device and count its parameters and the multiply-adds of one pass.

    Raises:
        ValueError: no model of that name.

    Example:
        >>> model_card("vmamba_small").checkpoint
        'vssm1_small_0229s_ckpt_epoch_240.pth'
    """
    if name not in cards():
        near = difflib.get_close_matches(name, list(cards()), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see mamba_zoo.list_models()"
        raise ValueError(f"no model named {name!r}; {hint}")
    entry = dataclasses.asdict(card(name))
    return ModelCard(**entry, **_count(name)) if count else ModelCard(**entry)


@lru_cache(maxsize=256)
def _count(name: str) -> Mapping[str, Any]:
    from ._counting import CONVENTIONS, count_operations, default_input

    # The orders of points follow from where the points are, so these models run on random ones.
    device = "cpu" if card(name).modality == "points" else "meta"
    with torch.random.fork_rng(devices=[]):
        model: Any = timm.create_model(name, device=device).eval()
        x = default_input(model)
    counted: dict[str, Any] = {"counted_params": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    if x is not None:
        convention = card(name).convention if card(name).gflops else None
        model.requires_grad_(False)  # torch's tracker of modules cannot be given a parameter that needs gradients
        try:
            operations = count_operations(model, x)
        except ValueError:  # it needs more than this one input, such as labels of shapes
            return MappingProxyType(counted)
        counted |= {"counted_gmacs": operations.multiply_adds / 1e9, "input_size": tuple(x.shape[1:])}
        if convention is not None:
            counted["counted_as_published"] = CONVENTIONS[convention].total(operations) / 1e9
    return MappingProxyType(counted)

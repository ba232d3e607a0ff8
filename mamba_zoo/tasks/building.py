"""The parts a task is put together from: the model, what is frozen, the mixing of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
from torch import nn

import mamba_zoo

FREEZE = ("none", "backbone", "bn")


def build_model(
    name: str,
    scan: str | None,
    num_classes: int | None,
    in_chans: int,
    img_size: int | None,
    pretrained: bool,
    checkpoint_path: str | None,
    drop_rate: float | None,
    drop_path_rate: float | None,
    more: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model, leaving to it whatever is None, tried once on an empty image or clip.

    Args:
        name: As in `mamba_zoo.list_models()`, or any model of timm.
        scan: Scan order.
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Height and width in pixels; only models whose weights depend on it are told.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth.
        more: Further arguments of the model.

    Raises:
        ValueError: an unknown name, a rate out of range, or images the model cannot take.
        FileNotFoundError: no such `checkpoint_path`.
    """
    for key, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{key}={rate} must lie in [0, 1), such as 0.1")
    side = image_input(name, img_size)[1]
    options: dict[str, Any] = {"in_chans": in_chans, "pretrained": pretrained}
    given = {
        "num_classes": num_classes,
        "scan": scan,
        "checkpoint_path": checkpoint_path,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        **(more or {}),
    }
    options |= {key: value for key, value in given.items() if value is not None}
    cfg = _cfg(name)
    if img_size is not None and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = img_size
    net = mamba_zoo.create_model(name, **options)
    try_image(net, name, input_shape(net, in_chans, side), side)
    return net


def image_input(name: str, size: int | None) -> tuple[int, int]:
    """Channels and side of the images a model expects.

    Args:
        name: A model.
        size: Side in pixels; None takes the model's, or 224 if it has none.

    Raises:
        ValueError: the model does not take images.
    """
    cfg = _cfg(name)
    shape = cfg.input_size if cfg else None
    if cfg is not None and shape is None:
        raise ValueError(f"{name} takes no images; choose an image model (mamba-zoo list --modality image)")
    if shape is not None and len(shape) != 3:
        raise ValueError(f"{name} takes inputs of shape {tuple(shape)}, not images; choose an image model")
    return (shape[0], size or shape[-1]) if shape else (3, size or 224)


def input_shape(net: nn.Module, in_chans: int, size: int) -> tuple[int, ...]:
    """Shape of one input without the batch: `(c, size, size)`, or what the model itself says, such as a clip's."""
    if hasattr(net, "input_shape"):
        return tuple(cast(Any, net).input_shape(size, size))
    return (in_chans, size, size)


def _cfg(name: str) -> Any:
    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def try_image(net: nn.Module, name: str, shape: tuple[int, ...], size: int) -> None:
    """Run one empty input through the model, so that a wrong size ends here and not in the middle of a run."""
    was_training = net.training
    net.eval()
    parameter = next(net.parameters())
    try:
        with torch.no_grad():
            net(parameter.new_zeros(1, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        side = max(patch) if isinstance(patch, (tuple, list)) else patch
        why = f"smaller than its patch of {side} pixels" if isinstance(side, int) and side > size else str(error)
        raise ValueError(
            f"{name} cannot take images of {size}x{size} pixels ({why}); give a larger image_size or another model"
        ) from error
    finally:
        net.train(was_training)


def freeze_parts(net: nn.Module, mode: str) -> list[nn.Module]:
    """Stop the gradients of what `mode` names; return the modules that must stay in evaluation mode.

    Raises:
        ValueError: unknown `mode`, or a model whose head cannot be told from its backbone.
    """
    if mode not in FREEZE:
        raise ValueError(f"freeze={mode!r} is unknown; choose one of {', '.join(FREEZE)}")
    if mode == "none":
        return []
    norms: list[nn.Module] = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if mode == "bn":
        for norm in norms:
            norm.requires_grad_(False)
        return norms
    if hasattr(net, "get_backbone"):
        backbone: nn.Module = cast(Any, net).get_backbone()
        backbone.requires_grad_(False)
        return [backbone]
    head: Any = cast(Any, net).get_classifier() if hasattr(net, "get_classifier") else None
    keep = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    if not keep:
        raise ValueError("freeze='backbone' needs a model with a classifier; this one has none")
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in keep)
    return [net]


def make_mixer(mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> Any:
    """Timm's mixup and cutmix, or None if both are off.

    Raises:
        ValueError: an alpha below 0.
    """
    for key, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not alpha >= 0:
            raise ValueError(f"{key}={alpha} must be at least 0, such as 0.2; 0 is off")
    if not mixup and not cutmix:
        return None
    from timm.data.mixup import Mixup

    return Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

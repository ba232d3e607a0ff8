"""From a picture to the tensor a model expects, and random changes for training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform

from .building import image_input

TRAIN_CROPS = ("resized", "padded", "none")


@dataclass(frozen=True)
class Preprocess:
    """What a model expects of its images; plain numbers, so that a checkpoint can hold it.

    Args:
        size: Height and width in pixels.
        in_chans: Channels.
        mean: Of each channel, of pixels scaled to 0..1.
        std: Likewise.
        interpolation: How images are resized.
        crop_pct: Part of the shorter side that the central crop of an evaluated image keeps.
    """

    size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @classmethod
    def for_model(cls, name: str | None, size: int | None, in_chans: int) -> Preprocess:
        """What `name` was trained with, where `size` does not say otherwise; 224 pixels if nothing is known.

        Args:
            name: A registered model, or None.
            size: Height and width; None takes the model's. A size of the user's own is not cropped.
            in_chans: 1 averages the statistics of the colours.

        Raises:
            ValueError: `name` takes no images.
        """
        import timm

        cfg = timm.get_pretrained_cfg(name) if name and timm.is_model(name) else None
        own = image_input(name, None)[1] if name else 224
        mean = tuple(cfg.mean) if cfg else IMAGENET_DEFAULT_MEAN
        std = tuple(cfg.std) if cfg else IMAGENET_DEFAULT_STD
        if in_chans == 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        crop_pct = cfg.crop_pct if cfg and size in (None, own) else 1.0
        interpolation = cfg.interpolation if cfg and cfg.interpolation else "bicubic"
        return cls(size or own, in_chans, mean, std, interpolation, crop_pct or 1.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `dataclasses.asdict`, with lists allowed for tuples."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)


def eval_transform(to: Preprocess) -> Any:
    """Resize, cut the centre, scale."""
    return create_transform(
        (to.in_chans, to.size, to.size),
        interpolation=to.interpolation,
        mean=to.mean,
        std=to.std,
        crop_pct=to.crop_pct,
    )


def train_transform(
    to: Preprocess,
    crop: str,
    crop_scale: float,
    hflip: float,
    color_jitter: float,
    auto_augment: str | None,
    random_erase: float,
) -> Any:
    """The random counterpart of `eval_transform`; see `ImageData` for the arguments.

    Raises:
        ValueError: a setting out of range.
    """
    if crop not in TRAIN_CROPS:
        raise ValueError(f"train_crop={crop!r} is unknown; choose one of {', '.join(TRAIN_CROPS)}")
    for name, value in (("hflip", hflip), ("random_erase", random_erase)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a probability and must lie between 0 and 1")
    if not 0 < crop_scale <= 1:
        raise ValueError(f"crop_scale={crop_scale} must lie between 0 and 1")
    if auto_augment:
        _check_policy(auto_augment)
    if crop == "resized":
        return create_transform(
            (to.in_chans, to.size, to.size),
            is_training=True,
            scale=(crop_scale, 1.0),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=to.interpolation,
            mean=to.mean,
            std=to.std,
            re_prob=random_erase,
        )
    return _small_transform(to, crop == "padded", hflip, auto_augment, random_erase)


def _check_policy(name: str) -> None:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    make = next((maker for start, maker in makers.items() if name.startswith(start)), auto_augment_transform)
    try:
        make(name, {})
    except (AssertionError, ValueError, KeyError):
        raise ValueError(
            f"auto_augment={name!r} is no policy of timm; use one such as 'rand-m9-mstd0.5-inc1' or 'original'"
        ) from None


def _small_transform(to: Preprocess, shift: bool, hflip: float, auto_augment: str | None, random_erase: float) -> Any:
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms as T

    # The steps of `eval_transform`: a model that is trained on stretched pictures would be tested on others.
    interpolation: Any = str_to_interp_mode(to.interpolation)
    shorter = math.floor(to.size / to.crop_pct)
    steps: list[Any] = [T.Resize(shorter, interpolation=interpolation), T.CenterCrop(to.size)]
    if shift:
        steps.append(T.RandomCrop(to.size, padding=max(1, to.size // 8)))
    if hflip:
        steps.append(T.RandomHorizontalFlip(hflip))
    if auto_augment:
        make = rand_augment_transform if auto_augment.startswith("rand") else auto_augment_transform
        grey = tuple(round(255 * m) for m in to.mean)
        steps.append(make(auto_augment, {"translate_const": round(to.size * 0.45), "img_mean": grey}))
    steps += [T.ToTensor(), T.Normalize(to.mean, to.std)]
    if random_erase:
        steps.append(RandomErasing(random_erase, mode="const", device="cpu"))
    return T.Compose(steps)

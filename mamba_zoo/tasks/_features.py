"""Maps at several strides from any image backbone, for detectors and segmenters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import timm
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

import mamba_zoo

LEVELS = 4
_ANCHOR = re.compile(r"(?<!\[)\^")  # the start of a name, not the negation of a class


class Maps(nn.Module):
    """Feature maps of a backbone, from fine to coarse.

    A backbone whose maps all have one stride, such as Vim, gets a simple feature pyramid on its last map: transposed
    convolutions make it finer, pooling makes it coarser.

    Source: the simple feature pyramid is that of ViTDet, arXiv:2203.16527, section 3, without its last convolutions,
        which the head has.

    Args:
        name: As in `mamba_zoo.list_models()`, or any image model of timm that offers `features_only`.
        scan: Scan order; None is the published one.
        img_size: Height and width in pixels. Only models whose weights depend on it are told.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file.
        drop_path_rate: Stochastic depth; None is the model's own.
        out_indices: Which maps of the backbone; None takes its own choice.
        options: Further arguments of the backbone, such as `{"patch_size": 2}`.

    Attributes:
        channels: Of each map.
        strides: Pixels per position of each map.

    Raises:
        ValueError: a model that takes no images or offers no maps, or not those of `out_indices`.
    """

    def __init__(
        self,
        name: str,
        scan: str | None = None,
        img_size: int | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_path_rate: float | None = None,
        out_indices: Sequence[int] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if name in mamba_zoo.list_models() and (modality := mamba_zoo.model_card(name).modality) != "image":
            raise ValueError(f"{name} is a model of modality {modality!r} and takes no images; choose an image model")
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        given = {
            "scan": scan,
            "checkpoint_path": checkpoint_path,
            "drop_path_rate": drop_path_rate,
            "out_indices": None if out_indices is None else tuple(out_indices),
            "img_size": img_size if cfg is not None and cfg.fixed_input_size else None,
            **(options or {}),
        }
        given = {key: value for key, value in given.items() if value is not None}
        try:
            self.body = mamba_zoo.create_model(name, features_only=True, pretrained=pretrained, **given)
        except (AssertionError, IndexError) as error:  # timm's
            raise ValueError(f"out_indices={out_indices} names maps that {name} does not have: {error}") from error
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"{name} offers no feature maps ({error}); choose an image model") from error
        info = cast(Any, self.body).feature_info
        self.channels, self.strides = list(info.channels()), list(info.reduction())
        self.pyramid: SimplePyramid | None = None
        if len(self.strides) > 1 and len(set(self.strides)) == 1:
            self.pyramid = SimplePyramid(self.channels[-1], self.strides[-1])
            self.channels, self.strides = self.pyramid.channels, self.pyramid.strides

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images `(b, c, h, w)` to one map `(b, channels[i], h / strides[i], w / strides[i])` a level."""
        maps = list(self.body(x))
        return maps if self.pyramid is None else self.pyramid(maps[-1])

    def no_weight_decay(self) -> set[str]:
        """Full names of the backbone's parameters that decay should leave alone."""
        prefix, body = self._named_body()
        return {f"{prefix}.{name}" for name in body.no_weight_decay()} if hasattr(body, "no_weight_decay") else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's parameter groups by depth; what stands on top of it comes last.

        Raises:
            ValueError: the backbone does not say.
        """
        prefix, body = self._named_body()
        if not hasattr(body, "group_matcher"):
            raise ValueError("layer_decay= needs a backbone that names its layers; this one does not")
        return prefixed(body.group_matcher(coarse=coarse), prefix)

    def _named_body(self) -> tuple[str, Any]:
        return ("body.model", self.body.model) if hasattr(self.body, "model") else ("body", self.body)


class SimplePyramid(nn.Module):
    """Four maps of a map.

    Args:
        dim: Channels of the map.
        stride: Its pixels per position. The finest map has a quarter of it, but at least 2.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        finest = min(stride, max(2, stride // 4))
        self.strides = [finest * 2**i for i in range(LEVELS)]
        self.channels: list[int] = []
        self.levels = nn.ModuleList()
        for to in self.strides:
            layers: list[nn.Module] = []
            width = dim
            for i in range(max(0, round(math.log2(stride / to)))):
                layers += [LayerNorm2d(width), nn.GELU()] if i else []
                layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                width //= 2
            # Every second position: pooling of one position each.
            layers += [nn.MaxPool2d(1, 2)] * max(0, round(math.log2(to / stride)))
            self.levels.append(nn.Sequential(*layers))
            self.channels.append(width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(b, dim, h, w)` to four maps."""
        return [level(x) for level in self.levels]


class Dense(nn.Module):
    """A network on `Maps`, which says for them what the optimizer and `freeze` ask."""

    def get_backbone(self) -> Maps:
        """What `freeze="backbone"` holds still."""
        return self._named_maps()[1]

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone."""
        prefix, maps = self._named_maps()
        return {f"{prefix}.{name}" for name in maps.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        prefix, maps = self._named_maps()
        return prefixed(maps.group_matcher(coarse), prefix)

    def _named_maps(self) -> tuple[str, Maps]:
        return next((name, module) for name, module in self.named_modules() if isinstance(module, Maps))


def prefixed(matcher: Any, prefix: str) -> Any:
    """Patterns of a `group_matcher`, for the same parameters below `prefix`."""
    if isinstance(matcher, str):
        return rf"^{re.escape(prefix)}\.(?:{re.sub(_ANCHOR, '', matcher)})"
    if isinstance(matcher, dict):
        return {key: prefixed(value, prefix) for key, value in matcher.items()}
    if isinstance(matcher, list):
        return [prefixed(item, prefix) for item in matcher]
    if isinstance(matcher, tuple):
        return (prefixed(matcher[0], prefix), *matcher[1:])
    return matcher


def statistics_of(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the colours that a model expects, of pixels scaled to 0..1."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return list(cfg.mean), list(cfg.std)

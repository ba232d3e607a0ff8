"""Heads that turn feature maps at several strides into a class for every pixel."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

_GROUPS = 32


class UPerHead(nn.Module):
    """Pooling at several scales on the coarsest map, a top-down pyramid, and all levels fused at the finest stride.

    Norms are over groups of channels instead of the batch, so that a batch of one image trains.

    Source: UPerNet, arXiv:1807.10221, section 3.1 and figure 4; the pooling is that of PSPNet, arXiv:1612.01105.

    Args:
        channels: Of each map, from fine to coarse.
        num_classes: Outputs.
        width: Channels of every level.
        bins: Sides of the grids that the coarsest map is pooled to.
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: int = 512, bins: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.pools = nn.ModuleList(conv_norm(channels[-1], width, 1) for _ in bins)
        self.top = conv_norm(channels[-1] + len(bins) * width, width)
        self.laterals = nn.ModuleList(conv_norm(c, width, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(conv_norm(width, width) for _ in channels[:-1])
        self.fuse = conv_norm(len(channels) * width, width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse to scores `(b, num_classes, h, w)` at the finest stride."""
        last = maps[-1]
        pooled = [
            resized(pool(F.adaptive_avg_pool2d(last, side)), last)
            for side, pool in zip(self.bins, self.pools, strict=True)
        ]
        levels = [self.top(torch.cat([last, *pooled], dim=1))]
        for lateral, x in zip(reversed(list(self.laterals)), reversed(maps[:-1]), strict=True):
            levels.insert(0, lateral(x) + resized(levels[0], x))
        levels = [*(conv(x) for conv, x in zip(self.smooth, levels[:-1], strict=True)), levels[-1]]
        return self.classify(self.fuse(torch.cat([resized(x, levels[0]) for x in levels], dim=1)))


class FPNHead(nn.Module):
    """A feature pyramid whose levels are brought to the finest stride by convolutions and doublings, then summed.

    Source: the semantic branch of Panoptic FPN, arXiv:1901.02446, section 3.1 and figure 3.

    Args:
        channels: Of each map, from fine to coarse.
        strides: Of each map.
        num_classes: Outputs.
        width: Channels of the pyramid; the branch has half as many.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int, width: int = 256) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(channels), width)
        self.levels = nn.ModuleList()
        for stride in strides:
            doublings = round(math.log2(stride / strides[0]))
            layers: list[nn.Module] = []
            for i in range(max(1, doublings)):
                layers.append(conv_norm(width if i == 0 else width // 2, width // 2))
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")] if doublings else []
            self.levels.append(nn.Sequential(*layers))
        self.classify = nn.Conv2d(width // 2, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse to scores `(b, num_classes, h, w)` at the finest stride."""
        pyramid = list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps))).values())
        levels = [level(x) for level, x in zip(self.levels, pyramid, strict=True)]
        # Sides that are no multiple of a stride double to a pixel too many.
        return self.classify(torch.stack([resized(x, levels[0]) for x in levels]).sum(0))


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the height and width of another one."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def conv_norm(channels: int, to: int, kernel: int = 3) -> nn.Module:
    """Convolution, norm over groups of channels, ReLU."""
    groups = math.gcd(_GROUPS, to)
    return nn.Sequential(
        nn.Conv2d(channels, to, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(groups, to), nn.ReLU()
    )

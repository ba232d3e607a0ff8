"""From images to channels-last maps and tokens: stems, downsampling, class tokens, position embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from ._block import LayerNorm
from ._recompute import recomputed


def check_image(x: Tensor, in_chans: int, smallest: int) -> None:
    """Raise ValueError unless `x` is `(b, in_chans, h, w)` with both sides at least `smallest` pixels."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected images (b, {in_chans}, h, w); see in_chans")
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but one patch needs {smallest} x {smallest} pixels; enlarge the images, or "
            f"build the model with a smaller patch_size"
        )


class MapConv(nn.Conv2d):
    """A convolution of channels-last maps, `(b, h, w, c)` to `(b, h', w', c')`; nothing is copied to get there."""

    def forward(self, input: Tensor) -> Tensor:
        """`(b, h, w, c)` to `(b, h', w', c')`."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MapBatchNorm(nn.BatchNorm2d):
    """Batch norm of channels-last maps `(b, h, w, c)`; nothing is copied to get there."""

    def forward(self, input: Tensor) -> Tensor:
        """`(b, h, w, c)` to the same shape."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Two 3x3 convolutions, each normed, with GELU in between: the stem of VMamba's second version.

    Args:
        in_chans: Image channels.
        dim: Width of the map.
        patch_size: Pixels per side of one map position: 4, 2 or 1.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: another `patch_size`.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if patch_size not in (1, 2, 4):
            raise ValueError(f"patch_size={patch_size} does not suit the convolutional stem; choose 1, 2 or 4")
        self.conv1 = MapConv(in_chans, dim // 2, 3, stride=min(patch_size, 2), padding=1, **dd)
        self.norm1 = LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = MapConv(dim // 2, dim, 3, stride=max(patch_size // 2, 1), padding=1, **dd)
        self.norm2 = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to a map `(b, h', w', dim)`, sizes rounded up."""
        x = self.conv1(x.permute(0, 2, 3, 1))
        normed = self.norm1(x)
        with recomputed(normed, self.norm1, x):
            y = self.act(normed)
        with recomputed(y, lambda x: self.act(self.norm1(x)), x):
            return self.norm2(self.conv2(y))


class PatchStem(nn.Module):
    """One linear map per patch, then a norm: the stem of VMamba's first version.

    Args:
        in_chans: Image channels.
        dim: Width of the map.
        patch_size: Pixels per side of a patch. Rows and columns that fill no patch are dropped, as published.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.proj = MapConv(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to a map `(b, h // patch_size, w // patch_size, dim)`."""
        return self.norm(self.proj(x.permute(0, 2, 3, 1)))


class ConvDownsample(nn.Module):
    """Halve a map by a 3x3 convolution, sizes rounded up, and norm it.

    Args:
        dim: Width read.
        out_dim: Width written.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv = MapConv(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, h, w, dim)` to `(b, ceil(h / 2), ceil(w / 2), out_dim)`."""
        return self.norm(self.conv(x))


class PatchMerge(nn.Module):
    """Join each 2x2 window into one token, norm and project it: the downsampling of Swin (arXiv:2103.14030).

    Args:
        dim: Width read.
        out_dim: Width written.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, h, w, dim)` to `(b, ceil(h / 2), ceil(w / 2), out_dim)`; odd sizes are padded with zeros."""
        _, h, w, _ = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        # The offset in h moves fastest: (0, 0), (1, 0), (0, 1), (1, 1).
        windows = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(windows, dim=-1)))


class PatchEmbed(nn.Module):
    """One linear map per patch; patches may overlap.

    Args:
        in_chans: Image channels.
        dim: Width of the tokens.
        patch_size: Pixels per side of a patch.
        stride: Pixels between patches.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 16, stride: int = 16, device=None, dtype=None):
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride, device=device, dtype=dtype)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along both sides of an image; pixels that fill no patch are dropped, as published."""
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to a channels-last map `(b, h', w', dim)`."""
        size = self.patch_size
        if self.stride != size:
            return self.proj(x).permute(0, 2, 3, 1)
        # One product: cuDNN's convolution of 128 images takes 0.8 ms of an H100, their bytes 0.1.
        h, w = self.grid(x.shape[2], x.shape[3])
        patches = x[:, :, : h * size, : w * size].unflatten(3, (w, size)).unflatten(2, (h, size))
        return F.linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3), self.proj.weight.flatten(1), self.proj.bias)


def insert_token(x: Tensor, token: Tensor, index: int) -> Tensor:
    """Put `token` `(1, 1, d)` before token `index` of `x` `(b, l, d)`."""
    return torch.cat([x[:, :index], token.expand(x.shape[0], -1, -1), x[:, index:]], dim=1)


def remove_token(x: Tensor, index: int) -> Tensor:
    """`x` `(b, l, d)` without token `index`."""
    return torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding with the class token in the middle, for another grid.

    Args:
        positions: `(1, h * w + 1, d)`; entry `h * w // 2` belongs to the class token and is kept as it is.
        old: The grid `(h, w)` of `positions`.
        new: The grid wanted, by bicubic interpolation.

    Returns:
        `(1, new[0] * new[1] + 1, d)`.
    """
    if tuple(old) == tuple(new):
        return positions
    middle = math.prod(old) // 2
    resample: Any = resample_abs_pos_embed
    grid = resample(remove_token(positions, middle), list(new), list(old), num_prefix_tokens=0)
    return insert_token(grid, positions[:, middle : middle + 1], math.prod(new) // 2)


def resample_grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding `(1, h * w, d)` of the grid `old` for the grid `new`, by bicubic interpolation."""
    if tuple(old) == tuple(new):
        return positions
    resample: Any = resample_abs_pos_embed
    # As the published code does it: without smoothing where the new grid is the smaller one.
    return resample(positions, list(new), list(old), num_prefix_tokens=0, antialias=False)


# torch.fx takes these whole, because they look at shapes or at memory. Not as decorators, which would hide their types.
for _leaf in (ConvStem, MapBatchNorm, PatchMerge):
    register_notrace_module(_leaf)

"""Mamba3D: Mamba over patches of a point cloud, with pooling over neighbours. Han et al. 2024, arXiv:2404.14966.

Follows the arithmetic of xhanxu/Mamba3D@b519a9c4d4f2 models/Mamba3D.py (no licence stated).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ..scans._cloud import PointScanLike, cloud_order, trusted
from ._block import LayerNorm
from ._keys import Key, rename
from ._point_model import (
    PatchEncoder,
    PointBackbone,
    PointHead,
    PositionEmbed,
    build_point_model,
    mark_published,
    mixer_keys,
    pointwise,
    resolve_point_scan,
)
from ._points import group_points, nearest_points, take_points
from ._register import Card, register
from ._ssm import CausalConv1d, SelectiveSSM, resolve_dt_rank


class ChannelMamba(nn.Module):
    """A Mamba mixer with a second branch that reads the channels backwards ("bimamba v4").

    Reversing the channels of inputs and gates together exchanges the two, too. Both branches are causal in time.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        ssm: False leaves the scans and their parameters out.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        ssm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = CausalConv1d(2, inner, d_conv, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank("auto", dim), 2, **dd) if ssm else None
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order (b, 2, l)`, a row for each branch, to `(b, l, dim)`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(torch.stack([x, z.flip(-1)], dim=2), order)
        gate = torch.stack([z, x.flip(-1)], dim=2)
        y = u * nn.functional.silu(gate) if self.ssm is None else self.ssm(u, gate, order)
        return self.out_proj((y[:, :, 0] + y[:, :, 1].flip(-1)).to(u.dtype))


class LocalPooling(nn.Module):
    """Local norm pooling: differences to the nearest patches, scaled, and averaged by a softmax over them.

    Args:
        dim: Width.
        neighbours: Nearest patches, the patch itself among them.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, neighbours: int = 4, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.neighbours = neighbours
        self.alpha = nn.Parameter(torch.ones(2 * dim, **dd))
        self.beta = nn.Parameter(torch.zeros(2 * dim, **dd))
        self.norm = LayerNorm(2 * dim, **dd)
        self.proj = nn.Linear(2 * dim, dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, joint: bool) -> Tensor:
        """Tokens `(b, g + 1, dim)`, the class token first, which passes through, to the same shape.

        Args:
            x: Tokens.
            index: The nearest patches of each patch, `(b, g, k)`.
            joint: Scale by one deviation of the whole batch, as published, rather than by one for each cloud.
        """
        token, patches = x[:, :1], x[:, 1:]
        offset = take_points(patches, index) - patches[:, :, None]
        wide = offset.float()
        deviation = wide.std() if joint else wide.std(dim=(1, 2, 3), keepdim=True)
        offset = (wide / (deviation + 1e-5)).to(x.dtype)
        both = torch.cat([offset, patches[:, :, None].expand_as(offset)], dim=-1) * self.alpha + self.beta
        pooled = (both * both.softmax(dim=2)).sum(2)
        return torch.cat([token, self.act(self.proj(self.norm(pooled)))], dim=1)


class Mamba3DBlock(nn.Module):
    """Positions are added, then `x + pooling(norm(x))`, then `x + mixer(norm(x))`.

    Args:
        dim: Width.
        mixer: Takes `(x, order)`.
        neighbours: For the pooling.
        drop_path: Rate at which a sample skips a branch in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, neighbours: int = 4, drop_path: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.local = LocalPooling(dim, neighbours, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, position: Tensor, index: Tensor, order: Tensor, joint: bool) -> Tensor:
        """Tokens `(b, g + 1, dim)` to the same shape."""
        x = x + position
        x = x + self.drop_path(self.local(self.norm1(x), index, joint))
        return x + self.drop_path(self.mixer(self.norm2(x), order))


class Mamba3D(PointBackbone):
    """Patches and a class token, in the order in which the furthest points were found.

    Args:
        num_classes: Classes; 0 returns what the classifier would read.
        groups: Patches.
        group_size: Points of a patch.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        neighbours: Patches that the local pooling looks at.
        scan: Orders of the patches by their centres, see `scans.points`: one for both branches of the mixer, or one
            for each; the class token comes first. "none" keeps the convolutions only.
        drop_rate: Dropout in the head.
        drop_path_rate: Stochastic depth of the last block.
        published: Compute across the batch as the published code does: one deviation for all clouds in the pooling, and
            the mean of the first cloud's tokens in the head of every cloud. None does so for published weights, whose
            published scores were taken in batches of 32.
        skip_origin: See `PointMamba`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, or one of more than two directions.
    """

    def __init__(
        self,
        num_classes: int = 40,
        groups: int = 128,
        group_size: int = 32,
        dim: int = 384,
        depth: int = 12,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        neighbours: int = 4,
        scan: PointScanLike = "given",
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        published: bool | None = None,
        skip_origin: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(num_classes, published)
        dd: Any = {"device": device, "dtype": dtype}
        spec, k = resolve_point_scan(scan)
        if k > 2:
            raise ValueError(f"scan={scan!r} has {k} directions, but the mixers of Mamba3D have two branches")
        self.scan, self.k = (spec, k) if k else ("given", 1)
        self.groups, self.group_size, self.neighbours, self.skip_origin = groups, group_size, neighbours, skip_origin
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.patch_embed = PatchEncoder(dim, **dd)
        self.pos_embed = PositionEmbed(dim, nn.SiLU, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.cls_pos = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.blocks = nn.ModuleList(
            Mamba3DBlock(dim, ChannelMamba(dim, d_state, d_conv, expand, k > 0, **dd), neighbours, rate, **dd)
            for rate in rates
        )
        self.norm = LayerNorm(dim, **dd)
        self.num_features = dim
        self.head = PointHead(2 * dim, num_classes, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.cls_pos, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """Clouds `(b, n, 3)` to normed tokens `(b, g + 1, dim)`, the class token first, patches furthest first."""
        self.check(x)
        patches, centres = group_points(x, self.groups, self.group_size, self.skip_origin)
        tokens = self.patch_embed(patches)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(x), -1, -1), tokens], dim=1)
        position = self.pos_embed(centres)
        position = torch.cat([self.cls_pos.to(position.dtype).expand(len(x), -1, -1), position], dim=1)
        order = nn.functional.pad(cloud_order(self.scan, centres) + 1, (1, 0)).expand(-1, 2, -1)
        order = trusted(order.contiguous(), tokens.shape[1])
        index = nearest_points(centres, centres, self.neighbours)[1]
        for block in self.blocks:
            tokens = self.run(block, tokens, position, index, order, self.published)
        return self.norm(tokens)

    def pool(self, x: Tensor) -> Tensor:
        """The class token, and the maximum plus the mean of the others."""
        token, patches = x[:, 0], x[:, 1:]
        mean = patches.mean(1)
        return torch.cat([token, patches.amax(1) + (mean[:1] if self.published else mean)], dim=-1)


_HEAD = {0: "hidden.0", 1: "hidden.1", 4: "hidden.4", 5: "hidden.5", 8: "fc"}
KEYS = [
    Key(r"^encoder\.(first|second)_conv\.(\d)\.", r"patch_embed.\1.\2."),
    Key(r"^(patch_embed\.(first|second)\.[03]\.weight)$", r"\1", convert=pointwise),
    Key(r"^cls_head_finetune\.(\d)\.", lambda found: f"head.{_HEAD[int(found[1])]}."),
    Key(r"^blocks\.blocks\.", "blocks."),
    Key(r"\.lfa\.lga\.affine_(alpha|beta)_feat$", r".local.\1", convert=lambda value: value.flatten()),
    Key(r"\.lfa\.pre_norm_ft\.", ".local.norm."),
    Key(r"\.lfa\.mlp\.share_mlp\.", ".local.proj."),
    Key(r"^(blocks\.\d+\.local\.proj\.weight)$", r"\1", convert=pointwise),
    *mixer_keys(r"^(blocks\.\d+\.mixer\.)"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    published = any(name.startswith("blocks.blocks.") for name in state_dict)
    return mark_published(rename(state_dict, KEYS) if published else state_dict, model, published)


_HUB = "https://huggingface.co/hanx/Mamba3D/resolve/main"
_CFG: dict[str, Any] = {"input_size": None, "classifier": "head.fc"}


def _card(params: int, folder: str, file: str, drop_path: float, notes: str) -> Card:
    return Card(
        "points", "xhanxu/Mamba3D@b519a9c4d4f2 models/Mamba3D.py", "none stated", "2404.14966", params,
        drop_path=drop_path, checkpoint=file, url=f"{_HUB}/{folder}/{file}", notes=notes,
    )  # fmt: skip


@register(
    _card(
        16_934_184, "modelnet40_scratch_93.4", "ckpt-best.pth", 0.2,
        "ModelNet40, 1,024 points: 93.4 % from scratch; tag pointmae: 94.7 (published).",
    ),
    tag="modelnet40",
    others={"pointmae": {"url": f"{_HUB}/modelnet40_pointmae_94.7/ckpt-best.pth"}},
    num_classes=40,
    **_CFG,
)  # fmt: skip
def mamba3d(pretrained: bool = False, **kwargs: Any) -> Mamba3D:
    """Mamba3D for ModelNet40: 17 M parameters, 93.4 % of 40 classes from 1,024 points, from scratch (paper)."""
    return build_point_model(Mamba3D, "mamba3d", pretrained, checkpoint_filter_fn, **kwargs)


@register(
    _card(
        16_927_759, "scanobjectnn_hardest_scratch_91.81", "ckpt-best-91.8.pth", 0.1,
        "ScanObjectNN PB_T50_RS, 2,048 points: 91.81 % from scratch; tag pointmae: 92.05 (published).",
    ),
    tag="hardest",
    others={"pointmae": {"url": f"{_HUB}/scanobjectnn_hardest_pointmae_92.05/ckpt-best.pth"}},
    num_classes=15,
    **_CFG,
)  # fmt: skip
def mamba3d_scanobjectnn(pretrained: bool = False, **kwargs: Any) -> Mamba3D:
    """Mamba3D for ScanObjectNN: 15 classes, 2,048 points; 91.81 % on PB_T50_RS from scratch (paper)."""
    args = {"num_classes": 15, **kwargs}
    return build_point_model(Mamba3D, "mamba3d_scanobjectnn", pretrained, checkpoint_filter_fn, **args)

"""PlainMamba: snakes over a map of one width. Yang et al. 2024, arXiv:2403.17695.

Follows the arithmetic of ChenhongyiYang/PlainMamba@0975a1d0d8bc mmcls/plain_mamba_dev (Apache-2.0), channels-last
throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.drop import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..scans import ScanLike, scan_order
from ._base import Pyramid, Stage
from ._block import LayerNorm, are_hooked
from ._depthwise import DepthwiseConv
from ._direction import DirectionAwareSSM
from ._embed import MapBatchNorm, MapConv, resample_grid
from ._init import init_linear_, trunc_normal_
from ._keys import Key, rename
from ._register import Card, build_model, image_cfg, register
from ._ssm import DirectionLinear, SelectiveSSM, resolve_dt_rank, resolve_scan


class PlainMambaMixer(nn.Module):
    """The mixer of PlainMamba: a depthwise convolution of the map, direction-aware scans summed, a gate.

    Args:
        dim: Model width.
        scan: Orders as a specification for `scans.scan_order`; "none" leaves the scan and its parameters out.
        d_state: States n.
        expand: Inner width in units of `dim`.
        conv_size: Side of the convolution, an odd number.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        aligned: See `DirectionAwareSSM`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        scan: str = "snake",
        d_state: int = 16,
        expand: float = 2,
        conv_size: int = 7,
        dt_rank: int | str = "auto",
        aligned: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.scan = scan
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv = DepthwiseConv(inner, conv_size, activation="silu", **dd)
        rank = resolve_dt_rank(dt_rank, dim)
        self.ssm = None if scan == "none" else DirectionAwareSSM(inner, d_state, rank, aligned, **dd)
        self.out_proj = nn.Linear(inner, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        _, h, w, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = u = self.conv(x)
        if self.ssm is not None:
            y = self.ssm(u.flatten(1, 2), scan_order(self.scan, (h, w), x.device), (h, w)).unflatten(1, (h, w))
        return self._projected(y * F.silu(z), u.dtype)

    def _projected(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        layer, kind = self.out_proj, y.device.type
        plain = type(layer) is nn.Linear and not are_hooked(layer)
        if dtype != torch.float16 or not plain or not torch.is_autocast_enabled(kind):
            return layer(y.to(dtype))
        # Sums over directions, which no norm follows, leave the range of float16 in training.
        with torch.autocast(kind, enabled=False):
            return F.linear(y.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


class PlainMambaBlock(nn.Module):
    """`x + drop_path(mixer(norm(x)))`, and in some layers a convolution whose output takes the place of the map.

    Args:
        dim: Width.
        mixer: Takes and returns a map.
        conv: Whether a normed depthwise 3x3 convolution and GELU follow, with nothing beside them.
        drop_path: Rate at which a sample skips the mixer in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, mixer: nn.Module, conv: bool = False, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.conv = nn.Identity()
        if conv:
            taps = DepthwiseConv(dim, bias=False, **dd)
            self.conv = nn.Sequential(taps, MapBatchNorm(dim, **dd), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        return self.conv(x + self.drop_path(self.mixer(self.norm(x, narrow=True))))


class PlainMambaStem(nn.Module):
    """Convolutions at half the size, then one linear map per patch and a position embedding.

    Args:
        in_chans: Image channels.
        dim: Width of the map.
        convs: 3x3 convolutions after the first 7x7 one.
        hidden: Their width.
        patch_size: Pixels per side of a patch, an even number. Zeros fill the last patches of each row and column.
        grid: Patches `(h, w)` that the position embedding is made for; it is resampled for others.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        convs: int,
        hidden: int,
        patch_size: int,
        grid: tuple[int, int],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.side, self.grid = patch_size // 2, grid
        first = MapConv(in_chans, hidden, 7, stride=2, padding=3, bias=False, **dd)
        others = [MapConv(hidden, hidden, 3, padding=1, bias=False, **dd) for _ in range(convs)]
        self.convs = nn.ModuleList([first, *others])
        self.norms = nn.ModuleList(MapBatchNorm(hidden, **dd) for _ in self.convs)
        self.proj = MapConv(hidden, dim, self.side, stride=self.side, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), dim, **dd))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to a map `(b, ceil(h / patch_size), ceil(w / patch_size), dim)`."""
        x = x.permute(0, 2, 3, 1).contiguous()  # channels last, which what follows keeps
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        _, h, w, _ = x.shape
        if h % self.side or w % self.side:
            x = F.pad(x, (0, 0, 0, -w % self.side, 0, -h % self.side))
        x = self.proj(x)
        return x + resample_grid(self.pos_embed, self.grid, (x.shape[1], x.shape[2])).view(1, *x.shape[1:])


class PlainMamba(Pyramid):
    """PlainMamba: one width and one stride throughout, no class token, no MLP.

    Images of any size are taken. Every block is a stage of its own for `features_only` and `forward_intermediates`.

    Args:
        img_size: Pixels per side, or `(height, width)`, that the position embedding is made for.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        patch_size: Pixels per side of a patch, an even number.
        dim: Width.
        depth: Blocks.
        stem_convs: 3x3 convolutions in the stem.
        stem_dim: Their width.
        conv_blocks: Blocks that end in a convolution, by number.
        d_state: States n.
        expand: Inner width of the mixer in units of `dim`.
        conv_size: Side of the mixer's convolution.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Visiting orders: a name, a specification, a `Scan` or a function; see `mamba_zoo.scans`. Directions share
            all parameters, so published weights go with any number of them. "none" leaves the scan and its parameters
            out of every block, as a control.
        aligned: False computes what was published: a direction visits the tokens in its order, but meets their steps, B
            and C in raster order. True moves them along, as the paper describes; published weights do not fit that.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, an odd `patch_size`, or a number in `conv_blocks` that no block has.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        stem_dim: int = 64,
        conv_blocks: Sequence[int] = (),
        d_state: int = 16,
        expand: float = 2,
        conv_size: int = 7,
        dt_rank: int | str = "auto",
        scan: ScanLike = "snake",
        aligned: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size={patch_size} must be even: the stem halves the image before it cuts patches")
        if any(not 0 <= i < depth for i in conv_blocks):
            raise ValueError(f"conv_blocks={tuple(conv_blocks)} must be numbers of blocks, from 0 to {depth - 1}")
        spec, _ = resolve_scan(scan)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        mixer = partial(PlainMambaMixer, dim, spec, d_state, expand, conv_size, dt_rank, aligned, **dd)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = (-(-height // patch_size), -(-width // patch_size))
        super().__init__(
            PlainMambaStem(in_chans, dim, stem_convs, stem_dim, patch_size, grid, **dd),
            [Stage(None, [PlainMambaBlock(dim, mixer(), i in conv_blocks, rates[i], **dd)]) for i in range(depth)],
            [dim] * depth,
            [patch_size] * depth,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            **dd,
        )
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.scan, self.grid = spec, grid
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    """As the published code starts: truncated normal weights and zero biases, those of the steps included."""
    init_linear_(module)
    if isinstance(module, DirectionLinear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, SelectiveSSM):
        nn.init.zeros_(module.dt_bias)


def _twice(bias: Tensor) -> Tensor:
    """The published mixers add their step bias twice, in the projection and in the scan; ours is the sum."""
    return 2 * bias


_BLOCK = r"^(stages\.\d+\.blocks\.0\.)"
KEYS = [
    Key(r"^backbone\.", ""),
    Key(r"^pos_embed$", "stem.pos_embed"),
    Key(r"^patch_embed\.stem\.0\.", "stem.convs.0."),
    Key(r"^patch_embed\.stem\.1\.", "stem.norms.0."),
    *(
        key
        for i in range(4)
        for key in (
            Key(rf"^patch_embed\.convs\.{3 * i}\.", f"stem.convs.{i + 1}."),
            Key(rf"^patch_embed\.convs\.{3 * i + 1}\.", f"stem.norms.{i + 1}."),
        )
    ),
    Key(r"^patch_embed\.projection\.", "stem.proj."),
    Key(r"^ln1\.", "norm."),
    Key(r"^layers\.(\d+)\.", r"stages.\1.blocks.0."),
    Key(rf"{_BLOCK}dw\.", r"\1conv."),
    Key(rf"{_BLOCK}mamba\.(in_proj|out_proj)\.", r"\1mixer.\2."),
    Key(rf"{_BLOCK}mamba\.conv2d\.", r"\1mixer.conv."),
    Key(rf"{_BLOCK}mamba\.direction_Bs$", r"\1mixer.ssm.direction_B"),
    *(Key(rf"{_BLOCK}mamba\.{name}$", rf"\1mixer.ssm.{name}", 0) for name in ("A_log", "D")),
    *(Key(rf"{_BLOCK}mamba\.{name}\.weight$", rf"\1mixer.ssm.{name}.weight", 0) for name in ("x_proj", "dt_proj")),
    Key(rf"{_BLOCK}mamba\.dt_proj\.bias$", r"\1mixer.ssm.dt_bias", 0, _twice),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, its position embedding resampled if the model's patch grid is another.

    The published files of L2 and L3 may hold a second, averaged copy of every weight ("ema_backbone_..."); their plain
    entries are the averaged ones already, so the copy is left out.
    """
    state = rename({key: value for key, value in state_dict.items() if not key.startswith("ema_")}, KEYS)
    positions = state.get("stem.pos_embed")
    if positions is not None and isinstance(model, PlainMamba) and positions.ndim == 3:
        side = math.isqrt(positions.shape[1])
        if positions.shape[1] != math.prod(model.grid) and side * side == positions.shape[1]:
            state["stem.pos_embed"] = resample_grid(positions, (side, side), model.grid)
    return state


_CFG = image_cfg("stem.convs.0", "head.fc", pool_size=(14, 14))


def _card(size: str, params: int, top1: float, drop_path: float) -> Card:
    return Card(
        "image",
        "ChenhongyiYang/PlainMamba@0975a1d0d8bc mmcls/plain_mamba_dev/models/plain_mamba/plain_mamba.py",
        "Apache-2.0",
        "2403.17695",
        params,
        top1=top1,
        drop_path=drop_path,
        checkpoint=f"{size}.pth",
        url=f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/{size}.pth",
        notes="Steps, B and C do not follow the scan, in the published code as here; see aligned=.",
    )


def _build(name: str, pretrained: bool, **kwargs: Any) -> PlainMamba:
    return build_model(PlainMamba, name, pretrained, checkpoint_filter_fn, (-4, -3, -2, -1), **kwargs)


@register(_card("l1", 7_551_656, 77.9, 0.2), tag="in1k", **_CFG)
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1: 7.6 M parameters, 77.9 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("plainmamba_l1", pretrained, **{"dim": 192, "conv_blocks": (0,), **kwargs})


@register(_card("l2", 26_145_832, 81.6, 0.2), tag="in1k", **_CFG)
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2: 26 M parameters, 81.6 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("plainmamba_l2", pretrained, **{"dim": 384, "stem_convs": 2, **kwargs})


@register(_card("l3", 50_956_456, 82.3, 0.4), tag="in1k", **_CFG)
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3: 51 M parameters, 82.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("plainmamba_l3", pretrained, **{"dim": 448, "depth": 36, "stem_convs": 2, **kwargs})


# torch.fx takes these whole: they look at shapes and devices. Not as decorators, which would hide their types.
for _leaf in (PlainMambaMixer, PlainMambaStem):
    register_notrace_module(_leaf)

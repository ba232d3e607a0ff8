"""MambaVision: convolutions, then windows of Mamba mixers and of attention. Hatamizadeh and Kautz, arXiv:2407.08083.

Written from the paper and from a description of what the published models compute (NVlabs/MambaVision@7860a506b2eb),
whose code may not be used commercially; none of it was copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.attention import Attention
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from ..kernels import depthwise_conv2d
from ..scans import ScanLike, scan_order
from ._base import Pyramid, Stage
from ._block import LayerNorm, branch_scale, skip_rate
from ._embed import MapBatchNorm, MapConv
from ._init import init_linear_, init_uniform_, trunc_normal_
from ._keys import Key, rename
from ._register import Card, build_model, image_cfg, register
from ._ssm import DirectionLinear, SelectiveSSM, resolve_dt_rank, resolve_scan
from ._windows import join_windows, split_windows

# torch.fx takes these whole: they look at shapes.
for _function in ("branch_scale", "join_windows", "split_windows"):
    torch.fx.wrap(_function)


class MambaVisionMixer(nn.Module):
    """Half of the channels through a selective scan, the other half beside it; both convolved along the tokens.

    The two halves are joined, not multiplied: there is no gate. The convolution is symmetric, not causal, and runs
    along the rows of the window whatever the scan.

    Args:
        dim: Model width.
        side: Positions per side of a window.
        scan: Orders within a window, as a specification for `scans.scan_order`.
        k: Directions of `scan`, summed; 0 leaves the scan and its parameters out.
        d_state: States n.
        d_conv: Taps of the convolution, an odd number.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        side: int,
        scan: str = "raster",
        k: int = 1,
        d_state: int = 8,
        d_conv: int = 3,
        dt_rank: int | str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        half = dim // 2
        self.side, self.scan = side, scan
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv = TokenConv(2, half, d_conv, **dd)
        self.ssm = SelectiveSSM(half, d_state, resolve_dt_rank(dt_rank, dim), k, **dd) if k else None
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Windows `(b, side * side, dim)` to the same shape."""
        u, z = self.conv(self.in_proj(x)).chunk(2, dim=-1)
        if self.ssm is not None:
            order = scan_order(self.scan, (self.side, self.side), x.device)
            u = self.ssm(u, order=order, reduce="sum").to(z.dtype)
        return self.out_proj(torch.cat([u, z], dim=-1))


class TokenConv(nn.Module):
    """A depthwise convolution along the tokens, centred on each and without bias, then SiLU.

    Args:
        groups: Parts of the channels; `weight[i]`, `(d, w)`, are the taps of part `i`.
        dim: Channels d of a part.
        width: Taps w, an odd number.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(self, groups: int, dim: int, width: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, dim, width, device=device, dtype=dtype))
        init_uniform_(self.weight, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, groups * dim)` to the same shape; zeros are read beyond both ends."""
        weight = self.weight.flatten(0, 1)[:, None, None]
        return depthwise_conv2d(x[:, None], weight, activation="silu")[:, 0]  # maps of one row

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        groups, dim, width = self.weight.shape
        return f"groups={groups}, dim={dim}, width={width}"


class WindowBlock(nn.Module):
    """A mixer or attention, and an MLP, each `x + drop_path(scale * f(norm(x)))`, over the tokens of windows.

    Args:
        dim: Width.
        mixer: Takes and returns `(b, l, dim)`.
        mlp_ratio: Hidden width of the MLP in units of `dim`.
        layer_scale: Where the learned scales of both branches start; None has none.
        drop_path: Rate at which a window skips a branch in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.scale1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.scale2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(b, l, dim)` to the same shape."""
        y = self.scale1(self.mixer(self.norm1(x, narrow=True)))
        x, y = self.norm2(x, y, branch_scale(y, skip_rate(self.drop_path1)), narrow=True)
        return x + self.drop_path2(self.scale2(self.mlp(y)))


class ConvBlock(nn.Module):
    """Two normed 3x3 convolutions with GELU in between, beside the identity.

    Args:
        dim: Width.
        drop_path: Rate at which a sample skips the branch in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv1 = MapConv(dim, dim, 3, padding=1, **dd)
        self.norm1 = MapBatchNorm(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = MapConv(dim, dim, 3, padding=1, **dd)
        self.norm2 = MapBatchNorm(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        y = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(y)))


class MambaVisionStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each normed and rectified.

    Args:
        in_chans: Image channels.
        hidden: Width after the first convolution.
        dim: Width after the second.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, in_chans: int, hidden: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv1 = MapConv(in_chans, hidden, 3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = MapBatchNorm(hidden, eps=1e-4, **dd)
        self.conv2 = MapConv(hidden, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = MapBatchNorm(dim, eps=1e-4, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, c, h, w)` to a map `(b, h', w', dim)`, a quarter of the size, rounded up."""
        # Channels last from the start, which the convolutions and norms that follow keep.
        x = F.relu(self.norm1(self.conv1(x.permute(0, 2, 3, 1).contiguous())))
        return F.relu(self.norm2(self.conv2(x)))


class WindowStage(Stage):
    """Downsampling, then all blocks on the windows of the map.

    Args:
        downsample: First module, from map to map.
        blocks: Take and return windows `(b, side * side, d)`.
        side: Positions per side of a window. The map is padded with zeros at the right and the bottom to whole windows;
            what is padded takes part in every block, as published.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], side: int):
        super().__init__(downsample, blocks)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """`(b, h, w, d)` to `(b, h', w', d')`."""
        x = self.downsample(x)
        windows = split_windows(x, self.side)
        run: Any = partial(checkpoint_seq, self.blocks) if self.grad_checkpointing else self.blocks
        windows = run(windows)
        return join_windows(windows, self.side, x.shape[1], x.shape[2])


class MambaVision(Pyramid):
    """MambaVision: two convolutional stages, then two whose blocks are Mamba mixers at first and attention after.

    Images of any size are taken, in windows of a fixed number of positions. `features_only` gives each stage before the
    downsampling that follows it, which here is the first module of the next stage.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        depths: Blocks of the four stages. The first half of the last two stages, rounded up, are mixers.
        dim: Width of the first stage, doubled from stage to stage.
        stem_dim: Width within the stem.
        heads: Attention heads of the last two stages.
        windows: Positions per side of a window in the last two stages.
        mlp_ratio: Hidden width of the MLP in units of its stage's width.
        layer_scale: Where the learned scales of the branches start; None has none.
        d_state: States n.
        d_conv: Taps of the mixer's convolution.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of the stage's width, rounded up.
        scan: Visiting orders of the positions of a window: a name, a specification, a `Scan` or a function; see
            `mamba_zoo.scans`. Directions have parameters of their own and are summed. "none" leaves the scan and its
            parameters out of every mixer, as a control.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, or numbers of stages other than four and two.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 3, 8, 4),
        dim: int = 80,
        stem_dim: int = 32,
        heads: Sequence[int] = (8, 16),
        windows: Sequence[int] = (14, 7),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        d_state: int = 8,
        d_conv: int = 3,
        dt_rank: int | str = "auto",
        scan: ScanLike = "raster",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        for argument, value, count in (("depths", depths, 4), ("heads", heads, 2), ("windows", windows, 2)):
            if len(value) != count:
                raise ValueError(f"{argument}={tuple(value)} must have {count} entries")
        spec, k = resolve_scan(scan)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [dim * 2**i for i in range(4)]
        mixer = partial(MambaVisionMixer, scan=spec, k=k, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank, **dd)
        block = partial(WindowBlock, mlp_ratio=mlp_ratio, layer_scale=layer_scale, **dd)
        stages: list[nn.Module] = [
            Stage(_halve(dims[i - 1], **dd) if i else None, [ConvBlock(dims[i], rate, **dd) for rate in rates[i]])
            for i in (0, 1)
        ]
        for i, count, side in zip((2, 3), heads, windows, strict=True):
            attention = partial(Attention, dims[i], count, qkv_bias=True, **dd)
            mixers = (depths[i] + 1) // 2
            blocks = [
                block(dims[i], mixer(dims[i], side) if j < mixers else attention(), drop_path=rate)
                for j, rate in enumerate(rates[i])
            ]
            stages.append(WindowStage(_halve(dims[i - 1], **dd), blocks, side))
        strides = [4, 8, 16, 32]
        super().__init__(
            MambaVisionStem(in_chans, stem_dim, dim, **dd),
            stages,
            dims,
            strides,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            **dd,
        )
        self.norm = MapBatchNorm(dims[-1], **dd)
        self.scan = spec
        self.apply(_init_weights)


def _halve(dim: int, **dd: Any) -> MapConv:
    return MapConv(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)


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


def _taps(weight: Tensor) -> Tensor:
    return weight.squeeze(1)


_STAGE = r"^(stages\.\d+\.blocks\.\d+\.)"
_MIXER = rf"{_STAGE}mixer\."
KEYS = [
    Key(r"^(model|encoder)\.(?=patch_embed|levels|norm|head)", ""),
    Key(r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
    Key(r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
    Key(r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
    Key(r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
    Key(r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    Key(r"^levels\.", "stages."),
    Key(r"^head\.(weight|bias)$", r"head.fc.\1"),
    Key(rf"{_STAGE}gamma_(\d)$", r"\1scale\2.gamma"),
    *(Key(rf"{_MIXER}{name}$", rf"\1mixer.ssm.{name}", 0) for name in ("A_log", "D")),
    *(Key(rf"{_MIXER}{name}\.weight$", rf"\1mixer.ssm.{name}.weight", 0) for name in ("x_proj", "dt_proj")),
    Key(rf"{_MIXER}dt_proj\.bias$", r"\1mixer.ssm.dt_bias", 0, _twice),
    Key(rf"{_MIXER}conv1d_x\.weight$", r"\1mixer.conv.weight", 0, _taps),
    Key(rf"{_MIXER}conv1d_z\.weight$", r"\1mixer.conv.weight", 1, _taps),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    return rename(state_dict, KEYS)


def _cfg(size: int = 224, crop_pct: float = 1.0, **cfg: Any) -> dict[str, Any]:
    pool = (size // 32, size // 32)
    return image_cfg("stem.conv1", "head.fc", size, crop_pct=crop_pct, pool_size=pool, **cfg)


def _card(repository: str, file: str, params: int, gflops: float, top1: float, drop_path: float | None = None) -> Card:
    return Card(
        "image",
        "NVlabs/MambaVision@7860a506b2eb mambavision/models/mamba_vision.py",
        "CC-BY-NC-SA-4.0",
        "2407.08083",
        params,
        gflops,
        top1,
        drop_path,
        file,
        f"https://huggingface.co/nvidia/MambaVision-{repository}/resolve/main/{file}",
        "NVIDIA's weights are for non-commercial use only, and so is its code, of which nothing is used here.",
        "nothing fused",
    )


def _build(name: str, pretrained: bool, **kwargs: Any) -> MambaVision:
    return build_model(MambaVision, name, pretrained, checkpoint_filter_fn, **kwargs)


_B = {"depths": (3, 3, 10, 5), "dim": 128, "stem_dim": 64, "layer_scale": 1e-5}
_L = {"depths": (3, 3, 10, 5), "dim": 196, "stem_dim": 64, "heads": (16, 32), "layer_scale": 1e-5}
_L2 = {**_L, "depths": (3, 3, 12, 5)}
_L3 = {**_L, "depths": (3, 3, 20, 10), "dim": 256}


@register(_card("T-1K", "mambavision_tiny_1k.pth.tar", 31_794_248, 4.4, 82.3, 0.2), tag="in1k", **_cfg())
def mambavision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T: 32 M parameters, 82.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_t", pretrained, **kwargs)


@register(_card("T2-1K", "mambavision_tiny2_1k.pth.tar", 35_104_008, 5.1, 82.7, 0.2), tag="in1k", **_cfg(crop_pct=0.98))
def mambavision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2: 35 M parameters, 82.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_t2", pretrained, **{"depths": (1, 3, 11, 4), **kwargs})


@register(_card("S-1K", "mambavision_small_1k.pth.tar", 50_140_584, 7.5, 83.3, 0.2), tag="in1k", **_cfg(crop_pct=0.93))
def mambavision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S: 50 M parameters, 83.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_s", pretrained, **{"depths": (3, 3, 7, 5), "dim": 96, "stem_dim": 64, **kwargs})


@register(_card("B-1K", "mambavision_base_1k.pth.tar", 97_685_288, 15.0, 84.2, 0.3), tag="in1k", **_cfg())
def mambavision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B: 98 M parameters, 84.2 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_b", pretrained, **{**_B, **kwargs})


@register(_card("B-21K", "mambavision_base_21k.pth.tar", 97_685_288, 15.0, 84.9), tag="in21k_ft_in1k", **_cfg())
def mambavision_b_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B pretrained on ImageNet-21k: 84.9 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_b_21k", pretrained, **{**_B, **kwargs})


@register(_card("L-1K", "mambavision_large_1k.pth.tar", 227_961_048, 34.9, 85.0, 0.3), tag="in1k", **_cfg())
def mambavision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L: 228 M parameters, 85.0 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_l", pretrained, **{**_L, **kwargs})


@register(_card("L-21K", "mambavision_large_21k.pth.tar", 227_961_048, 34.9, 86.1), tag="in21k_ft_in1k", **_cfg())
def mambavision_l_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L pretrained on ImageNet-21k: 86.1 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_l_21k", pretrained, **{**_L, **kwargs})


@register(_card("L2-1K", "mambavision_large2_1k.pth.tar", 241_554_824, 37.5, 85.3, 0.3), tag="in1k", **_cfg())
def mambavision_l2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2: 242 M parameters, 85.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("mambavision_l2", pretrained, **{**_L2, **kwargs})


@register(
    _card("L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", 241_554_824, 196.3, 87.3),
    tag="in21k_ft_in1k",
    **_cfg(512, 0.93, crop_mode="squash"),
)
def mambavision_l2_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 in windows of 32 and 16, pretrained on ImageNet-21k: 87.3 % top-1 at 512 (official README)."""
    return _build("mambavision_l2_512_21k", pretrained, **{**_L2, "windows": (32, 16), **kwargs})


@register(
    _card("L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", 739_570_472, 122.3, 87.3),
    tag="in21k_ft_in1k",
    **_cfg(256),
)
def mambavision_l3_256_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 in windows of 16 and 8, pretrained on ImageNet-21k: 87.3 % top-1 at 256 (official README)."""
    return _build("mambavision_l3_256_21k", pretrained, **{**_L3, "windows": (16, 8), **kwargs})


@register(
    _card("L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", 739_570_472, 489.1, 88.1),
    tag="in21k_ft_in1k",
    **_cfg(512, 0.93, crop_mode="squash"),
)
def mambavision_l3_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 in windows of 32 and 16, pretrained on ImageNet-21k: 88.1 % top-1 at 512 (official README)."""
    return _build("mambavision_l3_512_21k", pretrained, **{**_L3, "windows": (32, 16), **kwargs})


# The same for modules. Not as decorators, which would hide their types.
for _leaf in (MambaVisionMixer, TokenConv):
    register_notrace_module(_leaf)

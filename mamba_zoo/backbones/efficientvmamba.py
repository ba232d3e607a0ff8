"""EfficientVMamba: atrous scans beside convolutions, then convolutions alone. Pei et al. 2024, arXiv:2403.09977.

Written from the paper and from a description of what the published models compute
(TerryPei/EfficientVMamba@0bc5ee288b40); none of their code was copied. Channels-last throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from ..scans import ScanLike
from ._base import Pyramid, Stage
from ._block import LayerNorm
from ._depthwise import DepthwiseConv
from ._embed import MapBatchNorm, MapConv, PatchMerge, PatchStem
from ._gate import ChannelGate
from ._init import init_linear_
from ._keys import Key, rename
from ._mixer import SS2D
from ._register import Card, build_model, image_cfg, register
from ._ssm import resolve_scan
from .vmamba import KEYS as VMAMBA_KEYS
from .vmamba import STEM_KEYS


class EfficientBlock(nn.Module):
    """A selective scan and a convolution side by side, both weighed by one channel gate, beside the identity.

    Args:
        dim: Width.
        mixer: Takes and returns a map.
        drop_path: Rate at which a sample skips both branches in training.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.local = nn.Sequential(
            DepthwiseConv(dim, **dd),
            MapBatchNorm(dim, **dd),
            nn.GELU(),
            MapConv(dim, dim, 1, **dd),
        )
        self.gate = ChannelGate(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        normed = self.norm(x, narrow=True)
        far, near = self.mixer(normed), self.local(normed)
        return x + self.drop_path(far * self.gate(far, (1, 2)) + near * self.gate(near, (1, 2)))


class MapInvertedResidual(InvertedResidual):
    """timm's inverted residual with squeeze and excitation, of channels-last maps."""

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientVMamba(Pyramid):
    """EfficientVMamba: stages of scans beside convolutions, then stages of inverted residuals.

    The published constructor takes the number of states, the rank and the ratio of the mixer, and uses none of them;
    the defaults here are what its models really are.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        depths: Blocks per stage.
        dims: Width of each stage, or of the first one, doubled from stage to stage.
        scan_stages: How many stages have scans; those that follow are convolutional.
        d_state: States n.
        ssm_ratio: Inner width of the mixer in units of its stage's width.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of the stage's width, rounded up.
        conv_ratio: Inner width of the inverted residuals in units of their stage's width.
        patch_size: Pixels per side of a position of the first stage.
        scan: Visiting orders: a name, a specification, a `Scan` or a function; see `mamba_zoo.scans`. The default
            shares the positions out among four directions. "none" leaves the scan and its parameters out of every
            block, as a control.
        out_norm: Norm the output of every stage for `features_only`, as the published detection backbones do.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, or numbers of depths and dims that differ.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 48,
        scan_stages: int = 2,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        conv_ratio: float = 4.0,
        patch_size: int = 4,
        scan: ScanLike = "atrous",
        out_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"depths={tuple(depths)} and dims={tuple(dims)} must give as many stages")
        spec, k = resolve_scan(scan)
        mixer = partial(SS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, scan=spec, k=k, gate=True,
                        conv_bias=True, **dd)  # fmt: skip

        def block(stage: int, rate: float) -> nn.Module:
            dim = dims[stage]
            if stage < scan_stages:
                return EfficientBlock(dim, mixer(dim), rate, **dd)
            squeeze: Any = partial(SqueezeExcite, rd_channels=dim // 2)
            return MapInvertedResidual(dim, dim, exp_ratio=conv_ratio, se_layer=squeeze, drop_path_rate=rate, **dd)

        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        super().__init__(
            PatchStem(in_chans, dims[0], patch_size, **dd),
            [
                Stage(PatchMerge(dims[i - 1], dims[i], **dd) if i else None, [block(i, rate) for rate in rates[i]])
                for i in range(len(dims))
            ],
            dims,
            [patch_size * 2**i for i in range(len(dims))],
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            out_norm,
            smallest=patch_size,
            **dd,
        )
        self.scan = spec
        self.apply(init_linear_)


_CONV = r"^layers\.(\d+)\.(\d+)\."
_BLOCK = r"^(stages\.\d+\.blocks\.\d+\.)"
KEYS = [
    # A convolutional stage is one flat list: a permutation, the blocks, a permutation, the downsampling.
    *(
        Key(rf"{_CONV}{old}\.", lambda m, new=new: f"stages.{m[1]}.blocks.{int(m[2]) - 1}.{new}.")
        for old, new in (
            (r"conv_pw\.0", "conv_pw"),
            (r"conv_pw\.1", "bn1"),
            (r"conv_dw\.0", "conv_dw"),
            (r"conv_dw\.1", "bn2"),
            (r"conv_pw2\.0", "conv_pwl"),
            (r"conv_pw2\.1", "bn3"),
            ("se", "se"),
        )
    ),
    Key(rf"{_CONV}(reduction|norm)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.{m[3]}."),
    *VMAMBA_KEYS,
    *STEM_KEYS[PatchStem],
    Key(rf"{_BLOCK}norm1\.", r"\1norm."),
    Key(rf"{_BLOCK}conv_branch\.", r"\1local."),
    Key(rf"{_BLOCK}se\.norm\.", r"\1gate.norm."),
    Key(rf"{_BLOCK}se\.global_reduce\.", r"\1gate.reduce."),
    Key(rf"{_BLOCK}se\.channel_select\.", r"\1gate.select."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict, of classifiers or of detection backbones, in our names."""
    return rename(state_dict, KEYS)


_CFG = image_cfg("stem.proj", "head.fc", pool_size=(7, 7))
_LICENCE = "Licence: the README says Apache-2.0, but the repository holds no licence file."
_card = partial(
    Card,
    "image",
    "TerryPei/EfficientVMamba@0bc5ee288b40 classification/models/vmamba_efficient.py",
    "Apache-2.0",
    "2403.09977",
    convention="no scan",
)


def _weights(size: str) -> str:
    return f"{_LICENCE} Weights: huggingface.co/TerryPei/EfficientVMamba-{size}; load the file with checkpoint_path."


def _build(name: str, pretrained: bool, **kwargs: Any) -> EfficientVMamba:
    return build_model(EfficientVMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


@register(_card(6_493_660, 0.8, 76.5, notes=_weights("Tiny")), tag="in1k", **_CFG)
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6 M parameters, 76.5 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("efficient_vmamba_tiny", pretrained, **{"dims": 48, **kwargs})


@register(_card(11_273_688, 1.3, 78.7, 0.1, notes=_weights("Small")), tag="in1k", **_CFG)
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11 M parameters, 78.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("efficient_vmamba_small", pretrained, **{"dims": 64, **kwargs})


@register(
    _card(24_757_456, notes=f"{_LICENCE} No weights are known: those of EfficientVMamba-S are narrower."),
    tag="in1k",
    **_CFG,
)
def efficient_vmamba_small_yaml96(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """What the published configuration of EfficientVMamba-S literally says: 25 M parameters, not the model trained."""
    return _build("efficient_vmamba_small_yaml96", pretrained, **{"dims": 96, **kwargs})


@register(_card(33_717_136, 4.0, 81.8, notes=_weights("Base")), tag="in1k", **_CFG)
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 33 M parameters, 81.8 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("efficient_vmamba_base", pretrained, **{"depths": (2, 2, 9, 2), "dims": 96, **kwargs})

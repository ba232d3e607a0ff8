"""VMamba: pyramids of 2-D selective-scan blocks. Liu et al. 2024, arXiv:2401.10166.

Follows the arithmetic of MzeroMiko/VMamba@2ed52ead062a classification/models/vmamba.py (MIT), channels-last throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers.drop import calculate_drop_path_rates
from torch import Tensor, nn

from ..scans import Scan
from ._base import Pyramid, Stage
from ._embed import ConvDownsample, ConvStem, PatchMerge, PatchStem
from ._init import init_linear_
from ._keys import Key, rename
from ._map_block import MapBlock
from ._mixer import SS2D
from ._register import Card, build_model, image_cfg, register
from ._ssm import resolve_scan

STEMS = {"conv": ConvStem, "patch": PatchStem}
DOWNSAMPLES = {"conv": ConvDownsample, "merge": PatchMerge}


class VMamba(Pyramid):
    """VMamba, second version by default ("v05_noz" of the published code); see `vmamba_tiny_v0` for the first.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: As for timm's `ClassifierHead`; "" does not pool.
        depths: Blocks per stage.
        dims: Width of each stage, or of the first one, doubled from stage to stage.
        d_state: States n.
        ssm_ratio: Inner width of the mixer in units of its stage's width.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of the stage's width, rounded up.
        mlp_ratio: Hidden width of the MLP in units of its stage's width; 0 is no MLP.
        gate: Whether the mixer multiplies its output by SiLU of a second projection.
        conv_bias: Whether the depthwise convolution has a bias.
        stem: "conv", two convolutions, or "patch", one linear map per patch.
        downsample: "conv" or "merge" (as in Swin).
        patch_size: Pixels per side of a position of the first stage.
        scan: Visiting orders: a name, a specification, a `Scan` or a function; see `mamba_zoo.scans`. "none" leaves
            the scan and its parameters out of every block, as a control.
        out_norm: Norm the output of every stage for `features_only`, as the published detection backbones do.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown stem, downsampling or scan, or numbers of depths and dims that differ.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | str = "auto",
        mlp_ratio: float = 4.0,
        gate: bool = False,
        conv_bias: bool = False,
        stem: str = "conv",
        downsample: str = "conv",
        patch_size: int = 4,
        scan: str | Scan | Callable[..., Any] = "cross",
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
        stem_cls, downsample_cls = _choose("stem", stem, STEMS), _choose("downsample", downsample, DOWNSAMPLES)
        spec, k = resolve_scan(scan)
        mixer = partial(SS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, scan=spec, k=k, gate=gate,
                        conv_bias=conv_bias, **dd)  # fmt: skip
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                downsample_cls(dims[i - 1], dim, **dd) if i else None,
                [MapBlock(dim, mixer, mlp_ratio, rate, **dd) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            stem_cls(in_chans, dims[0], patch_size, **dd),
            stages,
            dims,
            [patch_size * 2**i for i in range(len(dims))],
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            out_norm,
            smallest=patch_size if stem == "patch" else 1,
            **dd,
        )
        self.scan = spec
        self.apply(init_linear_)


def _choose(argument: str, value: str, known: dict[str, type]) -> type:
    if value not in known:
        raise ValueError(f"{argument}={value!r} is unknown; choose one of {', '.join(known)}")
    return known[value]


def _flat(weight: Tensor) -> Tensor:
    """A linear layer's weight that was stored as a 1x1 convolution."""
    return weight.flatten(1)


KEYS = [
    # Names before the published code's own renaming, as in the files of its first release.
    Key(r"^patch_embed\.proj\.", "patch_embed.0."),
    Key(r"^patch_embed\.norm\.", "patch_embed.2."),
    Key(r"^(layers\.\d+\.blocks\.\d+\.)ln_1\.", r"\1norm."),
    Key(r"^(layers\.\d+\.blocks\.\d+\.)self_attention\.", r"\1op."),
    Key(r"^head\.(weight|bias)$", r"classifier.head.\1"),
    # The published names of today.
    Key(r"^classifier\.norm\.", "norm."),
    Key(r"^classifier\.head\.", "head.fc."),
    Key(r"^outnorm(\d+)\.", r"out_norms.\1."),
    Key(r"^layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    Key(r"^layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    Key(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    Key(r"^layers\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm1."),
    Key(r"^layers\.(\d+)\.blocks\.(\d+)\.op\.", r"stages.\1.blocks.\2.mixer."),
    Key(r"^layers\.", "stages."),
    Key(r"\.mixer\.conv2d\.", ".mixer.conv."),
    Key(r"\.mixer\.x_proj_weight$", ".mixer.ssm.x_proj.weight"),
    Key(r"\.mixer\.dt_projs_weight$", ".mixer.ssm.dt_proj.weight"),
    Key(r"\.mixer\.dt_projs_bias$", ".mixer.ssm.dt_bias"),
    Key(r"\.mixer\.A_logs$", ".mixer.ssm.A_log", convert=lambda A: A.unflatten(0, (4, -1))),
    Key(r"\.mixer\.Ds$", ".mixer.ssm.D", convert=lambda D: D.unflatten(0, (4, -1))),
    Key(r"(\.in_proj|\.out_proj|\.mlp\.fc1|\.mlp\.fc2)\.weight$", r"\1.weight", convert=_flat),
]
STEM_KEYS = {
    ConvStem: [
        Key(r"^patch_embed\.0\.", "stem.conv1."),
        Key(r"^patch_embed\.2\.", "stem.norm1."),
        Key(r"^patch_embed\.5\.", "stem.conv2."),
        Key(r"^patch_embed\.7\.", "stem.norm2."),
    ],
    PatchStem: [Key(r"^patch_embed\.0\.", "stem.proj."), Key(r"^patch_embed\.2\.", "stem.norm.")],
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict, of classifiers or of detection backbones, in our names."""
    state_dict = state_dict.get("model", state_dict)
    stem = type(model.get_submodule("stem"))
    return rename(state_dict, [*KEYS, *STEM_KEYS[stem]])


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"
_V2 = image_cfg("stem.conv1", "head.fc", pool_size=(7, 7))
_V0 = image_cfg("stem.proj", "head.fc", pool_size=(7, 7))
_card = partial(
    Card,
    "image",
    "MzeroMiko/VMamba@2ed52ead062a classification/models/vmamba.py",
    "MIT",
    "2401.10166",
    convention="whole scan",
)


def _second(file: str, params: int, gflops: float, top1: float, drop_path: float) -> Card:
    return _card(params, gflops, top1, drop_path, checkpoint=file, url=f"{_RELEASES}/%23v2cls/{file}")


def _first(file: str, params: int, gflops: float, top1: float, drop_path: float) -> Card:
    return _card(params, gflops, top1, drop_path, checkpoint=file, url=f"{_RELEASES}/%23v0cls/{file}")


def _build(name: str, pretrained: bool, taps: tuple[int, ...] = (0, 1, 2, 3), /, **kwargs: Any) -> VMamba:
    return build_model(VMamba, name, pretrained, checkpoint_filter_fn, taps, **kwargs)


_V0_ARGS = {
    "d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0, "gate": True, "conv_bias": True, "stem": "patch",
    "downsample": "merge",
}  # fmt: skip


@register(_second("vssm1_tiny_0230s_ckpt_epoch_264.pth", 30_249_064, 4.9, 82.6, 0.2), tag="in1k", **_V2)
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8]: 30 M parameters, 82.6 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_tiny", pretrained, **{"depths": (2, 2, 8, 2), "dims": 96, **kwargs})


@register(_second("vssm_tiny_0230_ckpt_epoch_262.pth", 30_705_832, 4.9, 82.5, 0.2), tag="in1k", **_V2)
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]: 31 M parameters, 82.5 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_tiny_s2l5", pretrained, **{"depths": (2, 2, 5, 2), "dims": 96, "ssm_ratio": 2.0, **kwargs})


@register(_second("vssm1_small_0229s_ckpt_epoch_240.pth", 49_012_840, 8.6, 83.3, 0.3), tag="in1k", **_V2)
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20]: 49 M parameters, 83.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_small", pretrained, **{"depths": (2, 2, 20, 2), "dims": 96, **kwargs})


@register(_second("vssm_small_0229_ckpt_epoch_222.pth", 50_147_752, 8.7, 83.6, 0.3), tag="in1k", **_V2)
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15]: 50 M parameters, 83.6 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_small_s2l15", pretrained, **{"depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0, **kwargs})


@register(_second("vssm1_base_0229s_ckpt_epoch_225.pth", 86_614_504, 15.2, 83.8, 0.5), tag="in1k", **_V2)
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20]: 87 M parameters, 83.8 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_base", pretrained, **{"depths": (2, 2, 20, 2), "dims": 128, **kwargs})


@register(_second("vssm_base_0229_ckpt_epoch_237.pth", 88_557_800, 15.4, 83.9, 0.6), tag="in1k", **_V2)
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15]: 89 M parameters, 83.9 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_base_s2l15", pretrained, **{"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0, **kwargs})


@register(_first("vssmtiny_dp01_ckpt_epoch_292.pth", 22_893_448, 5.6, 82.2, 0.2), tag="in1k", **_V0)
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, first version: 23 M parameters, 82.2 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_tiny_v0", pretrained, **{**_V0_ARGS, "depths": (2, 2, 9, 2), "dims": 96, **kwargs})


@register(_first("vssmsmall_dp03_ckpt_epoch_238.pth", 44_417_416, 11.2, 83.5, 0.3), tag="in1k", **_V0)
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, first version: 44 M parameters, 83.5 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_small_v0", pretrained, **{**_V0_ARGS, "depths": (2, 2, 27, 2), "dims": 96, **kwargs})


@register(_first("vssmbase_dp06_ckpt_epoch_241.pth", 76_254_056, 18.0, 83.7, 0.5), tag="in1k", **_V0)
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, first version: 76 M parameters, 83.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vmamba_base_v0", pretrained, **{**_V0_ARGS, "depths": (2, 2, 27, 2), "dims": 128, **kwargs})


@register(
    Card(
        "image",
        "mamba_zoo",
        "Apache-2.0",
        "2401.10166",
        523_752,
        drop_path=0.1,
        notes="Not published: for small images.",
    ),
    **image_cfg("stem.conv1", "head.fc", size=32, pool_size=(8, 8), crop_pct=1.0),
)
def vmamba_mini(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A small VMamba of our own for images of 8 to 32 pixels: a token a pixel, three stages, 0.4 M parameters."""
    args = {"depths": (2, 2, 2), "dims": 32, "mlp_ratio": 2.0, "patch_size": 1, **kwargs}
    return _build("vmamba_mini", pretrained, (0, 1, 2), **args)


@register(
    Card(
        "image",
        "mamba_zoo",
        "Apache-2.0",
        "2401.10166",
        2_843_368,
        drop_path=0.1,
        notes="Not published: for small images.",
    ),
    **image_cfg("stem.conv1", "head.fc", size=32, pool_size=(8, 8), crop_pct=1.0),
)
def vmamba_midi(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """`vmamba_mini` at twice the width and more blocks, for training on tens of thousands of small images."""
    args = {"depths": (2, 4, 2), "dims": 64, "patch_size": 1, **kwargs}
    return _build("vmamba_midi", pretrained, (0, 1, 2), **args)

"""Vim: bidirectional Mamba over patch tokens, the class token in their middle. Zhu et al. 2024, arXiv:2401.09417.

Follows the arithmetic of hustvl/Vim@dd0358ad1e42 vim/models_mamba.py (Apache-2.0).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn

from ..scans import ScanLike, as_spec, scan_order
from ._base import Tokens
from ._block import AddNormBlock, RMSNorm
from ._embed import PatchEmbed, check_image, insert_token, resample_positions
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, image_cfg, register
from ._ssm import resolve_scan

# torch.fx takes these whole: they look at shapes.
for _function in ("check_image", "resample_positions", "token_order"):
    torch.fx.wrap(_function)


class Vim(Tokens):
    """Vim with its "bimamba v2" mixers: a convolution and a state-space layer per direction, and their mean.

    The class token stands at index `M // 2` of the `M` patches. Images of any size are taken: the position embedding is
    resampled from the grid of `img_size`, the class token's entry apart. The residual stream is float32.

    Args:
        img_size: Pixels per side, or `(height, width)`, that the position embedding is made for.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "token" reads the class token, "avg" the mean of the patches; "" does not pool. None is "token", or
            "avg" for `scan="none"`, where the class token sees only the patches near it.
        patch_size: Pixels per side of a patch.
        stride: Pixels between patches; None is `patch_size`.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Visiting orders of the patches: a name, a specification, a `Scan` or a function; see `mamba_zoo.scans`.
            Directions that reverse each other visit the class token halfway, a direction without such a partner last,
            so that every patch reaches it. "none" keeps the two convolutions of "bidirectional", but leaves the scan
            and its parameters out of every block, as a control.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan or pooling, or an `img_size` smaller than a patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        patch_size: int = 16,
        stride: int | None = None,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        scan: ScanLike = "bidirectional",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        ssm = scan != "none"
        spec, k = resolve_scan(scan if ssm else "bidirectional")
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        mixer = partial(Mamba, dim, d_state, d_conv, expand, dt_rank, k, "mean", ssm=ssm, **dd)
        super().__init__(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            [AddNormBlock(dim, mixer(), rate, **dd) for rate in [0.0, *rates[:-1]]],
            RMSNorm(dim, **dd),
            dim,
            stride or patch_size,
            in_chans,
            num_classes,
            global_pool if global_pool is not None else "token" if ssm else "avg",
            drop_rate,
            drop_path=rates[-1],
            **dd,
        )
        self.scan = spec if ssm else "none"
        self.token_scan = as_spec(f"with_token({spec}, 'middle', 'last')")
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride or patch_size, **dd)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < patch_size:
            raise ValueError(f"img_size={img_size} is smaller than a patch, patch_size={patch_size}")
        self.grid = self.patch_embed.grid(height, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid) + 1, dim, **dd))
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        """As the published code starts, its slip included: the reversed directions begin with a step bias of zero."""
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
        for layer in (self.patch_embed.proj, self.head):
            if isinstance(bias := getattr(layer, "bias", None), Tensor):
                nn.init.zeros_(bias)
        for module in self.modules():
            if isinstance(module, Mamba):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(depth)
                    if module.ssm is not None and len(module.ssm.dt_bias) > 1:
                        module.ssm.dt_bias[len(module.ssm.dt_bias) // 2 :] = 0

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Images `(b, c, h, w)` to tokens `(b, M + 1, d)`, the order `(k, M + 1)` to visit them in, and the grid."""
        check_image(x, self.in_chans, self.patch_embed.patch_size)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        x = insert_token(x, self.cls_token, x.shape[1] // 2)
        x = x + resample_positions(self.pos_embed, self.grid, grid)
        return x, token_order(self.token_scan, grid, x), grid

    def class_index(self, tokens: int) -> int:
        """Where the class token stands among `tokens`, itself included."""
        return (tokens - 1) // 2


def token_order(spec: str, grid: tuple[int, ...], x: Tensor) -> Tensor:
    """`scan_order` on the device of `x`."""
    return scan_order(spec, grid, x.device)


def _taps(weight: Tensor) -> Tensor:
    """Depthwise taps `(d, w)` from the weight of a grouped convolution, `(d, 1, w)`."""
    return weight.squeeze(1)


_MIXER = r"^(blocks\.\d+\.mixer\.)"
KEYS = [
    Key(r"^layers\.", "blocks."),
    Key(r"^norm_f\.", "norm."),
    *(
        key
        for slot, b, log in ((0, "", "A_log"), (1, "_b", "A_b_log"))
        for key in (
            Key(rf"{_MIXER}{log}$", r"\1ssm.A_log", slot),
            Key(rf"{_MIXER}D{b}$", r"\1ssm.D", slot),
            Key(rf"{_MIXER}conv1d{b}\.weight$", r"\1conv.weight", slot, _taps),
            Key(rf"{_MIXER}conv1d{b}\.bias$", r"\1conv.bias", slot),
            Key(rf"{_MIXER}x_proj{b}\.weight$", r"\1ssm.x_proj.weight", slot),
            Key(rf"{_MIXER}dt_proj{b}\.weight$", r"\1ssm.dt_proj.weight", slot),
            Key(rf"{_MIXER}dt_proj{b}\.bias$", r"\1ssm.dt_bias", slot),
        )
    ),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, its position embedding resampled if the model's patch grid is another."""
    state = rename(state_dict.get("model", state_dict), KEYS)
    positions = state.get("pos_embed")
    if positions is not None and isinstance(model, Vim) and positions.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1] - 1)
        if side * side + 1 == positions.shape[1]:
            state["pos_embed"] = resample_positions(positions, (side, side), model.grid)
    return state


_CFG = image_cfg("patch_embed.proj", "head")


def _vim(size: str, file: str, params: int, top1: float, drop_path: float | None) -> Card:
    return Card(
        "image",
        "hustvl/Vim@dd0358ad1e42 vim/models_mamba.py",
        "Apache-2.0",
        "2401.09417",
        params,
        top1=top1,
        drop_path=drop_path,
        checkpoint=file,
        url=f"https://huggingface.co/hustvl/Vim-{size}-midclstok/resolve/main/{file}",
    )


def _build(name: str, pretrained: bool, **kwargs: Any) -> Vim:
    return build_model(Vim, name, pretrained, checkpoint_filter_fn, (-4, -3, -2, -1), **kwargs)


@register(_vim("tiny", "vim_t_midclstok_76p1acc.pth", 7_148_008, 76.1, 0.0), tag="in1k", **_CFG)
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7 M parameters, 76.1 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vim_tiny", pretrained, **{"dim": 192, **kwargs})


@register(_vim("small", "vim_s_midclstok_80p5acc.pth", 25_796_584, 80.5, 0.05), tag="in1k", **_CFG)
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 26 M parameters, 80.5 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vim_small", pretrained, **{"dim": 384, **kwargs})


@register(_vim("base", "vim_b_midclstok_81p9acc.pth", 97_598_440, 81.9, None), tag="in1k", **_CFG)
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 98 M parameters, 81.9 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vim_base", pretrained, **{"dim": 768, **kwargs})


@register(_vim("tiny", "vim_t_midclstok_ft_78p3acc.pth", 7_250_344, 78.3, None), tag="in1k", **_CFG)
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, overlapping patches: 7 M parameters, 78.3 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vim_tiny_stride8", pretrained, **{"dim": 192, "stride": 8, **kwargs})


@register(_vim("small", "vim_s_midclstok_ft_81p6acc.pth", 26_001_256, 81.6, None), tag="in1k", **_CFG)
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, overlapping patches: 26 M parameters, 81.6 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("vim_small_stride8", pretrained, **{"dim": 384, "stride": 8, **kwargs})


@register(
    Card(
        "image",
        "mamba_zoo",
        "Apache-2.0",
        "2401.09417",
        359_400,
        drop_path=0.1,
        notes="Not published: for small images.",
    ),
    **image_cfg("patch_embed.proj", "head", size=32, crop_pct=1.0),
)
def vim_mini(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A small Vim of our own for images of 8 to 64 pixels: patches of 2, eight blocks, 0.3 M parameters."""
    args = {"img_size": 32, "patch_size": 2, "dim": 64, "depth": 8, "d_state": 8, **kwargs}
    return _build("vim_mini", pretrained, **args)

"""Vim: bidirectional Mamba over patch tokens, the class token in their middle. Zhu et al. 2024, arXiv:2401.09417.

Follows the arithmetic of hustvl/Vim@dd0358ad1e42 vim/models_mamba.py (Apache-2.0).
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, lecun_normal_, register_notrace_function, trunc_normal_
from torch import Tensor, nn

from ..scans import ScanLike, as_spec, scan_order
from ._base import Tokens
from ._block import AddNormBlock, RMSNorm
from ._embed import PatchEmbed, check_image, insert_token, resample_positions
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, image_cfg
from ._ssm import resolve_scan


class Vim(Tokens):
    """Vim with "bimamba v2" mixers: each direction has its own convolution and state-space layer, and they are averaged.

    The class token stands at index `M // 2` of the `M` patches. Images of any size are taken: the position embedding is
    resampled from the grid of `img_size`, the class token's entry apart. The residual stream is float32.

    Args:
        img_size: Pixels per side, or `(height, width)`, that the position embedding is made for.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "token" reads the class token, "avg" the mean of the patches; "" does not pool.
        patch_size: Pixels per side of a patch.
        stride: Pixels between patches; None is `patch_size`.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Visiting orders of the patches: a name, a specification, a `Scan` or a function; see `mamba_zoo.scans`.
            Each direction visits the class token halfway. "none" keeps the two convolutions of "bidirectional", but
            leaves the scan and its parameters out of every block, as a control.
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
        global_pool: str = "token",
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
        dd = {"device": device, "dtype": dtype}
        ssm = scan != "none"
        spec, k = resolve_scan(scan if ssm else "bidirectional")
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        mixer = partial(Mamba, dim, d_state, d_conv, expand, dt_rank, k, "mean", ssm=ssm, **dd)
        super().__init__(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            [AddNormBlock(dim, mixer(), rate, **dd) for rate in [0.0, *rates[:-1]]],
            RMSNorm(dim, **dd),
            dim,
            stride or patch_size,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            drop_path=rates[-1],
            **dd,
        )
        self.scan = spec if ssm else "none"
        self.token_scan = as_spec(f"with_token({spec}, 'middle')")
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
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
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


@register_notrace_function
def token_order(spec: str, grid: tuple[int, int], x: Tensor) -> Tensor:
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
    """A published state dict in our names, its position embedding resampled, with a warning, if the grid is another."""
    state = rename(state_dict.get("model", state_dict), KEYS)
    positions = state.get("pos_embed")
    if positions is not None and isinstance(model, Vim) and positions.shape != model.pos_embed.shape:
        side = math.isqrt(positions.shape[1] - 1)
        if side * side + 1 == positions.shape[1]:
            warnings.warn(
                f"position embedding of the checkpoint resampled from {side} x {side} patches to "
                f"{model.grid[0]} x {model.grid[1]}, those of img_size and stride",
                stacklevel=2,
            )
            state["pos_embed"] = resample_positions(positions, (side, side), model.grid)
    return state


_card = partial(Card, "image", "hustvl/Vim@dd0358ad1e42 vim/models_mamba.py", "Apache-2.0", "2401.09417")
_CFG = image_cfg("patch_embed.proj", "head")

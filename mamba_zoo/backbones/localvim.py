"""LocalVim: Mamba over patch tokens in four directions chosen for every block. Huang et al. 2024, arXiv:2403.09338.

Follows the arithmetic of hunto/LocalMamba@75e5d1f007c3 classification/lib/models/local_vim.py (Apache-2.0), but for one
slip: there, loading weights on the CPU gives all directions of a block the decay rates of its last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.pos_embed_sincos import apply_rot_embed_cat, build_rotary_pos_embed
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..scans import ScanLike
from ._base import Tokens
from ._block import AddNormBlock, LayerNorm, RMSNorm, add_residual
from ._embed import PatchEmbed, check_image, insert_token, resample_grid, resample_positions
from ._keys import Key, rename
from ._local import COLUMNS_NOTE, DEFAULT, LocalVimMixer, block_scans
from ._register import Card, build_model, image_cfg, register

# torch.fx takes these whole: they look at shapes and dtypes.
for _function in ("add_residual", "check_image", "resample_grid", "resample_positions", "rotation"):
    torch.fx.wrap(_function)

# Rotary positions run from 0 to this along both sides, whatever the image.
_SIDE = 14


class Place(NamedTuple):
    """Where the tokens are: the grid `(h, w)` of the patches, and their `rotation`, if any."""

    grid: tuple[int, int]
    rotation: Tensor | None


class LocalVimBlock(AddNormBlock):
    """Add, rotate, norm, mix. The published code rotates both parts of the sum, which is the same."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - a place instead of an order
        self, hidden: Tensor, residual: Tensor | None, place: Place
    ) -> tuple[Tensor, Tensor]:
        """`(hidden, residual)`, both `(b, l, dim)`, to the next pair; no residual before the first block."""
        residual = add_residual(self.drop_path(hidden), residual)
        if place.rotation is not None:
            residual = apply_rot_embed_cat(residual, place.rotation)
        return self.mixer(self.norm(residual, narrow=True).to(hidden.dtype), place.grid), residual


class LocalVim(Tokens):
    """LocalVim: Vim's blocks, rotary positions before each of them, and rows, columns and windows to scan in.

    Images of any size are taken: the position embedding and the rotations are resampled from the grid of `img_size`, as
    the published segmentation backbone does. The residual stream is float32.

    Args:
        img_size: Pixels per side, or `(height, width)`, that the position embedding is made for.
        in_chans: Image channels.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "avg", the mean of the patches, or "token", which reads the class token; "" does not pool.
        patch_size: Pixels per side of a patch.
        dim: Width, a multiple of 4 with `rope`.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        directions: Names for the scan "local", one list for all blocks or one list for each.
        scan: Instead of `directions`, one scan for all blocks: a name, a specification, a `Scan` or a function; see
            `mamba_zoo.scans`. "none" keeps the convolutions along `directions`, but leaves the scan and its parameters
            out of every block, as a control.
        published_columns: On grids that are not square, misplace the outputs of "v" and "v_flip" as the published code
            does; see `DirectionMerge`. Square grids are the same either way.
        rope: Whether the stream is rotated by the positions before every block.
        class_token: Whether a class token stands at index `M // 2` of the `M` patches.
        rms_norm: False norms blocks and features by layer norm, as published for detection and segmentation.
        out_norm: Give four evenly spaced blocks, the last among them, a norm of their own. `forward_intermediates` and
            `features_only` then return the normed output of the mixer of such a block, without the stream that it is
            added to, as the published detection and segmentation backbones do.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown direction, scan or pooling, another number of lists of directions than blocks, an
            `img_size` smaller than a patch, `published_columns` with a `scan`, or `rope` with a `dim` or a
            `class_token` that it does not go with.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 20,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        directions: Sequence[str] | Sequence[Sequence[str]] = DEFAULT,
        scan: ScanLike | None = None,
        published_columns: bool = False,
        rope: bool = True,
        class_token: bool = False,
        rms_norm: bool = True,
        out_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if rope and (class_token or dim % 4):
            raise ValueError(f"rope=True goes with neither class_token nor a dim={dim} that 4 does not divide")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < patch_size:
            raise ValueError(f"img_size={img_size} is smaller than a patch, patch_size={patch_size}")
        ssm = not (isinstance(scan, str) and scan == "none")
        scans = block_scans(depth, directions, scan if ssm else None, published_columns)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        norm: Any = RMSNorm if rms_norm else LayerNorm
        mixer = partial(LocalVimMixer, dim, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank,
                        class_token=class_token, ssm=ssm, **dd)  # fmt: skip
        super().__init__(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            [
                LocalVimBlock(dim, mixer(scan=s), rate, norm, **dd)
                for s, rate in zip(scans, [0.0, *rates[:-1]], strict=True)
            ],
            norm(dim, **dd),
            dim,
            patch_size,
            in_chans,
            num_classes,
            _check_pool(global_pool, class_token),
            drop_rate,
            drop_path=rates[-1],
            **dd,
        )
        self.rope = rope
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, patch_size, **dd)
        self.grid = self.patch_embed.grid(height, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid) + class_token, dim, **dd))
        self.out_norms = None
        if out_norm:
            self.out_norms = nn.ModuleDict({str(i): LayerNorm(dim, **dd) for i in taps(depth)})
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
        for layer in (self.patch_embed.proj, self.head):
            if isinstance(bias := getattr(layer, "bias", None), Tensor):
                nn.init.zeros_(bias)
        for module in self.modules():
            if isinstance(module, LocalVimMixer):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(depth)

    def embed(self, x: Tensor) -> tuple[Tensor, Place, tuple[int, int]]:
        """Images `(b, c, h, w)` to tokens `(b, l, d)`, their place, and the patch grid."""
        check_image(x, self.in_chans, self.patch_embed.patch_size)
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is None:
            x = x + resample_grid(self.pos_embed, self.grid, grid)
        else:
            x = insert_token(x, self.cls_token, x.shape[1] // 2) + resample_positions(self.pos_embed, self.grid, grid)
        return x, Place(grid, rotation(x, self.grid, grid) if self.rope else None), grid

    def class_index(self, tokens: int) -> int | None:
        """Where the class token stands among `tokens`, itself included; None if there is none."""
        return None if self.cls_token is None else (tokens - 1) // 2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; None keeps the pooling."""
        if global_pool is not None:
            _check_pool(global_pool, self.cls_token is not None)
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and the norm and head if asked; returns the indices."""
        take, _ = feature_take_indices(len(self.blocks), indices)  # type: ignore[arg-type]
        if self.out_norms is not None:
            self.out_norms = nn.ModuleDict({i: norm for i, norm in self.out_norms.items() if int(i) in take})
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _tap(self, i: int, hidden: Tensor, residual: Tensor, norm: bool) -> Tensor:
        if self.out_norms is not None and str(i) in self.out_norms:
            return self.out_norms[str(i)](hidden)
        return super()._tap(i, hidden, residual, norm)


def taps(depth: int) -> tuple[int, ...]:
    """The blocks, four or fewer and evenly spaced, that `features_only` taps by default: 4, 9, 14 and 19 of 20."""
    return tuple(sorted({max(depth * part // 4 - 1, 0) for part in (1, 2, 3, 4)}))


def rotation(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Sines and cosines `(h * w, 2 d)` for tokens `x` `(b, l, d)`, made for the grid `old` and resampled to `new`.

    The first half of the channels turns with the row, the second with the column, in pairs (arXiv:2104.09864).
    """
    sides: Any = [_SIDE, _SIDE]
    table = torch.cat(
        build_rotary_pos_embed(list(old), dim=x.shape[-1], in_pixels=False, ref_feat_shape=sides, device=x.device),
        dim=-1,
    )
    return resample_grid(table[None], old, new)[0]


def _check_pool(global_pool: str, class_token: bool) -> str:
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True; choose 'avg', or '' for no pooling")
    return global_pool


def _taps_of_conv(weight: Tensor) -> Tensor:
    """Depthwise taps `(d, w)` from the weight of a grouped convolution, `(d, 1, w)`."""
    return weight.squeeze(1)


_MIXER = r"^(blocks\.\d+\.mixer\.)"
KEYS = [
    Key(r"^layers\.", "blocks."),
    Key(r"^norm_f\.", "norm."),
    Key(rf"{_MIXER}attn\.norm\.", r"\1merge.gate.norm."),
    Key(rf"{_MIXER}attn\.global_reduce\.", r"\1merge.gate.reduce."),
    Key(rf"{_MIXER}attn\.channel_select\.", r"\1merge.gate.select."),
    *(
        key
        for slot in range(4)
        for key in (
            Key(rf"{_MIXER}A_log_{slot}$", r"\1ssm.A_log", slot),
            Key(rf"{_MIXER}D_{slot}$", r"\1ssm.D", slot),
            Key(rf"{_MIXER}conv1d_{slot}\.weight$", r"\1conv.weight", slot, _taps_of_conv),
            Key(rf"{_MIXER}conv1d_{slot}\.bias$", r"\1conv.bias", slot),
            Key(rf"{_MIXER}x_proj_{slot}\.weight$", r"\1ssm.x_proj.weight", slot),
            Key(rf"{_MIXER}dt_proj_{slot}\.weight$", r"\1ssm.dt_proj.weight", slot),
            Key(rf"{_MIXER}dt_proj_{slot}\.bias$", r"\1ssm.dt_bias", slot),
        )
    ),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, its position embedding resampled if the model's patch grid is another.

    The tables of sines and cosines in it are left out: they follow from the grid.
    """
    state = rename({key: value for key, value in state_dict.items() if not key.startswith("rope.freqs_")}, KEYS)
    if not isinstance(model, LocalVim):
        return state
    if model.out_norms is not None:
        numbers = dict(enumerate(model.out_norms))
        state = rename(state, [Key(rf"^outnorm_{j}\.", f"out_norms.{i}.") for j, i in numbers.items()])
    positions, token = state.get("pos_embed"), model.cls_token is not None
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1] - token)
        if side * side + token == positions.shape[1]:
            resample = resample_positions if token else resample_grid
            state["pos_embed"] = resample(positions, (side, side), model.grid)
    return state


# What the authors' search found, block by block.
SEARCHED = [
    ("h", "v_flip", "w7", "w7_flip"),
    ("h_flip", "w2_flip", "w7", "w7_flip"),
    ("h", "h_flip", "v", "w7"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h_flip", "v", "v_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w2"),
    ("h", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v_flip", "w7"),
    ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "w2", "w2_flip"),
    ("v", "v_flip", "w2", "w7"),
    ("h", "h_flip", "v", "w2"),
    ("h", "h_flip", "w2_flip", "w7"),
    ("v", "v_flip", "w2", "w2_flip"),
]

_CFG = image_cfg("patch_embed.proj", "head")
_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"
_card = partial(
    Card,
    "image",
    "hunto/LocalMamba@75e5d1f007c3 classification/lib/models/local_vim.py",
    "Apache-2.0",
    "2403.09338",
)
_SMALL_NOTES = (
    "No weights are known: the README's link leads to those of LocalVMamba-S. The published file defines this model "
    "twice, here with {} directions; nothing tells which were trained."
)
_TINY_NOTES = (
    "The published code, loading on a CPU, gives all directions of a block the decay rates of its last one; here each "
    f"keeps its own. {COLUMNS_NOTE}"
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> LocalVim:
    args = {"directions": SEARCHED, **kwargs}
    return build_model(LocalVim, name, pretrained, checkpoint_filter_fn, taps(args.get("depth", 20)), **args)


@register(
    _card(
        7_994_152,
        1.5,
        76.2,
        checkpoint="local_vim_tiny.ckpt",
        url=f"{_RELEASE}/local_vim_tiny.ckpt",
        notes=_TINY_NOTES,
    ),
    tag="in1k",
    **_CFG,
)
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T: 8 M parameters, 76.2 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("local_vim_tiny", pretrained, **{"dim": 192, **kwargs})


@register(
    _card(
        7_994_536,
        1.5,
        77.8,
        checkpoint="local_vim_tiny_middle_cls_token.ckpt",
        url=f"{_RELEASE}/local_vim_tiny_middle_cls_token.ckpt",
        notes=_TINY_NOTES,
    ),
    tag="in1k",
    **_CFG,
)
def local_vim_tiny_middle_cls_token(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token: 8 M parameters, 77.8 % ImageNet-1k top-1 at 224 (official README)."""
    args = {"dim": 192, "class_token": True, "rope": False, "global_pool": "token", **kwargs}
    return _build("local_vim_tiny_middle_cls_token", pretrained, **args)


@register(_card(27_783_784, 4.8, 81.1, notes=_SMALL_NOTES.format("the later definition's")), tag="in1k", **_CFG)
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S, the same directions in all blocks: 28 M parameters, 81.1 % top-1 at 224 (official README)."""
    return _build("local_vim_small", pretrained, **{"dim": 384, "directions": DEFAULT, **kwargs})


@register(_card(27_783_784, 4.8, 81.1, notes=_SMALL_NOTES.format("the earlier definition's")), tag="in1k", **_CFG)
def local_vim_small_searched(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S with LocalVim-T's directions: 28 M parameters, 81.1 % top-1 at 224 (official README)."""
    return _build("local_vim_small_searched", pretrained, **{"dim": 384, **kwargs})

"""VideoMamba: bidirectional Mamba over the patches of images and videos. Li et al. 2024, arXiv:2403.06977.

Follows the arithmetic of OpenGVLab/VideoMamba@f3427e42cb84 videomamba/{image_sm,video_sm}/models/videomamba.py
(Apache-2.0).
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers.drop import calculate_drop_path_rates
from torch import Tensor, nn

from ..scans import ScanLike, as_spec
from ._base import Tokens
from ._block import AddNormBlock, RMSNorm
from ._embed import PatchEmbed, check_image, insert_token, resample_grid
from ._init import init_linear_, trunc_normal_
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, image_cfg, register
from ._ssm import DirectionLinear, SelectiveSSM, resolve_scan
from .vim import KEYS as VIM_KEYS
from .vim import token_order

# torch.fx takes these whole: they look at shapes.
for _function in ("check_frames", "split_positions", "resample_times", "token_order"):
    torch.fx.wrap(_function)


class VideoMamba(Tokens):
    """VideoMamba: Vim's mixers with their two directions summed, and the class token first.

    A video's tokens are the class token, then the patches of one frame after another. Images and videos of any size and
    any number of frames are taken: the position embeddings are resampled from those of `img_size` and `num_frames`. The
    residual stream is float32.

    Args:
        img_size: Pixels per side, or `(height, width)`, that the position embedding is made for.
        num_frames: Frames that the temporal position embedding is made for; inputs are videos `(b, c, t, h, w)`. None
            takes images `(b, c, h, w)` and has no such embedding.
        in_chans: Channels of an image or a frame.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "token" reads the class token, "avg" the mean of the patches; "" does not pool. None is "token", or
            "avg" for `scan="none"`, where the class token sees only the patches near it.
        patch_size: Pixels per side of a patch.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        dt_init: How step biases start. "zero" is published; a state then forgets within two tokens until training finds
            smaller steps, which takes more than small data sets. "spread" is Mamba's own (arXiv:2312.00752): steps
            from 0.001 to 0.1, which remember the frame before from the start.
        scan: Visiting orders of the patches, on a grid `(h, w)` or `(t, h, w)`: a name, a specification, a `Scan` or a
            function; see `mamba_zoo.scans`. Of two directions that reverse each other the first visits the class token
            first and the other last; a direction without such a partner visits it last, or no patch would ever reach
            it. "none" keeps the two convolutions of "bidirectional", but leaves the scan and its parameters out of
            every block, as a control.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, pooling or `dt_init`, an `img_size` smaller than a patch, or no frames.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_init: str = "zero",
        scan: ScanLike = "bidirectional",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < patch_size:
            raise ValueError(f"img_size={img_size} is smaller than a patch, patch_size={patch_size}")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1, or None for images")
        if dt_init not in ("zero", "spread"):
            raise ValueError(f"dt_init={dt_init!r} is unknown; choose 'zero' or 'spread'")
        ssm = scan != "none"
        spec, k = resolve_scan(scan if ssm else "bidirectional", dimensions=2 if num_frames is None else 3)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        mixer = partial(Mamba, dim, d_state, d_conv, expand, dt_rank, k, "sum", ssm=ssm, **dd)
        super().__init__(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            [AddNormBlock(dim, mixer(), rate, **dd) for rate in [0.0, *rates[:-1]]],
            RMSNorm(dim, **dd),
            dim,
            patch_size,
            in_chans,
            num_classes,
            global_pool if global_pool is not None else "token" if ssm else "avg",
            drop_rate,
            drop_path=rates[-1],
            **dd,
        )
        self.num_frames = num_frames
        self.scan = spec if ssm else "none"
        self.token_scan = as_spec(f"with_token({spec}, 0, 'last')")
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, patch_size, **dd)
        self.grid = self.patch_embed.grid(height, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid) + 1, dim, **dd))
        if num_frames is not None:
            self.temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames, dim, **dd))
        self._init_weights(depth, dt_init)

    def _init_weights(self, depth: int, dt_init: str) -> None:
        """As the published code starts, but for step biases that are spread."""
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear_)
        for module in self.modules():
            if isinstance(module, DirectionLinear):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, SelectiveSSM) and dt_init == "zero":
                nn.init.zeros_(module.dt_bias)
            elif isinstance(module, Mamba):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(depth)

    def input_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one input with frames of this size: `(c, h, w)`, or `(c, t, h, w)`."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return (self.in_chans, *frames, height, width)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            **super().group_matcher(coarse),
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embed|^patch_embed",
        }

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Images or videos to tokens `(b, M + 1, d)`, the order `(k, M + 1)` to visit them in, and the patch grid."""
        check_frames(x, self.in_chans, self.patch_embed.patch_size, self.num_frames is not None)
        frames = x.shape[2]
        if self.num_frames is not None:
            x = x.transpose(1, 2).flatten(0, 1)
        x = self.patch_embed(x)
        grid: tuple[int, ...] = (x.shape[1], x.shape[2])
        token, places = split_positions(self.pos_embed, self.grid, grid)
        x = x.flatten(1, 2) + places
        if self.num_frames is not None:
            times = resample_times(self.temporal_pos_embed, frames)
            x = (x.unflatten(0, (-1, frames)) + times[:, :, None]).flatten(1, 2)
            grid = (frames, *grid)
        x = insert_token(x, self.cls_token + token, 0)
        return x, token_order(self.token_scan, grid, x), grid

    def class_index(self, tokens: int) -> int:
        """The class token is the first."""
        return 0


def check_frames(x: Tensor, in_chans: int, smallest: int, video: bool) -> None:
    """Raise ValueError unless `x` is a batch of images, or of videos `(b, in_chans, t, h, w)`, of a patch or more."""
    if not video:
        return check_image(x, in_chans, smallest)
    if x.dim() != 5 or x.shape[1] != in_chans or x.shape[2] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected videos (b, {in_chans}, t, h, w); see in_chans, and "
            f"num_frames=None for images"
        )
    return check_image(x[:, :, 0], in_chans, smallest)


def split_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Entries of the class token `(1, 1, d)` and of the patches `(1, h * w, d)` of a position embedding, for `new`."""
    return positions[:, :1], resample_grid(positions[:, 1:], old, new)


def resample_times(positions: Tensor, frames: int) -> Tensor:
    """A temporal position embedding `(1, t, d)` for another number of frames, by linear interpolation."""
    if positions.shape[1] == frames:
        return positions
    return F.interpolate(positions.float().transpose(1, 2), frames, mode="linear").transpose(1, 2).to(positions.dtype)


KEYS = [
    Key(r"^(backbone|encoder)\.", ""),
    Key(r"^temporal_pos_embedding$", "temporal_pos_embed"),
    # The patches of a video are one frame deep.
    Key(
        r"^patch_embed\.proj\.weight$", "patch_embed.proj.weight", convert=lambda w: w.squeeze(2) if w.ndim == 5 else w
    ),
    *VIM_KEYS,
]
# Heads of distilled students and of masked pretraining: no part of the model.
_TRAINING = ("distill_head.", "clip_decoder.", "clip_pos_embed")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, its position embeddings resampled if the model's are of other sizes.

    A classifier of the 710 classes of K710 gives its first 400 to a model of 400 classes (Kinetics-400), as published.
    """
    state = rename(state_dict.get("model", state_dict), KEYS)
    state = {key: value for key, value in state.items() if not key.startswith(_TRAINING)}
    if not isinstance(model, VideoMamba):
        return state
    positions, times = state.get("pos_embed"), state.get("temporal_pos_embed")
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1] - 1)
        if side * side + 1 == positions.shape[1]:
            state["pos_embed"] = torch.cat(split_positions(positions, (side, side), model.grid), dim=1)
    if times is not None and model.num_frames is not None:
        state["temporal_pos_embed"] = resample_times(times, model.num_frames)
    for name in ("head.weight", "head.bias"):
        if name in state and len(state[name]) == 710 and model.num_classes == 400:
            state[name] = state[name][:400]
    return state


_HUB = "https://huggingface.co/OpenGVLab/VideoMamba/resolve/main"
_CFG = image_cfg("patch_embed.proj", "head")
_VIDEO_CFG = {**_CFG, "num_classes": 400, "crop_pct": 1.0}
_SOURCE = "OpenGVLab/VideoMamba@f3427e42cb84 videomamba/{}/models/videomamba.py"
_CLASSES = {"k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}
_FILES = {
    "k400": ("f16", "f32", "f64", "f64_384"),
    "ssv2": ("f8", "f16", "f16_288"),
    "breakfast": ("f32", "f64"),
    "coin": ("f32", "f64"),
}
# After masked pretraining. Files that the authors list under another model's name, or of which the temporal embedding
# is known to be another's (breakfast, 64 frames), are left out.
_MASKED = {
    "k400": ("f8", "f32", "f64", "f64_384"),
    "ssv2": ("f8", "f16_288"),
    "breakfast": ("f32",),
    "coin": ("f32", "f64"),
}


def _image(letter: str, params: int, gflops: float, top1: float, notes: str = "") -> Card:
    file = f"videomamba_{letter}16_in1k_res224.pth"
    source = _SOURCE.format("image_sm")
    return Card(
        "image",
        source,
        "Apache-2.0",
        "2403.06977",
        params,
        gflops,
        top1,
        checkpoint=file,
        url=f"{_HUB}/{file}",
        notes=notes,
        convention="outside mixers",
    )


def _video(letter: str, params: int, top1: str) -> Card:
    return Card(
        "video",
        _SOURCE.format("video_sm"),
        "Apache-2.0",
        "2403.06977",
        params,
        checkpoint=f"videomamba_{letter}16_k400_f8_res224.pth",
        url=f"{_HUB}/videomamba_{letter}16_k400_f8_res224.pth",
        notes=f"Kinetics-400 top-1 in percent with 8, 16, 32 and 64 frames, 3 crops, 4 clips: {top1}. Other published "
        "weights are tags of this name, such as k400_f16 and ssv2_f8; a tag sets num_frames, img_size and num_classes.",
    )


def _larger(letter: str) -> dict[str, dict[str, Any]]:
    """Weights fine-tuned on larger images."""
    sizes = {448: "res224to448", 576: "res224to448to576"}
    return {
        f"in1k_{size}": {"url": f"{_HUB}/videomamba_{letter}16_in1k_{file}.pth", **_sized(size)}
        for size, file in sizes.items()
    }


def _clips(letter: str, files: dict[str, tuple[str, ...]], mask: str = "") -> dict[str, dict[str, Any]]:
    """Weights for other numbers of frames and other data."""
    tags = {}
    for data, names in files.items():
        for name in names:
            frames, _, size = name.partition("_")
            file = f"videomamba_{letter}16_{data}_{mask}{frames}_res224{f'to{size}' if size else ''}.pth"
            tag = f"{data}_{'mask_' if mask else ''}{name}"
            tags[tag] = {"url": f"{_HUB}/{file}", "num_classes": _CLASSES[data], **_sized(int(size or 224))}
    return tags


def _sized(size: int) -> dict[str, Any]:
    """The size of a tag's images, which sets `img_size` too where it is not the model's own."""
    return {} if size == 224 else {"input_size": (3, size, size), "fixed_input_size": True}


def _build(name: str, pretrained: bool, **kwargs: Any) -> VideoMamba:
    return build_model(VideoMamba, name, pretrained, checkpoint_filter_fn, (-4, -3, -2, -1), **kwargs)


def _build_video(name: str, pretrained: bool, **kwargs: Any) -> VideoMamba:
    tag = kwargs.get("pretrained_cfg")
    frames = re.search(r"_f(\d+)", tag) if isinstance(tag, str) else None
    return _build(name, pretrained, **{"num_frames": int(frames[1]) if frames else 8, **kwargs})


_TINY, _SMALL, _MIDDLE, _BASE = {"dim": 192}, {"dim": 384}, {"dim": 576, "depth": 32}, {"dim": 768}


@register(_image("t", 7_148_008, 1.1, 76.9), tag="in1k", others=_larger("t"), **_CFG)
def videomamba_tiny(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for images: 7 M parameters, 76.9 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("videomamba_tiny", pretrained, **{**_TINY, **kwargs})


@register(_image("s", 25_796_584, 4.3, 81.2), tag="in1k", others=_larger("s"), **_CFG)
def videomamba_small(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for images: 26 M parameters, 81.2 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("videomamba_small", pretrained, **{**_SMALL, **kwargs})


@register(_image("m", 74_217_448, 12.7, 82.8, "Self-distilled."), tag="in1k", others=_larger("m"), **_CFG)
def videomamba_middle(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for images: 74 M parameters, 82.8 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("videomamba_middle", pretrained, **{**_MIDDLE, **kwargs})


@register(_image("b", 97_598_440, 16.9, 82.7, "Self-distilled."), tag="in1k", **_CFG)
def videomamba_base(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-B for images: 98 M parameters, 82.7 % ImageNet-1k top-1 at 224 (official README)."""
    return _build("videomamba_base", pretrained, **{**_BASE, **kwargs})


@register(_video("t", 7_033_744, "76.9, 78.1, 78.8, 79.6"), tag="k400_f8", others=_clips("t", _FILES), **_VIDEO_CFG)
def videomamba_tiny_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for videos: 7 M parameters, 76.9 % Kinetics-400 top-1 with 8 frames (official README)."""
    return _build_video("videomamba_tiny_video", pretrained, **{**_TINY, **kwargs})


@register(_video("s", 25_568_656, "79.3, 80.8, 81.5, 81.8"), tag="k400_f8", others=_clips("s", _FILES), **_VIDEO_CFG)
def videomamba_small_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for videos: 26 M parameters, 79.3 % Kinetics-400 top-1 with 8 frames (official README)."""
    return _build_video("videomamba_small_video", pretrained, **{**_SMALL, **kwargs})


@register(
    _video("m", 73_875_856, "80.6, 81.9, 82.4, 82.8; after masked pretraining 82.0, 83.4, 83.9, 84.3"),
    tag="k400_f8",
    others={**_clips("m", _FILES), **_clips("m", _MASKED, "mask_ft_")},
    **_VIDEO_CFG,
)
def videomamba_middle_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for videos: 74 M parameters, 80.6 % Kinetics-400 top-1 with 8 frames (official README)."""
    return _build_video("videomamba_middle_video", pretrained, **{**_MIDDLE, **kwargs})


@register(
    Card(
        "video",
        "mamba_zoo",
        "Apache-2.0",
        "2403.06977",
        247_824,
        drop_path=0.1,
        notes="Not published: for small clips.",
    ),
    **{**_VIDEO_CFG, "num_classes": 400, "input_size": (3, 32, 32)},
)
def videomamba_mini_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A small VideoMamba of our own for clips of 24 to 64 pixels: patches of 8, six blocks, 0.2 M parameters."""
    args = {"img_size": 32, "patch_size": 8, "dim": 64, "depth": 6, "d_state": 8, "dt_init": "spread", **kwargs}
    return _build_video("videomamba_mini_video", pretrained, **args)

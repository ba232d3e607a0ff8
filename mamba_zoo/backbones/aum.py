"""AuM, Audio Mamba: Vim's blocks over the patches of spectrograms. Erol et al. 2024, arXiv:2406.03344.

Follows the arithmetic of kaistmm/Audio-Mamba-AuM@b0eb85d595c4 src/models/mamba_models.py (BSD-3-Clause).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn

from ..kernels import selective_scan
from ..scans import ScanLike, as_spec, build_scan
from ._block import AddNormBlock, RMSNorm
from ._embed import remove_token
from ._fbank import FRONT_ENDS, FrontEnd
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._spectrogram import Pair, SpectrogramTokens, as_pair, resize_antialiased, resize_patches
from ._ssm import CausalConv1d, SelectiveSSM, resolve_dt_rank, resolve_scan
from .vim import KEYS as VIM_KEYS


class SharedSSM(SelectiveSSM):
    """A selective scan whose directions share everything but their decay rates.

    Args:
        dim: Channels d.
        d_state: States n.
        dt_rank: Rank r of the step projection.
        k: Directions.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, k: int, device=None, dtype=None):
        super().__init__(dim, d_state, dt_rank, device=device, dtype=dtype)
        self.A_log = nn.Parameter(self.A_log.detach().expand(k, -1, -1).clone())

    def called_as_this(self, layer: nn.Module) -> nn.Module:
        """`layer`, its directions summed."""
        return _Summed(layer)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - all of its directions are gated and summed
        self, u: Tensor, z: Tensor, order: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Tokens `(b, l, d)` and their gate to the sum over directions `(b, l, d)`, as `SelectiveSSM` returns it."""
        k = len(self.A_log)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return selective_scan(
            u,
            self.dt_proj(dt).expand(-1, -1, k, -1),
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.expand(-1, -1, k, -1),
            C.expand(-1, -1, k, -1),
            self.D.expand(k, -1),
            z,
            order,
            self.dt_bias.expand(k, -1),
            dt_softplus=True,
            reduce="sum",
            cu_seqlens=cu_seqlens,
            out_dtype=torch.float32 if B.dtype == torch.float16 else None,
        )


class _Summed(nn.Module):
    """Another layer in the place of a `SharedSSM`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor, z: Tensor, order: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.layer(u, z, order, "sum", cu_seqlens)


class SharedMamba(nn.Module):
    """Vim's first mixer ("bimamba v1"): one convolution and one set of projections, then k scans, summed.

    The convolution follows the first direction of the scan, or the raster if that visits only some tokens; each token
    then has one step, B and C for all directions.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        k: Directions.
        ssm: False leaves the scan and its parameters out, so that the convolved tokens are gated.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, d_state: int = 16, d_conv: int = 4, expand: float = 2, dt_rank: int | str = "auto", k: int = 2,
        ssm: bool = True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = CausalConv1d(1, inner, d_conv, **dd)
        self.ssm = SharedSSM(inner, d_state, resolve_dt_rank(dt_rank, dim), k, **dd) if ssm else None
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, order: Tensor, cu_seqlens: Tensor | None, lead: Tensor) -> Tensor:
        """Tokens `(b, l, dim)` to the same shape; `lead` is the first direction of `order`, `(1, m)` or `(b, 1, m)`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(x, lead, cu_seqlens).squeeze(2)
        y = u * F.silu(z) if self.ssm is None else self.ssm(u, z, order, cu_seqlens)
        return self.out_proj(y.to(u.dtype))


class AuM(SpectrogramTokens):
    """Audio Mamba: spectrograms `(b, frames, mel_bins)`, or waveforms, to logits.

    The class token stands at index `M // 2` of the `M` patches. Spectrograms of any number of frames are taken: the
    position embedding is resized from the grid of `frames`. The residual stream is float32. The published scores pass
    the logits through a sigmoid, for AudioSet, VGGSound and Speech Commands.

    Args:
        mel_bins: Bands of the spectrograms.
        frames: Frames that the position embedding is made for.
        in_chans: Channels; with more than one, inputs are `(b, c, frames, mel_bins)`.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "token" reads the class token, "avg" the mean of the patches; "" does not pool.
        patch_size: Bands and frames of a patch, or one number for both.
        stride: Bands and frames between patches; None is `patch_size`.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        shared: True is "Fo-Bi": directions share all but their decay rates and are summed. False is "Bi-Bi": each has
            its own convolution and projections, and they are averaged. "Fo-Fo" is False with `scan="raster"`.
        scan: Visiting orders of the patches on the grid (frequency, time): a name, a specification, a `Scan` or a
            function; see `mamba_zoo.scans`. Directions that reverse each other visit the class token halfway, as does
            "raster", as published; any other direction last. "none" leaves the scan and its parameters out of every
            block, as a control; pool by "avg" then.
        front_end: None takes spectrograms. The name of a data set of the published weights ("audioset", "vggsound",
            "voxceleb", "speechcommands", "epic_sounds"), settings or a `FrontEnd` takes waveforms `(b, samples)`.
        sample_rate: Of waveforms, in Hz, resampled if it is not the front end's; None is the front end's.
        stem: Channels of two convolutions before the patches, with which small data are learnt better; None, as
            published, has none. Patches are then multiples of 4.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, pooling or front end, or spectrograms smaller than a patch.
    """

    def __init__(
        self,
        mel_bins: int = 128,
        frames: int = 1024,
        in_chans: int = 1,
        num_classes: int = 527,
        global_pool: str = "token",
        patch_size: int | Pair = 16,
        stride: int | Pair | None = None,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        shared: bool = True,
        scan: ScanLike = "bidirectional",
        front_end: str | dict[str, Any] | FrontEnd | None = None,
        sample_rate: int | None = None,
        stem: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        ssm = scan != "none"
        spec, k = resolve_scan(scan if ssm else "bidirectional")
        # As published, the class token of Fo-Fo sees only the half of the patches that was read before it.
        tokens = as_spec(f"with_token({spec}, 'middle', '{'there' if spec == 'raster' else 'last'}')")
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        if shared:
            mixer = partial(SharedMamba, dim, d_state, d_conv, expand, dt_rank, k, ssm, **dd)
        else:
            mixer = partial(Mamba, dim, d_state, d_conv, expand, dt_rank, k, "mean", ssm=ssm, **dd)
        super().__init__(
            # A block drops what the one before it put out, so each has the rate of its predecessor.
            [AddNormBlock(dim, mixer(), rate, **dd) for rate in [0.0, *rates[:-1]]],
            RMSNorm(dim, **dd),
            dim,
            mel_bins,
            frames,
            as_pair(patch_size),
            as_pair(stride or patch_size),
            (tokens, _lead(tokens)) if shared else (tokens,),
            front_end,
            sample_rate,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            rates[-1],
            stem,
            **dd,
        )
        self.scan, self.shared = spec if ssm else "none", shared
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        """As Vim starts, which the published code is made from."""
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
        for layer in (self.patch_embed.proj, self.head):
            if isinstance(bias := getattr(layer, "bias", None), Tensor):
                nn.init.zeros_(bias)
        for module in self.modules():
            if isinstance(module, Mamba | SharedMamba):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(depth)

    def class_index(self, tokens: int) -> int:
        """Where the class token stands among `tokens`, itself included."""
        return (tokens - 1) // 2

    def resize_positions(self, positions: Tensor, old: Pair, new: Pair) -> Tensor:
        """A position embedding `(1, 1 + f * t, d)`, its class token first, for another grid."""
        return resize_antialiased(positions, old, new)

    def visits(self, orders: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor | None, ...]:
        """The arguments of the mixers after the tokens."""
        return (orders[0], cu_seqlens, *orders[1:])


def _lead(tokens: str) -> str:
    """The order of the one convolution: the first direction of `tokens`, or the raster if that leaves tokens out."""
    first = build_scan(tokens, 8, 8).order[0]
    return as_spec(f"first({tokens})" if int((first >= 0).sum()) == 8 * 8 + 1 else "with_token(raster, 'middle')")


KEYS = [Key(r"module\.", ""), Key(r"^pos_embed\.pos_embed$", "pos_embed"), *VIM_KEYS]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names; positions and patches resized if the model's are of other sizes.

    Weights of Vim for ImageNet with the class token in the middle are converted as the authors did: the patch
    projection is averaged over the colours, positions are resized, and the classifier starts anew.
    """
    state = state_dict.get("model", state_dict)
    if "pos_embed" in state and state.get("patch_embed.proj.weight", torch.empty(0)).shape[1:2] == (3,):
        state = _from_images(state, model)
    state = rename(state, KEYS)
    if not isinstance(model, AuM):
        return state
    return resized(state, model)


def resized(state: dict[str, Tensor], model: SpectrogramTokens, overlap: bool = True) -> dict[str, Tensor]:
    """`state` with positions and patch projection of the sizes that `model` has.

    The file's grid follows from its number of positions, the model's bands and, with `overlap` and patches of the
    model's size, the model's stride; otherwise its patches lie side by side.
    """
    weight, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if weight is None or positions is None or weight.dim() != 4:
        return state
    size = model.patch_embed.proj.kernel_size
    same = overlap and tuple(weight.shape[2:]) == size
    bands, places = model.grid[0] if same else model.mel_bins // weight.shape[2], positions.shape[1] - 1
    if bands > 0 and places % bands == 0 and (bands, places // bands) != model.grid:
        positions = model.resize_positions(positions, (bands, places // bands), model.grid)
    return {**state, "pos_embed": positions, "patch_embed.proj.weight": resize_patches(weight, (size[0], size[1]))}


def _from_images(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """ImageNet weights of Vim for spectrograms."""
    positions = state["pos_embed"]
    side = math.isqrt(positions.shape[1] - 1)
    if side * side + 1 != positions.shape[1]:
        raise ValueError(
            f"pos_embed holds {positions.shape[1]} positions, not those of a square image and a class token"
        )
    middle = side * side // 2
    prefixed = torch.cat([positions[:, middle : middle + 1], remove_token(positions, middle)], dim=1)
    new = {key: value for key, value in state.items() if not key.startswith("head.")}
    new["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].mean(1, keepdim=True)
    if isinstance(model, AuM):
        prefixed = model.resize_positions(prefixed, (side, side), model.grid)
        new |= {f"head.{key}": value for key, value in model.head.state_dict().items()}
    return {**new, "pos_embed": prefixed}


_SOURCE = "kaistmm/Audio-Mamba-AuM@b0eb85d595c4 src/models/mamba_models.py"
_CLASSES = {"audioset": 527, "as_20k": 527, "vggsound": 309, "voxceleb": 1251, "speechcommands": 35, "epic_sounds": 44}


def audio_cfg(data: str, classes: int, **cfg: Any) -> dict[str, Any]:
    """A timm configuration: classes, and the size and normalisation of the spectrograms of a data set."""
    settings = FRONT_ENDS["audioset" if data == "as_20k" else data]
    return {
        "num_classes": classes,
        "input_size": (1, 128, settings["frames"]),
        "mean": (settings.get("mean", 0.0),),
        "std": (2 * settings.get("std", 0.5),),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **cfg,
    }


def _tags(*data: str) -> dict[str, dict[str, Any]]:
    return {name: audio_cfg(name, _CLASSES[name]) for name in data}


def _aum(params: int, notes: str, checkpoint: str | None = None) -> Card:
    return Card("audio", _SOURCE, "BSD-3-Clause", "2406.03344", params, checkpoint=checkpoint, notes=notes)


def build_tagged(cls: Any, name: str, pretrained: bool, filter_fn: Any, **kwargs: Any) -> Any:
    """`build_model`; the tag of a data set sets the frames of the position embedding."""
    tag = kwargs.get("pretrained_cfg")
    data = tag if isinstance(tag, str) and tag in FRONT_ENDS else "audioset"
    return build_model(
        cls, name, pretrained, filter_fn, (-4, -3, -2, -1), **{"frames": FRONT_ENDS[data]["frames"], **kwargs}
    )


def _build(name: str, pretrained: bool, **kwargs: Any) -> AuM:
    return build_tagged(AuM, name, pretrained, checkpoint_filter_fn, **kwargs)


_FILES = "The authors keep their files on a drive of theirs, without stable addresses: load one with checkpoint_path=."


@register(
    _aum(6_438_479, "Fo-Bi, as in the published ablations; no weights are published."),
    tag="audioset",
    others=_tags("speechcommands"),
    **audio_cfg("audioset", 527),
)
def aum_tiny(pretrained: bool = False, **kwargs: Any) -> AuM:
    """AuM-Ti, directions sharing their projections: 6.4 M parameters for the 527 classes of AudioSet."""
    return _build("aum_tiny", pretrained, **{"dim": 192, **kwargs})


@register(
    _aum(
        25_539_215,
        "Bi-Bi, from ImageNet weights of Vim-S. Official README: AudioSet 39.74 mAP, AS-20K 29.17 mAP, VGGSound "
        f"49.61 %, VoxCeleb 41.78 %, Speech Commands V2 97.61 %, EPIC-SOUNDS 53.45 %; a tag for each. {_FILES}",
        "aum-small_imgnet-audioset.pth",
    ),
    tag="audioset",
    others=_tags("as_20k", "vggsound", "voxceleb", "speechcommands", "epic_sounds"),
    **audio_cfg("audioset", 527),
)
def aum_small(pretrained: bool = False, **kwargs: Any) -> AuM:
    """AuM-S with a convolution and projections for each direction: 25.5 M parameters, AudioSet 39.74 mAP (README)."""
    return _build("aum_small", pretrained, **{"dim": 384, "shared": False, **kwargs})


@register(
    _aum(
        92_107_535,
        "Fo-Bi. Official README, from scratch: AudioSet 32.74 mAP, AS-20K 14.05 mAP, VGGSound 42.97 %, VoxCeleb 33.12 "
        "%, Speech Commands V2 94.44 %, EPIC-SOUNDS 44.92 %; after AudioSet: VGGSound 46.78 %, VoxCeleb 41.82 %, "
        f"Speech Commands V2 94.82 %, EPIC-SOUNDS 48.31 %; a tag for each data set. {_FILES}",
        "aum-base_scratch-audioset.pth",
    ),
    tag="audioset",
    others=_tags("as_20k", "vggsound", "voxceleb", "speechcommands", "epic_sounds"),
    **audio_cfg("audioset", 527),
)
def aum_base(pretrained: bool = False, **kwargs: Any) -> AuM:
    """AuM-B, directions sharing their projections: 92.1 M parameters, AudioSet 32.74 mAP from scratch (README)."""
    return _build("aum_base", pretrained, **{"dim": 768, **kwargs})


@register(
    Card(
        "audio",
        "mamba_zoo",
        "Apache-2.0",
        "2406.03344",
        155_242,
        drop_path=0.1,
        notes="Not published: for small sets of short recordings. A convolutional stem, then a token every 4 frames.",
    ),
    **{
        **audio_cfg("speechcommands", 10),
        "input_size": (1, 40, 100),
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "patch_embed.stem.0",
    },
)
def aum_mini(pretrained: bool = False, **kwargs: Any) -> AuM:
    """A small AuM of our own for short recordings: 40 mel bins, a stem, a token every 4 frames, four blocks."""
    args = {
        "mel_bins": 40, "frames": 100, "num_classes": 10, "patch_size": (kwargs.get("mel_bins", 40), 4), "stem": 32,
        "dim": 64, "depth": 4, "d_state": 8, "global_pool": "avg", **kwargs,
    }  # fmt: skip
    return build_model(AuM, "aum_mini", pretrained, checkpoint_filter_fn, (-4, -3, -2, -1), **args)

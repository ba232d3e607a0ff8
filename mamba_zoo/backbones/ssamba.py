"""SSAMBA: pairs of bidirectional Mamba layers over spectrogram patches. Shams et al. 2024, arXiv:2405.11831.

Follows the arithmetic of SiavashShams/ssamba@019b276c2cde src/models/both_models.py (BSD-3-Clause), built on
hustvl/Vim@dd0358ad1e42 vim/models_mamba.py (Apache-2.0).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from torch import Tensor, nn

from ..scans import ScanLike, as_spec
from ._block import AddNormBlock, LayerNorm
from ._fbank import FrontEnd
from ._init import init_linear_
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, register
from ._spectrogram import Pair, SpectrogramTokens, as_pair, resize_cropped
from ._ssm import resolve_scan
from .aum import audio_cfg, build_tagged, resized
from .vim import KEYS as VIM_KEYS


class PairBlock(nn.Module):
    """Two add-norm-mix blocks side by side, the second on the reversed sequence; both their outputs are added.

    The residual streams of both are added as well, so that the stream doubles with every pair, as published.

    Args:
        dim: Width.
        mixers: Of the two blocks; each takes `(x, order, cu_seqlens)`.
        drop_paths: Rate of each block.
        device: Of the norms.
        dtype: Of the norms.
    """

    def __init__(
        self, dim: int, mixers: tuple[nn.Module, nn.Module], drop_paths: tuple[float, float], device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.forth = AddNormBlock(dim, mixers[0], drop_paths[0], LayerNorm, **dd)
        self.back = AddNormBlock(dim, mixers[1], drop_paths[1], LayerNorm, **dd)

    def forward(self, hidden: Tensor, residual: Tensor | None, visits: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """`(hidden, residual)` to the next pair; `visits` are the arguments of the two mixers after the tokens."""
        forth, forth_residual = self.forth(hidden, residual, visits[0])
        # Not flipped: the scan reads the tokens from their end.
        back, back_residual = self.back(hidden, residual, visits[1])
        return forth + back, forth_residual + back_residual


class SSAMBA(SpectrogramTokens):
    """SSAMBA with a classifier: spectrograms `(b, frames, mel_bins)`, or waveforms, to logits.

    The class token is first. Spectrograms of any number of frames are taken: the position embedding is cropped or
    resized from the grid of `frames`. The last norm is applied twice, as published; the residual stream is float32.

    Args:
        mel_bins: Bands of the spectrograms.
        frames: Frames that the position embedding is made for.
        in_chans: Channels; with more than one, inputs are `(b, c, frames, mel_bins)`.
        num_classes: Classes; 0 returns the pooled features.
        global_pool: "avg" reads the mean of the patches, "token" the class token; "" does not pool.
        patch_size: Bands and frames of a patch, or one number for both.
        stride: Bands and frames between patches; None is `patch_size`. Trailing bands and frames that fill no patch are
            not read, as published.
        dim: Width.
        depth: Layers, two of which make a block.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Visiting orders of the patches on the grid (frequency, time): a name, a specification, a `Scan` or a
            function; see `mamba_zoo.scans`. Every second layer reads them reversed. "none" keeps the two convolutions
            of "bidirectional", but leaves the scan and its parameters out of every layer, as a control.
        front_end: None takes spectrograms. The name of a data set ("audioset", "speechcommands", "esc50", ...),
            settings or a `FrontEnd` takes waveforms `(b, samples)`.
        sample_rate: Of waveforms, in Hz, resampled if it is not the front end's; None is the front end's.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last layer; rates rise linearly from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an odd depth, an unknown scan, pooling or front end, or spectrograms smaller than a patch.
    """

    def __init__(
        self,
        mel_bins: int = 128,
        frames: int = 1024,
        in_chans: int = 1,
        num_classes: int = 527,
        global_pool: str = "avg",
        patch_size: int | Pair = 16,
        stride: int | Pair | None = 10,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        scan: ScanLike = "bidirectional",
        front_end: str | dict[str, Any] | FrontEnd | None = None,
        sample_rate: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if depth % 2 or depth < 2:
            raise ValueError(f"depth={depth} must be even: layers come in pairs")
        ssm = scan != "none"
        spec, k = resolve_scan(scan if ssm else "bidirectional")
        tokens = as_spec(f"with_token({spec}, 0)")
        rates: Any = [0.0, *calculate_drop_path_rates(drop_path_rate, depth)]
        mixer = partial(Mamba, dim, d_state, d_conv, expand, dt_rank, k, "mean", ssm=ssm, **dd)
        super().__init__(
            [PairBlock(dim, (mixer(), mixer()), (rates[i], rates[i + 1]), **dd) for i in range(0, depth, 2)],
            LayerNorm(dim, **dd),
            dim,
            mel_bins,
            frames,
            as_pair(patch_size),
            as_pair(stride or patch_size),
            (tokens, as_spec(f"reverse({tokens})")),
            front_end,
            sample_rate,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            rates[-1],
            **dd,
        )
        self.scan = spec if ssm else "none"
        self.fc_norm = LayerNorm(dim, **dd) if num_classes > 0 else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        init_linear_(self.head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^mask_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm|^match|^restore", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier, and a new norm before it; None keeps the pooling."""
        super().reset_classifier(num_classes, global_pool)
        weight = self.norm.weight if isinstance(self.norm, nn.LayerNorm) else self.cls_token
        fresh = LayerNorm(self.num_features, device=weight.device, dtype=weight.dtype)
        self.fc_norm = fresh.train(self.training) if num_classes > 0 else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returns; `pre_logits` stops before the norm of the classifier."""
        pooled = super().forward_head(x, pre_logits=True)
        return pooled if pre_logits else self._logits(pooled)

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.head(self.fc_norm(pooled))

    def class_index(self, tokens: int) -> int:
        """The class token is first."""
        return 0

    def resize_positions(self, positions: Tensor, old: Pair, new: Pair) -> Tensor:
        """A position embedding `(1, 1 + f * t, d)`, its class token first, for another grid."""
        return resize_cropped(positions, old, new)

    def visits(self, orders: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Any, Any]:
        """The arguments of both mixers of a block after the tokens."""
        return (orders[0], cu_seqlens), (orders[1], cu_seqlens)

    def _finish(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return self.norm(super()._finish(hidden, residual))


class MaskedSSAMBA(SSAMBA):
    """SSAMBA as it is pretrained: masked patches are to be told apart, and restored.

    The published files hold this model. Without classes `forward` gives the mean of the patches; `pretrain` gives the
    loss. Arguments are those of `SSAMBA`; patches do not overlap, and `in_chans` is 1.
    """

    def __init__(
        self,
        mel_bins: int = 128,
        frames: int = 1024,
        in_chans: int = 1,
        num_classes: int = 0,
        global_pool: str = "avg",
        patch_size: int | Pair = 16,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        scan: ScanLike = "bidirectional",
        front_end: str | dict[str, Any] | FrontEnd | None = None,
        sample_rate: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(
            mel_bins, frames, in_chans, num_classes, global_pool, patch_size, None, dim, depth, d_state, d_conv,
            expand, dt_rank, scan, front_end, sample_rate, drop_rate, drop_path_rate, **dd,
        )  # fmt: skip
        if in_chans != 1:
            raise ValueError(f"in_chans={in_chans}: pretraining restores the patches of one channel")
        values = self.patch_embed.patch_size[0] * self.patch_embed.patch_size[1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.match = nn.Sequential(nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, values, **dd))
        self.restore = nn.Sequential(nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, values, **dd))
        nn.init.xavier_normal_(self.mask_token)

    def patches(self, x: Tensor) -> Tensor:
        """The values of every patch, `(b, f * t, bands * frames of a patch)`."""
        size, stride = self.patch_embed.patch_size, self.patch_embed.stride
        return F.unfold(self._channels(x), size, stride=stride).transpose(1, 2)

    def pretrain(self, x: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Losses of masked patch modelling.

        Args:
            x: Spectrograms `(b, frames, mel_bins)`.
            masked: `(b, n)` indices of the masked patches, n for each, token (f, t) being `f * frames + t`.

        Returns:
            "loss", which is "contrast" + 10 "mse"; "contrast", by which each masked patch is to be found among those of
            its own recording (InfoNCE); "mse" of the restored values; "accuracy" of finding it, without gradient.

        Source:
            arXiv:2405.11831, equations 1 to 3; weights of the published code.
        """
        patches = self.patch_embed(self._channels(x))
        grid = (patches.shape[1], patches.shape[2])
        patches = patches.flatten(1, 2)
        index = masked[..., None].expand(-1, -1, patches.shape[-1])
        patches = patches.scatter(1, index, self.mask_token.to(patches.dtype).expand(*index.shape))
        hidden = self._place(patches, grid)
        orders, residual = self.orders(grid, x.device), None
        for block in self.blocks:
            hidden, residual = self._run(block, hidden, residual, orders)
        found = self._finish(hidden, residual)[:, 1:].gather(1, index)
        values = self.patches(x)
        target = values.gather(1, masked[..., None].expand(-1, -1, values.shape[-1])).float()
        scores = target @ self.match(found).float().transpose(1, 2)  # (b, target, prediction)
        scores = scores.log_softmax(-1)
        contrast = -scores.diagonal(dim1=1, dim2=2).mean()
        mse = F.mse_loss(self.restore(found).float(), target)
        own = torch.arange(scores.shape[-1], device=x.device)
        accuracy = (scores.argmax(1) == own).float().mean().detach()
        return {"loss": contrast + 10 * mse, "contrast": contrast, "mse": mse, "accuracy": accuracy}

    def random_masks(self, batch: int, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Masks `(batch, count)` of square clusters of 3 to 5 patches a side, as in pretraining.

        Args:
            batch: Recordings.
            count: Masked patches of each; the published models used 250, 300 and 400 of 512.
            generator: Of the random numbers, on the CPU.

        Raises:
            ValueError: more masked patches than patches.
        """
        height, width = self.grid
        if not 1 <= count <= height * width:
            raise ValueError(f"count={count} must lie between 1 and the {height * width} patches")
        rows = []
        for _ in range(batch):
            chosen: dict[int, None] = {}
            while len(chosen) < count:
                side = int(torch.randint(3, 6, (), generator=generator))
                f = int(torch.randint(height, (), generator=generator))
                t = int(torch.randint(width, (), generator=generator))
                for i in range(f, min(f + side, height)):
                    chosen |= dict.fromkeys(range(i * width + t, i * width + min(t + side, width)))
            rows.append(list(chosen)[:count])
        return torch.tensor(rows)


def _layer(match: re.Match[str]) -> str:
    number = int(match[1])
    return f"blocks.{number // 2}.{'back' if number % 2 else 'forth'}."


KEYS = [
    Key(r"module\.", ""),
    Key(r"^v\.", ""),
    *VIM_KEYS,
    Key(r"^blocks\.(\d+)\.(?!forth\.|back\.)", _layer),
    Key(r"^mlp_head\.0\.", "fc_norm."),
    Key(r"^mlp_head\.1\.", "head."),
    Key(r"^mask_embed$", "mask_token"),
    Key(r"^cpredlayer\.", "match."),
    Key(r"^gpredlayer\.", "restore."),
]
_PRETRAINING = ("mask_token", "match.", "restore.")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names; positions cropped or resized if the model's grid is another.

    The classifier of ImageNet that the files carry along unused is left out. Pretrained files have no other, so a
    model with classes keeps its own; what only serves pretraining is then left out as well.
    """
    # The published attribute is `v`, which holds Vim's unused classifier.
    dead = re.compile(r"^(module\.)?(v\.head\.|p_input_[ft]dim$)")
    state = rename({key: value for key, value in state_dict.items() if not dead.search(key)}, KEYS)
    if not isinstance(model, SSAMBA):
        return state
    if "mask_token" in state and not isinstance(model, MaskedSSAMBA):
        state = {key: value for key, value in state.items() if not key.startswith(_PRETRAINING)}
        state |= {key: value for key, value in model.state_dict().items() if key.startswith(("head.", "fc_norm."))}
        return resized(state, model, overlap=False)
    return resized(state, model)


_SOURCE = "SiavashShams/ssamba@019b276c2cde src/models/both_models.py"


def _ssamba(size: str, params: int, notes: str) -> Card:
    notes += f" Also published with 250 and 300 masked patches: ssamba_{size}_250.pth, ssamba_{size}_300.pth."
    return Card(
        "audio", _SOURCE, "BSD-3-Clause", "2405.11831", params, drop_path=0.1, checkpoint=f"ssamba_{size}_400.pth",
        notes=notes,
    )  # fmt: skip


_FINETUNED = "The published files are pretrained; the classifier starts anew."
_CFG = audio_cfg("audioset", 527, classifier=("head", "fc_norm"))
_TAGS = {
    "speechcommands": audio_cfg("speechcommands", 35, classifier=("head", "fc_norm")),
    "esc50": audio_cfg("esc50", 50, classifier=("head", "fc_norm")),
}
_MASKED_CFG = audio_cfg("audioset", 0, classifier=("head", "fc_norm"))


def _build(cls: type[SSAMBA], name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_tagged(cls, name, pretrained, checkpoint_filter_fn, **kwargs)


@register(_ssamba("tiny", 7_158_671, _FINETUNED), tag="audioset", others=_TAGS, **_CFG)
def ssamba_tiny(pretrained: bool = False, **kwargs: Any) -> SSAMBA:
    """SSAMBA-Ti for classification: 7.2 M parameters for the 527 classes of AudioSet."""
    return _build(SSAMBA, "ssamba_tiny", pretrained, **{"dim": 192, **kwargs})


@register(_ssamba("small", 25_818_383, _FINETUNED), tag="audioset", others=_TAGS, **_CFG)
def ssamba_small(pretrained: bool = False, **kwargs: Any) -> SSAMBA:
    """SSAMBA-S for classification: 26 M parameters for the 527 classes of AudioSet."""
    return _build(SSAMBA, "ssamba_small", pretrained, **{"dim": 384, **kwargs})


@register(_ssamba("base", 97_642_511, _FINETUNED), tag="audioset", others=_TAGS, **_CFG)
def ssamba_base(pretrained: bool = False, **kwargs: Any) -> SSAMBA:
    """SSAMBA-B for classification: 98 M parameters for the 527 classes of AudioSet."""
    return _build(SSAMBA, "ssamba_base", pretrained, **{"dim": 768, **kwargs})


_MASKED = "The model of the published files, with what pretraining predicts patches by."


@register(_ssamba("tiny", 7_095_296, _MASKED), tag="pretrain", **_MASKED_CFG)
def ssamba_tiny_pretrain(pretrained: bool = False, **kwargs: Any) -> MaskedSSAMBA:
    """SSAMBA-Ti as it is pretrained: 7.1 M parameters."""
    return _build(MaskedSSAMBA, "ssamba_tiny_pretrain", pretrained, **{"dim": 192, **kwargs})


@register(_ssamba("small", 25_839_104, _MASKED), tag="pretrain", **_MASKED_CFG)
def ssamba_small_pretrain(pretrained: bool = False, **kwargs: Any) -> MaskedSSAMBA:
    """SSAMBA-S as it is pretrained: 25.8 M parameters."""
    return _build(MaskedSSAMBA, "ssamba_small_pretrain", pretrained, **{"dim": 384, **kwargs})


@register(_ssamba("base", 98_273_792, _MASKED), tag="pretrain", **_MASKED_CFG)
def ssamba_base_pretrain(pretrained: bool = False, **kwargs: Any) -> MaskedSSAMBA:
    """SSAMBA-B as it is pretrained: 98.3 M parameters."""
    return _build(MaskedSSAMBA, "ssamba_base_pretrain", pretrained, **{"dim": 768, **kwargs})

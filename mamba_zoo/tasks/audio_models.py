"""The networks that listen: models of spectrograms, any image model on a spectrogram, and two plain baselines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers.weight_init import trunc_normal_
from timm.models import model_entrypoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import mamba_zoo

from ..backbones._decay import undecayed
from ..backbones._spectrogram import SpectrogramEmbed, SpectrogramTokens


class SpectrogramImage(nn.Module):
    """An image model that sees spectrograms `(b, frames, mel_bins)` as grey images, `(b, 1, mel_bins, frames)`.

    Args:
        net: Takes such images.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Spectrograms to class scores `(b, num_classes)`."""
        return self.net(x.transpose(1, 2)[:, None])

    def get_classifier(self) -> nn.Module:
        """The last layer of the image model."""
        net: Any = self.net
        return net.get_classifier()

    def no_weight_decay(self) -> set[str]:
        """What the image model exempts from decay."""
        net: Any = self.net
        return {f"net.{name}" for name in net.no_weight_decay()} if hasattr(net, "no_weight_decay") else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the image model are not told apart behind this one."""
        return {"stem": r"^$", "blocks": r"^net"}


class SpectrogramCNN(nn.Module):
    """A plain network of six convolutions and global averaging: what other models are compared with.

    Args:
        num_classes: Outputs.
        dim: Channels of the first pair of convolutions; the next have twice and four times as many.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, num_classes: int, dim: int = 32, drop_rate: float = 0.2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for stage in range(3):
            for stride in (1, 2):
                out = dim * 2**stage
                layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                width = out
        self.layers = nn.Sequential(*layers)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Spectrograms `(b, frames, mel_bins)` to class scores `(b, num_classes)`."""
        return self.head(self.drop(self.layers(x.transpose(1, 2)[:, None]).mean((2, 3))))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head


class SpectrogramTransformer(nn.Module):
    """A plain Transformer of spectrogram patches, embedded as `aum_mini` does it: what that model is compared with.

    Args:
        num_classes: Outputs.
        mel_bins: Bands of the spectrograms.
        frames: Frames of the spectrograms.
        patch_size: Bands and frames of a patch; None is all bands and 4 frames.
        stem: As for `SpectrogramEmbed`.
        dim: Width.
        depth: Blocks.
        heads: Of the attention.
        mlp_ratio: Hidden width of the MLP in units of `dim`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rates rise linearly from 0.
    """

    def __init__(
        self, num_classes: int, mel_bins: int, frames: int, patch_size: tuple[int, int] | None = None,
        stem: int | None = 32, dim: int = 64, depth: int = 4, heads: int = 4, mlp_ratio: float = 2.5,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        patch_size = patch_size or (mel_bins, 4)
        self.embed = SpectrogramEmbed(1, dim, patch_size, patch_size, stem)
        bands, times = self.embed.grid(mel_bins, frames)
        self.pos_embed = nn.Parameter(torch.empty(1, bands * times, dim))
        trunc_normal_(self.pos_embed, std=0.02)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates))
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Spectrograms `(b, frames, mel_bins)` to class scores `(b, num_classes)`."""
        tokens = self.embed(x.transpose(1, 2)[:, None]).flatten(1, 2) + self.pos_embed
        return self.head(self.drop(self.norm(self.blocks(tokens)).mean(1)))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Full names of norms, biases and positions."""
        return undecayed(self)


BASELINES = ("spectrogram_cnn", "spectrogram_transformer")


def build_listener(
    name: str,
    num_classes: int,
    mel_bins: int,
    frames: int,
    scan: str | None = None,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of spectrograms `(b, frames, mel_bins)`, tried once on an empty one; what is None is left to the model.

    Args:
        name: A model of spectrograms of the zoo, such as "aum_mini"; any image model of the zoo or of timm, which then
            sees the spectrogram as an image; or a baseline, "spectrogram_cnn" or "spectrogram_transformer".
        num_classes: Outputs.
        mel_bins: Bands.
        frames: Frames.
        scan: Scan order.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth.
        options: Further arguments of the model.

    Raises:
        ValueError: an unknown model, or one that cannot take such spectrograms.
    """
    given = {"scan": scan, "checkpoint_path": checkpoint_path, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    chosen = {key: value for key, value in given.items() if value is not None}
    arguments: dict[str, Any] = {**chosen, **{key: _pair(value) for key, value in (options or {}).items()}}
    if name in BASELINES:
        if pretrained or "scan" in arguments or "checkpoint_path" in arguments:
            raise ValueError(f"{name} has neither published weights nor a scan")
        if name == "spectrogram_cnn":
            arguments.pop("drop_path_rate", None)
            net: nn.Module = SpectrogramCNN(num_classes, **arguments)
        else:
            net = SpectrogramTransformer(num_classes, mel_bins, frames, **arguments)
    else:
        arguments = {"num_classes": num_classes, "pretrained": pretrained, **arguments}
        if issubclass(_class_of(name), SpectrogramTokens):
            net = mamba_zoo.create_model(name, mel_bins=mel_bins, frames=frames, **arguments)
        else:
            cfg = timm.get_pretrained_cfg(name)
            sized = {"img_size": (mel_bins, frames)} if cfg is not None and cfg.fixed_input_size else {}
            net = SpectrogramImage(mamba_zoo.create_model(name, in_chans=1, **sized, **arguments))
    _try(net, name, mel_bins, frames)
    return net


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _class_of(name: str) -> type:
    """What the entry point of a model says that it returns; `nn.Module` for a name that timm does not know."""
    known = timm.is_model(name.partition(".")[0])
    if not known:
        return nn.Module
    entry = model_entrypoint(name.partition(".")[0])
    found = inspect.get_annotations(entry, eval_str=True).get("return")
    return found if isinstance(found, type) else nn.Module


def _try(net: nn.Module, name: str, mel_bins: int, frames: int) -> None:
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, frames, mel_bins))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} cannot take spectrograms of {frames} frames and {mel_bins} bands: {error}") from error
    finally:
        net.train(training)

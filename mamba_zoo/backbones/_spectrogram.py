"""Models of the patches of spectrograms: embedding, positions, recordings of unequal length, waveforms as input."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..scans import scan_order
from ._base import Tokens
from ._fbank import FrontEnd, check_lengths
from ._fbank import front_end as make_front_end

Pair = tuple[int, int]


def as_pair(value: int | Pair) -> Pair:
    """`(bands, frames)`, of one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class SpectrogramEmbed(nn.Module):
    """One linear map per patch of a spectrogram; patches may overlap and need not be square.

    Args:
        in_chans: Channels.
        dim: Width of the tokens.
        patch_size: Bands and frames of a patch.
        stride: Bands and frames between patches.
        stem: Channels of two 3x3 convolutions that come first and halve both sides each, with batch norms and ReLU;
            None has none. Patches and strides are then multiples of 4.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a stem, and patches that it does not divide.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: Pair, stride: Pair, stem: int | None = None, device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if stem is not None and any(size % 4 for size in (*patch_size, *stride)):
            raise ValueError(f"patch_size={patch_size} and stride={stride} must be multiples of 4 after a stem")
        self.patch_size, self.stride, self.stem = patch_size, stride, None
        if stem is not None:
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, stem, 3, stride=2, padding=1, bias=False, **dd), nn.BatchNorm2d(stem, **dd),
                nn.ReLU(), nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False, **dd),
                nn.BatchNorm2d(stem, **dd), nn.ReLU(),
            )  # fmt: skip
            patch_size, stride = (patch_size[0] // 4, patch_size[1] // 4), (stride[0] // 4, stride[1] // 4)
        self.proj = nn.Conv2d(stem or in_chans, dim, patch_size, stride=stride, **dd)

    def grid(self, bands: int, frames: int) -> Pair:
        """Patches along frequency and time; what fills no patch is dropped, as published."""
        (patch_f, patch_t), (step_f, step_t) = self.proj.kernel_size, self.proj.stride
        if self.stem is not None:
            bands, frames = (bands + 3) // 4, (frames + 3) // 4
        return (bands - patch_f) // step_f + 1, (frames - patch_t) // step_t + 1

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, bands, frames)` to a channels-last map `(b, f, t, dim)`."""
        return self.proj(x if self.stem is None else self.stem(x)).permute(0, 2, 3, 1)


class SpectrogramTokens(Tokens):
    """The token models of spectrograms: `Tokens` whose inputs are `(b, frames, mel_bins)`, or waveforms `(b, samples)`.

    Token (f, t) of a grid of f patches along frequency and t along time is `f * frames + t`. Subclasses say where the
    class token stands (`class_index`), how positions are resized (`resize_positions`), and what their blocks take for
    an order (`visits`).

    Recordings of unequal length give what each gives alone: padded to `(b, frames, mel_bins)` with `lengths`, or packed
    one after another in `(1, frames, mel_bins)` with `cu_seqlens`.

    Args:
        blocks: As for `Tokens`.
        norm: Likewise.
        dim: Likewise.
        mel_bins: Bands of the spectrograms.
        frames: Frames that the position embedding is made for.
        patch_size: Bands and frames of a patch.
        stride: Bands and frames between patches.
        token_scans: Orders of the tokens, class token included, as specifications for `scans.scan_order`.
        front_end: None takes spectrograms; the name of a data set, settings or a `FrontEnd` takes waveforms.
        sample_rate: Of waveforms, in Hz; None is that of the front end.
        in_chans: As for `Tokens`.
        num_classes: Likewise.
        global_pool: Likewise.
        drop_rate: Likewise.
        drop_path: Likewise.
        stem: As for `SpectrogramEmbed`.
        device: Likewise.
        dtype: Likewise.

    Raises:
        ValueError: a spectrogram smaller than a patch, an unknown front end or one with other bands.
    """

    def __init__(
        self, blocks: Any, norm: nn.Module, dim: int, mel_bins: int, frames: int, patch_size: Pair, stride: Pair,
        token_scans: tuple[str, ...], front_end: str | dict[str, Any] | FrontEnd | None, sample_rate: int | None,
        in_chans: int, num_classes: int, global_pool: str, drop_rate: float, drop_path: float,
        stem: int | None = None, device=None, dtype=None,
    ):  # fmt: skip
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(
            blocks, norm, dim, stride[1], in_chans, num_classes, global_pool, drop_rate, drop_path=drop_path, **dd
        )
        if mel_bins < patch_size[0] or frames < patch_size[1]:
            raise ValueError(f"mel_bins={mel_bins} and frames={frames} are smaller than a patch of {patch_size}")
        self.mel_bins, self.frames, self.token_scans, self.sample_rate = mel_bins, frames, token_scans, sample_rate
        self.patch_embed = SpectrogramEmbed(in_chans, dim, patch_size, stride, stem, **dd)
        self.grid = self.patch_embed.grid(mel_bins, frames)
        self.front_end = None if front_end is None else make_front_end(front_end)
        if self.front_end is not None and (self.front_end.mel_bins != mel_bins or in_chans != 1):
            raise ValueError(
                f"front_end gives {self.front_end.mel_bins} bands and 1 channel, but the model has mel_bins={mel_bins} "
                f"and in_chans={in_chans}"
            )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid) + 1, dim, **dd))

    def resize_positions(self, positions: Tensor, old: Pair, new: Pair) -> Tensor:
        """A position embedding `(1, 1 + f * t, d)`, its class token first, for another grid."""
        raise NotImplementedError

    def visits(self, orders: list[Tensor], cu_seqlens: Tensor | None) -> Any:
        """What a block is given: `orders`, each `(k, m)` or `(b, k, m)`, one for each of `token_scans`.

        With packed recordings also their boundaries `(s + 1,)`.
        """
        raise NotImplementedError

    def input_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of a spectrogram of `height` bands and `width` frames: `(frames, bands)`, after the channels if any."""
        return (width, height) if self.in_chans == 1 else (self.in_chans, width, height)

    def forward(self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Spectrograms or waveforms to logits.

        Args:
            x: `(b, frames, mel_bins)`, with more channels `(b, c, frames, mel_bins)`; with a front end waveforms
                `(b, samples)`.
            lengths: `(b,)` frames of each, or samples if there is a front end; the rest of a row is not read. A front
                end with a fixed number of frames then pads and cuts each recording as if it were alone.
            cu_seqlens: `(s + 1,)` boundaries of s spectrograms packed into one, `(1, frames, mel_bins)`.

        Returns:
            `(b, num_classes)`, or one row for each packed spectrogram.

        Raises:
            ValueError: another shape, or lengths that do not fit it.
        """
        if self.front_end is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens packs spectrograms; give waveforms as one padded batch with lengths")
            x, frames = self.front_end(x, self.sample_rate, lengths)
            x = x.to(self.patch_embed.proj.weight.dtype)
            lengths = frames if lengths is not None and self.front_end.frames is None else None
        if lengths is None and cu_seqlens is None:
            return super().forward(x)
        if lengths is not None and cu_seqlens is not None:
            raise ValueError("give lengths of a padded batch or cu_seqlens of a packed one, not both")
        x = self._channels(x)
        if cu_seqlens is not None:
            x, lengths = _unpack(x, cu_seqlens)
        least = self.patch_embed.patch_size[1]
        lengths = check_lengths(torch.as_tensor(lengths), len(x), x.shape[3], least, "frames")
        tokens, spans, visits = self._unequal(x, lengths.tolist(), packed=cu_seqlens is not None)
        residual = None
        for block in self.blocks:
            tokens, residual = self._run(block, tokens, residual, visits)
        return self._classify(self._finish(tokens, residual), spans)

    def embed(self, x: Tensor) -> tuple[Tensor, Any, Pair]:
        """Spectrograms to tokens `(b, 1 + f * t, d)`, what every block is given besides, and the grid `(f, t)`."""
        patches = self.patch_embed(self._channels(x))
        grid = (patches.shape[1], patches.shape[2])
        tokens = self._place(patches.flatten(1, 2), grid)
        return tokens, self.orders(grid, x.device), grid

    def orders(self, grid: Pair, device: torch.device) -> Any:
        """What every block is given besides the tokens of a grid."""
        return self.visits([scan_order(spec, grid, device) for spec in self.token_scans], None)

    def _place(self, patches: Tensor, grid: Pair) -> Tensor:
        """Patches `(b, f * t, d)` with their positions, and the class token among them."""
        positions = self.pos_embed if grid == self.grid else self.resize_positions(self.pos_embed, self.grid, grid)
        index = self.class_index(patches.shape[1] + 1) or 0
        patches = patches + positions[:, 1:]
        token = (self.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([patches[:, :index], token, patches[:, index:]], dim=1)

    def _unequal(self, x: Tensor, lengths: list[int], packed: bool) -> tuple[Tensor, list[Pair], Any]:
        """Tokens of recordings `(b, c, bands, frames)` of so many frames, where each begins and ends, the visits.

        Padded tokens are `(b, l, d)`, each recording in a row of its own; packed ones `(1, l, d)`, one after another.
        """
        grids = [self.patch_embed.grid(self.mel_bins, length) for length in lengths]
        # One by one, so that a stem sees no frame behind a recording.
        patches = [self.patch_embed(x[i : i + 1, ..., :length]) for i, length in enumerate(lengths)]
        rows = [self._place(p.flatten(1, 2), grid)[0] for p, grid in zip(patches, grids, strict=True)]
        sizes = [len(row) for row in rows]
        starts = [sum(sizes[:i]) if packed else i * max(sizes) for i in range(len(rows))]
        spans = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        tables = [[scan_order(spec, grid, x.device) for grid in grids] for spec in self.token_scans]
        if packed:
            orders = [_one_after_another(of_spec, starts) for of_spec in tables]
            bounds = torch.tensor([*starts, sum(sizes)], dtype=torch.int32, device=x.device)
            return torch.cat(rows)[None], spans, self.visits(orders, bounds)
        return pad_sequence(rows, batch_first=True), spans, self.visits([_side_by_side(t) for t in tables], None)

    def _classify(self, features: Tensor, spans: list[Pair]) -> Tensor:
        """`forward_head` of each recording of an unequal batch."""
        if self.global_pool == "":
            raise ValueError("global_pool='' leaves recordings of unequal length unpooled; choose 'token' or 'avg'")
        flat = features.flatten(0, 1)
        pooled = [self.forward_head(flat[None, start:end], pre_logits=True) for start, end in spans]
        return self._logits(torch.cat(pooled))

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def _channels(self, x: Tensor) -> Tensor:
        """Spectrograms in the public layout as `(b, c, bands, frames)`; ValueError for anything else."""
        shape = (self.mel_bins,) if self.in_chans == 1 else (self.in_chans, "frames", self.mel_bins)
        fits = x.dim() == (3 if self.in_chans == 1 else 4) and x.shape[-1] == self.mel_bins
        if not fits or (self.in_chans > 1 and x.shape[1] != self.in_chans):
            wanted = f"(b, frames, {self.mel_bins})" if self.in_chans == 1 else f"(b, {', '.join(map(str, shape))})"
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected spectrograms {wanted}; for waveforms build the model with "
                "front_end='audioset' or settings of your own"
            )
        if x.shape[-2] < self.patch_embed.patch_size[1]:
            raise ValueError(
                f"x has {x.shape[-2]} frames, but one patch needs {self.patch_embed.patch_size[1]}; pad the recordings"
            )
        x = x.transpose(-1, -2)
        return x[:, None] if self.in_chans == 1 else x


def _one_after_another(tables: list[Tensor], starts: list[int]) -> Tensor:
    """Orders of recordings as one order `(k, m)` of their packed tokens."""
    return torch.cat(
        [torch.where(table < 0, -1, table + start) for table, start in zip(tables, starts, strict=True)], dim=1
    )


def _side_by_side(tables: list[Tensor]) -> Tensor:
    """Orders of recordings as `(b, k, m)`.

    After its last token a direction has empty steps, which change nothing that was written before.
    """
    steps = max(table.shape[1] for table in tables)
    return torch.stack([F.pad(table, (0, steps - table.shape[1]), value=-1) for table in tables])


def _unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """A packed spectrogram `(1, c, bands, frames)` as a padded batch, and the frames of each."""
    cuts = cu_seqlens.tolist()
    if len(x) != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != x.shape[3] or sorted(cuts) != cuts:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {x.shape[3]} frames of one packed spectrogram, not {cuts[:6]} "
            f"for a batch of {len(x)}"
        )
    lengths = cu_seqlens.diff()
    parts = x[0].permute(2, 0, 1).split(lengths.tolist())
    return pad_sequence(list(parts), batch_first=True).permute(0, 2, 3, 1), lengths


def resize_antialiased(positions: Tensor, old: Pair, new: Pair) -> Tensor:
    """A position embedding `(1, 1 + f * t, d)` for another grid, bilinear with smoothing; the class token's is kept.

    Source:
        arXiv:2406.03344, its published loader.
    """
    if old == new:
        return positions
    return torch.cat([positions[:, :1], _resized(positions[:, 1:], old, new, antialias=True)], dim=1)


def resize_cropped(positions: Tensor, old: Pair, new: Pair) -> Tensor:
    """A position embedding `(1, 1 + f * t, d)` for another grid: the middle of its frames if there are enough.

    Otherwise bilinear along time; then bilinear along frequency. Without smoothing; the class token's is kept.

    Source:
        arXiv:2405.11831, its published loader.
    """
    if old == new:
        return positions
    grid = positions[:, 1:]
    if new[1] < old[1]:
        start = old[1] // 2 - new[1] // 2
        grid = grid.unflatten(1, old)[:, :, start : start + new[1]].flatten(1, 2)
    elif new[1] > old[1]:
        grid = _resized(grid, old, (old[0], new[1]), antialias=False)
    grid = _resized(grid, (old[0], new[1]), new, antialias=False)
    return torch.cat([positions[:, :1], grid], dim=1)


def _resized(grid: Tensor, old: Pair, new: Pair, antialias: bool) -> Tensor:
    if old == new:
        return grid
    image = grid.float().unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, new, mode="bilinear", antialias=antialias, align_corners=False)
    return image.flatten(2).transpose(1, 2).to(grid.dtype)


def resize_patches(weight: Tensor, new: Pair) -> Tensor:
    """A patch projection `(d, c, f, t)` for patches of another size, by the pseudo-inverse of bilinear resizing.

    Source:
        arXiv:2212.08013, section 3.4.
    """
    if tuple(weight.shape[2:]) == tuple(new):
        return weight
    return resample_patch_embed(weight, list(new), interpolation="bilinear", antialias=False)

"""SPMamba: speech separation by TF-GridNet with Mamba in place of its LSTMs. Li et al. 2024, arXiv:2404.02063.

Follows the arithmetic of JusperLee/SPMamba@f939f60a10db look2hear/models/SPMamba.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans import ScanLike
from ._block import LayerNorm
from ._frames import Frames, MapConv, MapNorm
from ._keys import Key, rename
from ._parallel import ParallelMamba, parallel_keys
from ._register import Card, build_model, register
from ._ssm import resolve_scan
from ._stft import Spectrum
from ._streaming import Waveforms

_QUIET = 1e-8  # deviation below which a signal counts as silence


class AxisPath(nn.Module):
    """A norm, windows of neighbours along one axis, Mamba blocks over them, and back to tokens; added to the input.

    Args:
        dim: Width c.
        window: Neighbours in a window; windows begin at every token.
        scan: Orders of the windows, as from `resolve_scan`; "none" leaves the scan and its parameters out.
        d_state: States n.
        d_conv: Taps of the convolutions.
        expand: Inner width in units of `dim * window`.
        eps: Of the norm of the tokens.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        scan: str,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 4,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        directions = resolve_scan(scan, 1)[1]
        k = directions or 2
        self.window, self.scan = window, scan if directions else "bidirectional"
        self.norm = LayerNorm(dim, eps=eps, **dd)
        self.mixer = ParallelMamba(dim * window, d_state, d_conv, expand, k=k, ssm=directions > 0, **dd)
        self.out = nn.ConvTranspose1d(k * dim * window, dim, window, **dd)

    def forward(self, rows: Tensor, frames: Frames, repeat: int = 1) -> Tensor:
        """Sequences `(r, l, dim)` to the same shape.

        Args:
            rows: Tokens; `repeat` sequences for each sample.
            frames: Which of them are real, where they are time frames; an empty one otherwise.
            repeat: Sequences of each sample.
        """
        l, less = rows.shape[1], self.window - 1
        x = self.norm(rows)
        if frames.mask is not None:
            x = x * frames.mask.flatten(1).repeat_interleave(repeat, 0)[..., None].to(x.dtype)
        if l < self.window:
            x = F.pad(x, (0, 0, 0, self.window - l))
        windows = x.unfold(1, self.window, 1).flatten(2)
        steps = windows.shape[1]
        y = self.mixer(windows, frames.order(self.scan, steps, repeat, x.device, less))
        if frames.lengths is not None:
            ends = torch.tensor([max(n - less, 1) for n in frames.lengths], device=x.device).repeat_interleave(repeat)
            y = torch.where((torch.arange(steps, device=x.device) < ends[:, None])[..., None], y, 0)
        return rows + self.out(y.transpose(1, 2)).transpose(1, 2)[:, :l]


class HeadMap(nn.Module):
    """For each head a linear map of the channels, PReLU with one slope, and a norm over channels and frequencies.

    Args:
        heads: Heads h.
        dim: Channels read.
        out: Channels e of each head.
        freqs: Frequencies f.
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, heads: int, dim: int, out: int, freqs: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(heads, out, dim, **dd))
        self.bias = nn.Parameter(torch.zeros(heads, out, **dd))
        self.slope = nn.Parameter(torch.full((heads,), 0.25, **dd))
        self.gamma = nn.Parameter(torch.ones(heads, out, freqs, **dd))
        self.beta = nn.Parameter(torch.zeros(heads, out, freqs, **dd))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, t, f, dim)` to `(b, h, t, e, f)`."""
        y = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(-1, self.bias.shape)
        y = torch.where(y > 0, y, y * self.slope[:, None]).permute(0, 3, 1, 4, 2)
        normed = F.layer_norm(y, y.shape[-2:], eps=self.eps)
        return normed * self.gamma[:, None] + self.beta[:, None]


class FrameAttention(nn.Module):
    """Attention between frames, each seen as all its channels and frequencies; added to the input.

    Args:
        dim: Width c; a multiple of `heads`.
        heads: Heads.
        freqs: Frequencies f.
        query_size: About how many values a query has; it sets the channels of queries and keys.
        eps: Of the norms.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, heads: int, freqs: int, query_size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        settings: Any = {"eps": eps, "device": device, "dtype": dtype}
        query = -(-query_size // freqs)
        self.query = HeadMap(heads, dim, query, freqs, **settings)
        self.key = HeadMap(heads, dim, query, freqs, **settings)
        self.value = HeadMap(heads, dim, dim // heads, freqs, **settings)
        self.out = HeadMap(1, dim, dim, freqs, **settings)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, dim)` to the same shape."""
        q, k, v = (part(x).flatten(3).contiguous() for part in (self.query, self.key, self.value))
        mask = None if frames.mask is None else (frames.mask > 0).view(len(x), 1, 1, -1)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        y = y.unflatten(-1, (-1, x.shape[2])).permute(0, 2, 4, 1, 3).flatten(3)
        return x + self.out(y)[:, 0].transpose(2, 3)


class GridBlock(nn.Module):
    """Mamba along frequency in every frame, along time in every frequency, then attention between frames."""

    def __init__(self, freq: AxisPath, time: AxisPath, attention: FrameAttention):
        super().__init__()
        self.freq, self.time, self.attention = freq, time, attention

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, dim)` to the same shape."""
        b, t, f, _ = x.shape
        x = self.freq(x.reshape(b * t, f, -1), Frames()).view(x.shape)
        rows = x.transpose(1, 2).reshape(b * f, t, -1)
        x = self.time(rows, frames, f).unflatten(0, (b, f)).transpose(1, 2)
        return frames.cut(self.attention(frames.cut(x), frames))


class Decoder(nn.Module):
    """A transposed 3x3 convolution of maps `(b, t, f, c)`."""

    def __init__(self, dim_in: int, dim_out: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.ConvTranspose2d(dim_in, dim_out, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, t, f, dim_in)` to `(b, t, f, dim_out)`."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SPMamba(Waveforms):
    """A mixture of voices to the voices, in an order of its own, from the real and imaginary parts of a spectrogram.

    Signals are scaled to a deviation of 1 and back. Every length is taken: clips of at most half a frame are filled up
    with zeros, and so are fewer than `window` frames, which the published program refuses.

    Args:
        sample_rate: Samples per second that the model is for.
        n_fft: Samples of a frame.
        hop: Samples between frames.
        sources: Voices to separate.
        dim: Width.
        depth: Blocks.
        window: Neighbours that the mixers see at once.
        heads: Attention heads.
        query_size: About how many values a query has.
        d_state: States n.
        d_conv: Taps of the mixers' convolutions.
        expand: Inner width of the mixers in units of `dim * window`.
        eps: Of the norms in the blocks.
        scan: Orders of the frames and of the frequencies: one axis, such as "bidirectional", "raster",
            "reverse(raster)" or "random". Each direction has Mamba blocks of its own. "none" leaves the scans out, as a
            control.
        freq_scan: Orders of the frequencies, where they are to differ.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: an unknown scan, or sizes that do not fit each other.
    """

    def __init__(
        self,
        sample_rate: int = 8000,
        n_fft: int = 256,
        hop: int = 64,
        sources: int = 2,
        dim: int = 16,
        depth: int = 6,
        window: int = 8,
        heads: int = 4,
        query_size: int = 512,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 4,
        eps: float = 1e-5,
        scan: ScanLike = "bidirectional",
        freq_scan: ScanLike | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(sample_rate)
        dd: Any = {"device": device, "dtype": dtype}
        freqs = n_fft // 2 + 1
        if window > freqs:
            raise ValueError(f"window={window} is more than the {freqs} frequencies of n_fft={n_fft}")
        self.sources = sources
        self.scan = resolve_scan(scan, 1)[0]
        self.freq_scan = resolve_scan(freq_scan if freq_scan is not None else scan, 1)[0]
        self.spectrum = Spectrum(n_fft, hop)
        self.grad_checkpointing = False
        self.embed = MapConv(2, dim, (3, 3), **dd)
        self.embed_norm = MapNorm(dim, together=True, **dd)
        settings: Any = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "eps": eps, **dd}
        self.blocks = nn.ModuleList(
            GridBlock(
                AxisPath(dim, window, self.freq_scan, **settings),
                AxisPath(dim, window, self.scan, **settings),
                FrameAttention(dim, heads, freqs, query_size, eps, **dd),
            )
            for _ in range(depth)
        )
        self.decoder = Decoder(dim, 2 * sources, **dd)

    def forward(
        self, wave: Tensor, lengths: Sequence[int] | Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Mixtures to voices.

        Args:
            wave: `(b, n)`, at `sample_rate`.
            lengths: Samples of each signal of a padded batch; None if all have `n`. Each comes out as if it were alone,
                with zeros behind it.
            cu_seqlens: `(s + 1,)` boundaries of s signals packed into one row, `(1, n)`.

        Returns: `(b, sources, n)`.

        Raises:
            ValueError: another shape, or lengths that do not fit.
        """
        if cu_seqlens is not None:
            return self.packed(wave, lengths, cu_seqlens)
        signal, ends = self.prepare(wave, lengths, self.spectrum.shortest)
        scale = _deviation(signal, ends).clamp_min(_QUIET)
        spectrum = self.spectrum.analyse(signal / scale, ends)
        steps = None if ends is None else [self.spectrum.frames(n) for n in ends]
        frames = Frames.of(steps, spectrum.shape[1], spectrum.real)
        voices = self.separate(spectrum, frames)
        b, k = voices.shape[:2]
        each = None if ends is None else [n for n in ends for _ in range(k)]
        out = self.spectrum.synthesise(voices.flatten(0, 1), signal.shape[1], each).unflatten(0, (b, k))
        return self.restore(out * scale[..., None], wave, lengths)

    def separate(self, spectrum: Tensor, frames: Frames | None = None) -> Tensor:
        """Spectra of mixtures `(b, t, f)`, complex, to those of the voices `(b, sources, t, f)`."""
        frames = frames or Frames()
        x = torch.view_as_real(spectrum).to(self.decoder.conv.weight.dtype)
        x = frames.cut(self.embed_norm(self.embed(x, frames), frames))
        for block in self.blocks:
            x = checkpoint(block, x, frames) if self.grad_checkpointing else block(x, frames)  # type: ignore[assignment]
        parts = self.decoder(x).to(spectrum.real.dtype).unflatten(-1, (self.sources, 2))
        return torch.view_as_complex(parts.contiguous()).permute(0, 3, 1, 2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


def _deviation(signal: Tensor, ends: list[int] | None) -> Tensor:
    """Of the samples of each signal, without bias: `(b, 1)`."""
    if ends is None:
        return signal.std(1, keepdim=True)
    count = torch.tensor(ends, device=signal.device)[:, None]
    inside = torch.arange(signal.shape[1], device=signal.device) < count
    centred = torch.where(inside, signal - signal.sum(1, keepdim=True) / count, 0)
    return (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()


def _per_channel(weight: Tensor) -> Tensor:
    return weight.flatten()


_PATHS = [
    key
    for old, new in (("intra", "freq"), ("inter", "time"))
    for key in (
        *parallel_keys(rf"^(blocks\.\d+\.){old}_mamba\.", rf"\1{new}.mixer."),
        Key(rf"^(blocks\.\d+\.){old}_norm\.gamma$", rf"\1{new}.norm.weight", convert=_per_channel),
        Key(rf"^(blocks\.\d+\.){old}_norm\.beta$", rf"\1{new}.norm.bias", convert=_per_channel),
        Key(rf"^(blocks\.\d+\.){old}_linear\.", rf"\1{new}.out."),
    )
]


def _head_keys(published: str, ours: str, head: int) -> list[Key]:
    def flat(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def table(weight: Tensor) -> Tensor:
        return weight[0, :, 0]

    start = rf"^(blocks\.\d+\.){published}\."
    return [
        Key(rf"{start}0\.weight$", rf"\1attention.{ours}.weight", head, flat),
        Key(rf"{start}0\.bias$", rf"\1attention.{ours}.bias", head),
        Key(rf"{start}1\.weight$", rf"\1attention.{ours}.slope", head, lambda slope: slope[0]),
        Key(rf"{start}2\.gamma$", rf"\1attention.{ours}.gamma", head, table),
        Key(rf"{start}2\.beta$", rf"\1attention.{ours}.beta", head, table),
    ]


_MAX_HEADS = 8
KEYS = [
    Key(r"^conv\.0\.", "embed.conv."),
    Key(r"^conv\.1\.", "embed_norm."),
    *_PATHS,
    *(
        key
        for old, new in (("Q", "query"), ("K", "key"), ("V", "value"))
        for head in range(_MAX_HEADS)
        for key in _head_keys(rf"attn_conv_{old}_{head}", new, head)
    ),
    *_head_keys("attn_concat_proj", "out", 0),
    Key(r"^deconv\.", "decoder.conv."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    return rename(state_dict, KEYS)


def _build(name: str, pretrained: bool, **kwargs: Any) -> SPMamba:
    return build_model(SPMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


def _card(params: int, notes: str, checkpoint: str | None) -> Card:
    source = "JusperLee/SPMamba@f939f60a10db look2hear/models/SPMamba.py"
    return Card("audio", source, "Apache-2.0", "2404.02063", params, checkpoint=checkpoint, notes=notes)


@register(
    _card(
        6_094_498,
        "Separates two voices at 8 kHz. Published SI-SNRi 22.5 dB on WSJ0-2Mix and 17.4 dB on WHAM!; weights, for "
        "LibriMix, are in release v1.0 of the repository, to be fetched by hand.",
        "best_model.pth",
    ),
    num_classes=-1,
    input_size=None,
)
def spmamba(pretrained: bool = False, **kwargs: Any) -> SPMamba:
    """SPMamba at 8 kHz, frames of 256: 6.1 M parameters, 22.5 dB SI-SNRi on WSJ0-2Mix (official README)."""
    return _build("spmamba", pretrained, **kwargs)


@register(
    _card(
        6_141_826,
        "Separates two voices at 16 kHz, with noise and echo; weights, for Echo2Mix, are in release v1.0 of the "
        "repository, to be fetched by hand.",
        "best_model.pth",
    ),
    num_classes=-1,
    input_size=None,
)
def spmamba_echo2mix(pretrained: bool = False, **kwargs: Any) -> SPMamba:
    """SPMamba at 16 kHz, frames of 512: 6.1 M parameters."""
    return _build("spmamba_echo2mix", pretrained, **{"sample_rate": 16000, "n_fft": 512, "hop": 128, **kwargs})


@register(
    Card(
        "audio",
        "mamba_zoo",
        "Apache-2.0",
        "2404.02063",
        notes="Not published: 8 kHz, for training in minutes.",
    ),
    num_classes=-1,
    input_size=None,
)
def spmamba_mini(pretrained: bool = False, **kwargs: Any) -> SPMamba:
    """A small SPMamba of our own at 8 kHz: width 12, two blocks, windows of 4, frames of 32 ms every 16 ms."""
    args = {
        "hop": 128,
        "dim": 12,
        "depth": 2,
        "window": 4,
        "heads": 2,
        "query_size": 256,
        "d_state": 8,
        "expand": 2,
        **kwargs,
    }
    return _build("spmamba_mini", pretrained, **args)

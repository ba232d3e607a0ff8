"""SEMamba: speech enhancement by Mamba over time and over frequency, in turn. Chao et al. 2024, arXiv:2405.06573.

Follows the arithmetic of RoyChao19477/SEMamba@750ff5d8f0e1 models/generator.py and inference.py (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans import ScanLike
from ._frames import Frames, MapConv, MapUnit, WidenFrequency
from ._keys import Key, rename
from ._parallel import ParallelMamba, parallel_keys
from ._register import Card, build_model, register
from ._ssm import resolve_scan
from ._stft import Spectrum, SpectrumStream
from ._streaming import Waveforms, name_memories

_QUIET = 1e-8  # sum of squares below which a signal counts as silence


class DenseConvs(nn.Module):
    """Four 3x3 convolutions, each of which reads what all before it put out; 1, 2, 4 and 8 frames between taps.

    Args:
        dim: Channels in and out.
        causal: Look at past frames only.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, causal: bool = False, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.units = nn.ModuleList(
            MapUnit(MapConv(dim * (i + 1), dim, (3, 3), 2**i, causal=causal, **dd), dim, causal, **dd) for i in range(4)
        )

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, dim)` to the same shape."""
        read = x
        for unit in self.units:
            x = unit(read, frames)
            read = torch.cat([x, read], dim=-1)
        return x


class TimeFrequencyBlock(nn.Module):
    """Mamba blocks along time in every frequency, then along frequency in every frame, each added to the stream.

    Args:
        dim: Width.
        time_scan: Orders of the frames, as from `resolve_scan`; "none" leaves the scan and its parameters out.
        freq_scan: Orders of the frequencies.
        d_state: States n.
        d_conv: Taps of the convolutions.
        expand: Inner width in units of `dim`.
        eps: Of the norms.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        time_scan: str,
        freq_scan: str,
        d_state: int,
        d_conv: int,
        expand: float,
        eps: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        parts = []
        for scan in (time_scan, freq_scan):
            k = resolve_scan(scan, 1)[1]
            block = ParallelMamba(dim, d_state, d_conv, expand, k=k or 2, eps=eps, ssm=k > 0, **dd)
            parts += [block, nn.Linear((k or 2) * dim, dim, **dd)]
        self.time, self.time_out, self.freq, self.freq_out = parts
        self.time_scan, self.freq_scan = (
            scan if scan != "none" else "bidirectional" for scan in (time_scan, freq_scan)
        )

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, dim)` to the same shape."""
        b, t, f, _ = x.shape
        rows = x.transpose(1, 2).reshape(b * f, t, -1)
        if frames.state is None:
            y = self.time(rows, frames.order(self.time_scan, t, f, x.device))
        else:
            y = self.time.extend(rows, frames)
        x = x + self.time_out(y).unflatten(0, (b, f)).transpose(1, 2)
        rows = x.reshape(b * t, f, -1)
        y = self.freq(rows, Frames().order(self.freq_scan, f, 1, x.device))
        return frames.cut(x + self.freq_out(y).view(x.shape))


class SEMamba(Waveforms):
    """Noisy speech to clean speech: a mask for the magnitudes and new phases, from a spectrogram.

    Magnitudes are compressed by the power `compress`, and the signal is scaled to a mean square of 1. Every length is
    taken, and the output is as long as the input: the published program loses up to `hop - 1` samples at the end.
    Clips of at most half a frame are filled up with zeros.

    Args:
        sample_rate: Samples per second that the model is for.
        n_fft: Samples of a frame; a multiple of 4.
        hop: Samples between frames.
        dim: Width.
        depth: Time-frequency blocks.
        d_state: States n.
        d_conv: Taps of the mixers' convolutions.
        expand: Inner width of the mixers in units of `dim`.
        compress: Power of the magnitudes.
        beta: Largest mask.
        eps: Of the norms of the mixers.
        scan: Orders of the frames and of the frequencies: one axis, such as "bidirectional", "raster",
            "reverse(raster)" or "random". Each direction has Mamba blocks of its own. None is "bidirectional", and
            "raster" for the frames of a causal model. "none" leaves the scans out, as a control.
        freq_scan: Orders of the frequencies, where they are to differ.
        causal: A model that can be streamed, of our own, which no published weights fit: convolutions look at past
            frames, norms and scans at one frame and those before it, and signals are not scaled. An output sample
            waits for `n_fft - 1` input samples at most.
        mirror: Continue signals at their ends by mirroring, as the published weights expect, and not by zeros, as
            causal models do. A mirrored first frame is symmetric, and rounding alone decides whether a phase in it is
            pi or -pi, which the network takes for opposite values.
        relative_phase: Let the network turn the noisy phases instead of making new ones, and begin with what came in.
            It has less to learn; no published weights expect it.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: `n_fft` is no multiple of 4, an unknown scan, or a scan that is not causal in a causal model.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        hop: int = 100,
        dim: int = 64,
        depth: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 4,
        compress: float = 0.3,
        beta: float = 2.0,
        eps: float = 1e-5,
        scan: ScanLike | None = None,
        freq_scan: ScanLike | None = None,
        causal: bool = False,
        mirror: bool = True,
        relative_phase: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(sample_rate)
        dd: Any = {"device": device, "dtype": dtype}
        if n_fft % 4:
            raise ValueError(
                f"n_fft={n_fft} must be a multiple of 4, so that the frequencies can be halved and doubled"
            )
        self.scan = resolve_scan(scan if scan is not None else "raster" if causal else "bidirectional", 1)[0]
        over = freq_scan if freq_scan is not None else scan
        self.freq_scan = resolve_scan("bidirectional" if over is None else over, 1)[0]
        if causal and self.scan != "raster":
            raise ValueError(f"scan={self.scan!r} looks ahead; a causal model needs 'raster' (freq_scan= is free)")
        self.dim, self.compress, self.beta, self.causal = dim, compress, beta, causal
        self.relative_phase = relative_phase
        self.spectrum = Spectrum(n_fft, hop, mirror and not causal)
        self.grad_checkpointing = False
        unit: Any = {"causal": causal, **dd}
        self.lift = MapUnit(MapConv(2, dim, **dd), dim, **unit)
        self.encoder = DenseConvs(dim, **unit)
        self.squeeze = MapUnit(MapConv(dim, dim, (1, 3), stride=2, **dd), dim, **unit)
        self.blocks = nn.ModuleList(
            TimeFrequencyBlock(dim, self.scan, self.freq_scan, d_state, d_conv, expand, eps, **dd) for _ in range(depth)
        )
        self.mask_convs = DenseConvs(dim, **unit)
        self.mask_widen = WidenFrequency(dim, **dd)
        self.mask_unit = MapUnit(MapConv(dim, 1, **dd), 1, **unit)
        self.mask_out = nn.Linear(1, 1, **dd)
        self.mask_slope = nn.Parameter(torch.ones(n_fft // 2 + 1, **dd))
        self.phase_convs = DenseConvs(dim, **unit)
        self.phase_unit = MapUnit(WidenFrequency(dim, **dd), dim, **unit)
        self.phase_real = nn.Linear(dim, 1, **dd)
        self.phase_imag = nn.Linear(dim, 1, **dd)
        if relative_phase:
            for layer in (self.mask_out, self.phase_real, self.phase_imag):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            nn.init.ones_(self.phase_real.bias)
        name_memories(self)

    def forward(
        self, wave: Tensor, lengths: Sequence[int] | Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Noisy waveforms to clean ones.

        Args:
            wave: `(b, n)`, at `sample_rate`.
            lengths: Samples of each signal of a padded batch; None if all have `n`. Each comes out as if it were alone,
                with zeros behind it.
            cu_seqlens: `(s + 1,)` boundaries of s signals packed into one row, `(1, n)`.

        Returns: `(b, n)`.

        Raises:
            ValueError: another shape, or lengths that do not fit.
        """
        if cu_seqlens is not None:
            return self.packed(wave, lengths, cu_seqlens)
        signal, ends = self.prepare(wave, lengths, self.spectrum.shortest)
        scale: Tensor | float = 1.0
        if not self.causal:
            scale = _loudness(signal, ends)
        spectrum = self.spectrum.analyse(signal * scale, ends)
        steps = None if ends is None else [self.spectrum.frames(n) for n in ends]
        frames = Frames.of(steps, spectrum.shape[1], spectrum.real)
        clean = self.spectrum.synthesise(self.enhance(spectrum, frames), signal.shape[1], ends)
        return self.restore(clean / scale, wave, lengths)

    def enhance(self, spectrum: Tensor, frames: Frames) -> Tensor:
        """Noisy spectra `(b, t, f)`, complex, to clean ones."""
        magnitude, phase = self.network(spectrum.abs().pow(self.compress), spectrum.angle(), frames)
        return torch.polar(magnitude.pow(1 / self.compress), phase)

    def network(self, magnitude: Tensor, phase: Tensor, frames: Frames | None = None) -> tuple[Tensor, Tensor]:
        """Compressed magnitudes and phases of noisy speech, `(b, t, f)` each, to those of clean speech."""
        frames = frames or Frames()
        x = torch.stack([magnitude, phase], dim=-1).to(self.mask_slope.dtype)
        x = self.squeeze(self.encoder(self.lift(frames.cut(x), frames), frames), frames)
        for block in self.blocks:
            recompute = self.grad_checkpointing and frames.state is None
            x = checkpoint(block, x, frames) if recompute else block(x, frames)  # type: ignore[assignment]
        mask = self.mask_unit(self.mask_widen(self.mask_convs(x, frames)), frames)
        mask = self.beta * torch.sigmoid(self.mask_slope * self.mask_out(mask)[..., 0])
        y = self.phase_unit(self.phase_convs(x, frames), frames)
        angle = torch.atan2(self.phase_imag(y)[..., 0].float(), self.phase_real(y)[..., 0].float())
        return mask.to(magnitude.dtype) * magnitude, angle + phase if self.relative_phase else angle

    def init_state(self, batch: int) -> dict[str, Tensor]:
        """The memory of a stream before its first sample, for `step`.

        Args:
            batch: Signals at once.

        Raises:
            ValueError: the model is not causal.
        """
        self._needs_causal()
        return SpectrumStream(self.spectrum).start(batch, self.mask_slope)

    @torch.no_grad()
    def step(self, chunk: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The next samples of a stream.

        Args:
            chunk: `(b, n)`, any n >= 1.
            state: From `init_state` or the step before; not changed.

        Returns:
            The clean samples that are final now, `(b, n')`, and the new state. All outputs, with that of `finish`, are
            what `forward` makes of the whole signal.
        """
        self._needs_causal()
        if len(chunk) != len(state["input"]):
            raise ValueError(f"chunk has {len(chunk)} signals, but the state is of {len(state['input'])}")
        state = dict(state)
        stream = SpectrumStream(self.spectrum)
        spectrum = stream.take(state, chunk)
        if spectrum is None:
            return chunk[:, :0], state
        return stream.give(state, self.enhance(spectrum, Frames(state=state))).to(chunk.dtype), state

    def finish(self, state: dict[str, Tensor]) -> Tensor:
        """The samples of a stream that were still to come, `(b, n)`, followed by less than `hop` samples of nothing."""
        end = state["input"].new_zeros(len(state["input"]), self.spectrum.n_fft // 2)
        out, state = self.step(end, state)
        return torch.cat([out, SpectrumStream(self.spectrum).rest(state).to(out.dtype)], dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _needs_causal(self) -> None:
        if not self.causal:
            raise ValueError("this model looks at the whole signal; only one built with causal=True can be streamed")


def _loudness(signal: Tensor, ends: list[int] | None) -> Tensor:
    """What brings each signal to a mean square of 1: `(b, 1)`."""
    # Row by row where lengths differ: a sum with other rounding could change the sign of a phase of pi.
    rows = [signal] if ends is None else [row[None, :n] for row, n in zip(signal, ends, strict=True)]
    return torch.cat([(row.shape[1] / row.square().sum(1, keepdim=True).clamp_min(_QUIET)).sqrt() for row in rows])


def _transposed(weight: Tensor) -> Tensor:
    """A linear layer's weight from that of a transposed convolution of one tap, `(in, out, 1)`."""
    return weight.squeeze(-1).T


def _flat(weight: Tensor) -> Tensor:
    """A linear layer's weight from that of a 1x1 convolution."""
    return weight.flatten(1)


_UNIT = {r"0\.weight": "conv.conv.weight", r"0\.bias": "conv.conv.bias", r"1\.": "norm.", r"2\.weight": "slope.weight"}


def _unit_keys(published: str, ours: str) -> list[Key]:
    return [Key(f"^{published}{leaf}", f"{ours}{name}") for leaf, name in _UNIT.items()]


KEYS = [
    *_unit_keys(r"dense_encoder\.dense_conv_1\.", "lift."),
    *_unit_keys(r"dense_encoder\.dense_conv_2\.", "squeeze."),
    *_unit_keys(r"dense_encoder\.dense_block\.dense_block\.(\d)\.", r"encoder.units.\1."),
    *_unit_keys(r"(mask|phase)_decoder\.dense_block\.dense_block\.(\d)\.", r"\1_convs.units.\2."),
    *parallel_keys(r"^TSMamba\.(\d+)\.time_mamba\.", r"blocks.\1.time."),
    *parallel_keys(r"^TSMamba\.(\d+)\.freq_mamba\.", r"blocks.\1.freq."),
    Key(r"^TSMamba\.(\d+)\.tlinear\.weight$", r"blocks.\1.time_out.weight", convert=_transposed),
    Key(r"^TSMamba\.(\d+)\.tlinear\.bias$", r"blocks.\1.time_out.bias"),
    Key(r"^TSMamba\.(\d+)\.flinear\.weight$", r"blocks.\1.freq_out.weight", convert=_transposed),
    Key(r"^TSMamba\.(\d+)\.flinear\.bias$", r"blocks.\1.freq_out.bias"),
    Key(r"^mask_decoder\.mask_conv\.0\.", "mask_widen.conv."),
    Key(r"^mask_decoder\.mask_conv\.1\.", "mask_unit.conv.conv."),
    Key(r"^mask_decoder\.mask_conv\.2\.", "mask_unit.norm."),
    Key(r"^mask_decoder\.mask_conv\.3\.", "mask_unit.slope."),
    Key(r"^mask_decoder\.mask_conv\.4\.weight$", "mask_out.weight", convert=_flat),
    Key(r"^mask_decoder\.mask_conv\.4\.bias$", "mask_out.bias"),
    Key(r"^mask_decoder\.lsigmoid\.slope$", "mask_slope", convert=lambda slope: slope.squeeze(-1)),
    Key(r"^phase_decoder\.phase_conv\.0\.", "phase_unit.conv.conv."),
    Key(r"^phase_decoder\.phase_conv\.1\.", "phase_unit.norm."),
    Key(r"^phase_decoder\.phase_conv\.2\.", "phase_unit.slope."),
    Key(r"^phase_decoder\.phase_conv_r\.weight$", "phase_real.weight", convert=_flat),
    Key(r"^phase_decoder\.phase_conv_r\.bias$", "phase_real.bias"),
    Key(r"^phase_decoder\.phase_conv_i\.weight$", "phase_imag.weight", convert=_flat),
    Key(r"^phase_decoder\.phase_conv_i\.bias$", "phase_imag.bias"),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    return rename(state_dict, KEYS)


_SOURCE = "RoyChao19477/SEMamba@750ff5d8f0e1 models/generator.py"
_FILES = "https://github.com/RoyChao19477/SEMamba/raw/main/ckpts"


def _build(name: str, pretrained: bool, **kwargs: Any) -> SEMamba:
    return build_model(SEMamba, name, pretrained, checkpoint_filter_fn, **kwargs)


@register(
    Card(
        "audio",
        _SOURCE,
        "MIT",
        "2405.06573",
        2_258_769,
        checkpoint="SEMamba_advanced.pth",
        url=f"{_FILES}/SEMamba_advanced.pth",
        notes="Speech enhancement at 16 kHz. Published PESQ 3.55 on VoiceBank-DEMAND; vd.pth, trained on "
        "VCTK-DEMAND and DNS-2020, 3.56 and 3.66.",
    ),
    tag="vbd",
    others={"vctk_dns": {"url": f"{_FILES}/vd.pth"}},
    num_classes=-1,
    input_size=None,
)
def semamba(pretrained: bool = False, **kwargs: Any) -> SEMamba:
    """SEMamba: 2.3 M parameters, 16 kHz, PESQ 3.55 on VoiceBank-DEMAND (paper)."""
    return _build("semamba", pretrained, **kwargs)


@register(
    Card(
        "audio",
        "mamba_zoo",
        "Apache-2.0",
        "2405.06573",
        notes="Not published: 8 kHz, for training in minutes.",
    ),
    num_classes=-1,
    input_size=None,
)
def semamba_mini(pretrained: bool = False, **kwargs: Any) -> SEMamba:
    """A small SEMamba of our own at 8 kHz: width 16, two blocks, frames of 32 ms every 16 ms."""
    args = {
        "sample_rate": 8000,
        "n_fft": 256,
        "hop": 128,
        "dim": 16,
        "depth": 2,
        "d_state": 8,
        "expand": 2,
        "mirror": False,
        "relative_phase": True,
        **kwargs,
    }
    return _build("semamba_mini", pretrained, **args)

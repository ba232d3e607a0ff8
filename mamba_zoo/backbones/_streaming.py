"""Models that take signals: lengths, memories by name, and streams in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._decay import undecayed


class Waveforms(nn.Module):
    """What models from waveforms to waveforms share.

    Args:
        sample_rate: Samples per second.

    Attributes:
        sample_rate: The same.
    """

    blocks: nn.ModuleList

    def __init__(self, sample_rate: int):
        super().__init__()
        self.sample_rate = sample_rate

    def prepare(
        self, wave: Tensor, lengths: Sequence[int] | Tensor | None, shortest: int
    ) -> tuple[Tensor, list[int] | None]:
        """The batch in float32 at least, zero after the end of each signal, none shorter than `shortest` samples.

        Returns:
            `(b, n)`, and the samples of each signal or None if all have `n`.

        Raises:
            TypeError: samples that are no floating-point numbers.
            ValueError: another shape, or lengths that do not fit.
        """
        if wave.dim() != 2 or 0 in wave.shape:
            raise ValueError(
                f"waveforms must be (b, n) with at least one sample, not {tuple(wave.shape)}; one channel a row"
            )
        if not wave.is_floating_point():
            raise TypeError(
                f"waveforms must be floating-point numbers, not {wave.dtype}; divide integers by their range"
            )
        wave = wave.to(torch.promote_types(wave.dtype, torch.float32))
        ends = None if lengths is None else check_lengths(lengths, *wave.shape)
        if ends is not None:
            stops = torch.tensor(ends, device=wave.device)[:, None]
            wave = torch.where(torch.arange(wave.shape[1], device=wave.device) < stops, wave, 0)
        if wave.shape[1] < shortest:
            wave = F.pad(wave, (0, shortest - wave.shape[1]))
        return wave, None if ends is None else [max(n, shortest) for n in ends]

    def restore(self, out: Tensor, wave: Tensor, lengths: Sequence[int] | Tensor | None) -> Tensor:
        """`out (b, ..., n')` with the samples and the dtype of `wave (b, n)`, zero after the end of each signal."""
        out = out[..., : wave.shape[1]].to(wave.dtype)
        if lengths is None:
            return out
        stops = torch.tensor(check_lengths(lengths, *wave.shape), device=wave.device)
        stops = stops.view(-1, *[1] * (out.dim() - 1))
        return torch.where(torch.arange(out.shape[-1], device=out.device) < stops, out, 0)

    def packed(self, wave: Tensor, lengths: Sequence[int] | Tensor | None, cu_seqlens: Tensor) -> Tensor:
        """`forward` of signals one after another in one row `(1, n)`, as a padded batch: `(1, ..., n)`.

        Args:
            wave: The row.
            lengths: None; `cu_seqlens` takes its place.
            cu_seqlens: `(s + 1,)` boundaries of s signals, from 0 to n.

        Raises:
            ValueError: boundaries that do not fit, or lengths beside them.
        """
        if lengths is not None:
            raise ValueError("give lengths of a padded batch or cu_seqlens of a packed one, not both")
        sizes = cu_seqlens.diff().tolist()
        if wave.dim() != 2 or len(wave) != 1 or int(cu_seqlens[0]) or min(sizes) < 1 or sum(sizes) != wave.shape[1]:
            raise ValueError(
                f"cu_seqlens must rise from 0 to n of one row (1, n), not {cu_seqlens.tolist()[:6]} for waveforms of "
                f"{tuple(wave.shape)}"
            )
        out = self(nn.utils.rnn.pad_sequence(list(wave[0].split(sizes)), batch_first=True), sizes)
        return torch.cat([row[..., :n] for row, n in zip(out, sizes, strict=True)], dim=-1)[None]

    def at_rate(self, wave: Tensor, sample_rate: int) -> Tensor:
        """`forward` for a waveform `(b, n)` of another rate: resampled before, and back after.

        Raises:
            ImportError: the rates differ and torchaudio is not there.
        """
        if sample_rate == self.sample_rate:
            return self(wave)
        there = self(resample(wave, sample_rate, self.sample_rate))
        back = resample(there, self.sample_rate, sample_rate)[..., : wave.shape[-1]]
        return F.pad(back, (0, wave.shape[-1] - back.shape[-1]))

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^lift|^encoder|^squeeze|^embed", "blocks": [(r"^blocks\.(\d+)", None), (r".*", (99999,))]}


def check_lengths(lengths: Sequence[int] | Tensor, batch: int, samples: int) -> list[int]:
    """Lengths as plain numbers.

    Raises:
        ValueError: not one for each signal, or outside 1..`samples`.
    """
    ends = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if len(ends) != batch or min(ends) < 1 or max(ends) > samples:
        raise ValueError(f"lengths={ends} must hold one number from 1 to {samples} for each of {batch} signals")
    return ends


def resample(wave: Tensor, old: int, new: int) -> Tensor:
    """A signal `(..., n)` at another rate, `(..., ceil(n * new / old))`.

    Raises:
        ImportError: torchaudio is not there.
    """
    if old == new:
        return wave
    try:
        from torchaudio.functional import resample as resampled
    except ImportError as error:
        raise ImportError("resampling needs torchaudio; install it with: pip install 'mamba_zoo[audio]'") from error
    return resampled(wave, old, new)


def name_memories(model: nn.Module) -> None:
    """Tell every layer that has a memory in streams under which name it keeps it: its own."""
    for name, module in model.named_modules():
        if hasattr(type(module), "name"):
            module.name = name  # type: ignore[assignment]


def stream(model: Any, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Run a causal model over a signal that comes in chunks; memory does not grow with its length.

    Args:
        model: With `init_state`, and `step` or, for models of tokens, `extend`.
        chunks: Waveforms `(b, n)`, or tokens `(b, l, d)`; those of no sample or token are passed over.

    Returns:
        The output, in chunks; together they are what the model makes of the whole signal.

    Raises:
        TypeError: the model has no memory to stream with.
        ValueError: it has one, but was built to look ahead.

    Example:
        >>> import mamba_zoo
        >>> model = mamba_zoo.create_model("mamba", dim=4).eval()
        >>> x = torch.randn(1, 10, 4)
        >>> whole = torch.cat(list(stream(model, x.split(3, dim=1))), dim=1)
        >>> torch.allclose(whole, model(x), atol=1e-6)
        True
    """
    advance = getattr(model, "extend", None) or getattr(model, "step", None)
    if advance is None or not hasattr(model, "init_state"):
        raise TypeError(
            f"{type(model).__name__} cannot be streamed: it has no init_state with extend or step; causal models have, "
            "such as 'mamba_sequence', or 'semamba_mini' with causal=True"
        )
    model.init_state(1)  # a model that looks ahead refuses here, not at the first chunk
    return _outputs(model, advance, chunks)


def _outputs(model: Any, advance: Callable[..., Any], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    state: Any = None
    total = out = 0
    for chunk in chunks:
        if chunk.shape[1] == 0:
            continue
        if state is None:
            state = model.init_state(len(chunk))
        with torch.no_grad():
            y, state = advance(chunk, state)
        total, out = total + chunk.shape[1], out + y.shape[-1 if chunk.dim() == 2 else 1]
        if y.shape[1]:
            yield y
    if state is not None and hasattr(model, "finish"):
        rest = model.finish(state)[..., : total - out]
        if rest.shape[-1]:
            yield rest

"""`mamba-zoo predict` for speech: what a model makes of recordings, as wav files and spectrograms."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mamba_zoo.backbones import stream

from .result_names import name_results
from .sound_files import (
    list_sounds,
    read_sound,
    resample,
    resample_blocks,
    sound_blocks,
    sound_writer,
    write_sound,
)
from .speech_figures import plot_spectrograms

if TYPE_CHECKING:
    from .speech import SpeechTask

_DRAWN = 60.0  # seconds of a recording that was read in chunks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    parser.add_argument(
        "--chunk-seconds",
        type=float,
        default=10.0,
        help="length of the pieces in which a causal model reads and writes, so that memory does not grow with the "
        "recording (default: 10); other models read a recording whole",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write no spectrograms")


def predict_sounds(model: SpeechTask, args: argparse.Namespace) -> str:
    """Write what becomes of every recording as wav files at its own rate, and spectrograms of before and after.

    Raises:
        ValueError: `chunk_seconds` not above 0.
        BadSoundError: a file that cannot be read.
        FileNotFoundError: no such file or folder.
    """
    if args.chunk_seconds <= 0:
        raise ValueError(f"chunk_seconds={args.chunk_seconds} must be above 0")
    paths = [args.data] if args.data.is_file() else list_sounds(args.data)
    out = args.out or Path("predictions")
    device = "cuda" if args.device in ("auto", "gpu") and torch.cuda.is_available() else "cpu"
    net: Any = model.inference_net.to(device).eval()
    for path, called in zip(paths, name_results(paths, args.data), strict=True):
        stem = out / called
        names = {name: stem.with_name(f"{stem.name}-{name}.wav") for name in model.voice_names()}
        if getattr(net, "causal", False):
            (name, target), *_ = names.items()
            drawn, rate = enhance_in_chunks(net, path, target, args.chunk_seconds)
            signals = dict(zip(("input", name), drawn, strict=True))
        else:
            signals, rate = _whole(net, path, names, model.sample_rate)
        if not args.no_pictures:
            plot_spectrograms(signals, rate, stem.with_name(f"{stem.name}.png"))
    pictures = "" if args.no_pictures else " and their spectrograms"
    many = "s" * (len(paths) > 1)
    return f"{len(paths):,} recording{many} -> {out}: {', '.join(model.voice_names())}{pictures}"


@torch.no_grad()
def _whole(net: Any, path: Path, names: dict[str, Path], own: int) -> tuple[dict[str, np.ndarray], int]:
    samples, rate = read_sound(path)
    wave = torch.from_numpy(resample(samples, rate, own))[None]
    results = net(wave.to(next(net.parameters()).device)).cpu().view(len(names), -1)
    signals = {"input": samples}
    for (name, target), signal in zip(names.items(), results.numpy(), strict=True):
        back = resample(signal, own, rate)[: len(samples)]
        signals[name] = np.pad(back, (0, len(samples) - len(back)))
        write_sound(target, signals[name], rate)
    return signals, rate


def enhance_in_chunks(
    net: Any, source: Path, target: Path, seconds: float = 10.0
) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Write what a causal model of one voice makes of a recording, in memory that does not grow with its length.

    The file is read, resampled, enhanced, resampled back and written piece by piece; without soundfile it is read
    whole.

    Args:
        net: With `init_state`, `step` and `sample_rate`.
        source: A sound file.
        target: The wav file to write, at the rate of `source` and as long.
        seconds: Length of a piece.

    Returns:
        The first minute before and after, `(n,)` each, and the rate.

    Raises:
        BadSoundError: the file cannot be read.
    """
    device = next(net.parameters()).device
    blocks = sound_blocks(source, seconds)
    rate, first, _ = next(blocks)
    most, total, written = round(_DRAWN * rate), 0, 0
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []

    def keep(kept: list[np.ndarray], samples: np.ndarray) -> None:
        room = most - sum(map(len, kept))
        if room > 0:
            kept.append(samples[:room].copy())

    def read() -> Iterator[np.ndarray]:
        nonlocal total
        for samples in chain([first], (samples for _, samples, _ in blocks)):
            total += len(samples)
            keep(before, samples)
            yield samples

    def tensors() -> Iterator[Tensor]:
        for samples in resample_blocks(read(), rate, net.sample_rate):
            if len(samples):
                yield torch.from_numpy(samples)[None].to(device)

    enhanced = (y[0].cpu().numpy() for y in stream(net, tensors()))
    with sound_writer(target, rate) as write:
        for samples in resample_blocks(enhanced, net.sample_rate, rate):
            piece = samples[: total - written]
            write(piece)
            keep(after, piece)
            written += len(piece)
        rest = np.zeros(total - written, np.float32)
        write(rest)
        keep(after, rest)
    return (np.concatenate(before), np.concatenate(after)), rate

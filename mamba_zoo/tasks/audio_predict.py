"""`mamba-zoo predict` for sound: the classes of files as CSV, window by window where they are long."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._classifier import write_classes
from .audio_data import collate
from .result_names import name_results
from .running import write_csv
from .sound_files import BadSoundError, list_sounds, resample, sound_blocks

if TYPE_CHECKING:
    from .audio_classification import AudioClassifier

_TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    parser.add_argument("--top", type=int, default=_TOP, help=f"classes to list for each file (default: {_TOP})")
    parser.add_argument("--windows", type=Path, help="also write the class of every window into this CSV file")
    parser.add_argument("--pictures", type=Path, help="also draw the spectrogram of every file into this folder")
    parser.add_argument(
        "--on-bad-file", choices=("error", "skip"), default="error", help="what an unreadable file does"
    )


def predict_csv(model: AudioClassifier, args: argparse.Namespace) -> str:
    """Write the likeliest classes of each sound file, by default into `predictions.csv`.

    Raises:
        ValueError: `top` below 1.
        BadSoundError: a file that cannot be read, or none that can.
        FileNotFoundError: no such file or folder.
    """
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    out = args.out or Path("predictions.csv")
    paths = [args.data] if args.data.is_file() else list_sounds(args.data)
    model = model.to(_device(args.device))
    kept, found, rows, skipped = [], [], [], []
    for path, called in zip(paths, name_results(paths, args.data), strict=True):
        try:
            places, probabilities = predict_windows(model, path, args.batch_size)
        except BadSoundError:
            if args.on_bad_file == "error":
                raise
            skipped.append(path)
            continue
        kept.append(path)
        found.append(probabilities.mean(0))
        for (start, end), scores in zip(places, probabilities, strict=True):
            best = int(scores.argmax())
            rows.append(
                {
                    "file": str(path), "start": f"{start:.3f}", "end": f"{end:.3f}",
                    "predicted": model.class_names[best], "probability": f"{float(scores[best]):.6f}",
                }
            )  # fmt: skip
        if args.pictures:
            from .audio_figures import plot_recording

            picture = args.pictures / called.with_name(f"{called.name}.png")
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot_recording(model, path, picture)
    if not kept:
        raise BadSoundError(f"none of the {len(skipped)} files of {args.data} can be read")
    write_classes(out, kept, torch.stack(found), model.class_names, args.top)
    if args.windows:
        write_csv(args.windows, rows)
    left_out = f"; {len(skipped)} unreadable files left out, the first is {skipped[0]}" if skipped else ""
    return f"{len(kept):,} recording{'s' * (len(kept) > 1)} -> {out}{left_out}"


@torch.inference_mode()
def predict_windows(
    model: AudioClassifier, path: Path, batch_size: int = 64, overlap: float = 0.5
) -> tuple[list[tuple[float, float]], Tensor]:
    """Class probabilities of every window of a file, in constant memory however long it is.

    Windows are as long as the recordings that the model was trained on.

    Args:
        model: From `AudioClassifier.from_checkpoint`.
        path: A sound file.
        batch_size: Windows at a time.
        overlap: Part of a window that the next one shares with it.

    Returns:
        Beginning and end of each window in seconds, and probabilities `(windows, classes)`, float32 on the CPU.

    Raises:
        BadSoundError: the file cannot be read.
    """
    front: Any = model.front_end
    seconds = front.frames * front.frame_shift / 1000
    places, found, batch = [], [], []

    def run() -> None:
        waves, lengths, _ = collate([(wave, 0) for wave in batch])
        found.append(model.predict_step((waves.to(model.device), lengths.to(model.device)), 0).float().cpu())
        batch.clear()

    for start, samples in windows(path, front.sample_rate, seconds, overlap):
        places.append((start, start + len(samples) / front.sample_rate))
        batch.append(torch.from_numpy(samples))
        if len(batch) == batch_size:
            run()
    if batch:
        run()
    return places, torch.cat(found)


def windows(path: Path, sample_rate: int, seconds: float, overlap: float = 0.5) -> Iterator[tuple[float, np.ndarray]]:
    """Overlapping windows of a file at `sample_rate`: where each begins in seconds, and its samples `(n,)`.

    With soundfile a file is read window by window. A last piece that was seen already is left out.

    Args:
        path: A sound file.
        sample_rate: Samples per second of the windows.
        seconds: Length of a window.
        overlap: Part of a window that the next one shares with it, at least 0 and below 1.

    Raises:
        ValueError: `overlap` out of range.
        BadSoundError: the file cannot be read, or is empty.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must be at least 0 and below 1")
    start = 0.0
    for rate, samples, shared in sound_blocks(path, seconds, overlap):
        if start and len(samples) <= shared:
            return
        yield start, resample(samples, rate, sample_rate)
        start += (round(seconds * rate) - shared) / rate


def _device(name: str) -> torch.device:
    if name == "gpu" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu" if name == "auto" else name)

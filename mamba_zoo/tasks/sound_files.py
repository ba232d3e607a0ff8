"""Reading and writing sound without ffmpeg: soundfile where it is there, SciPy for wav files otherwise."""

from __future__ import annotations

import math
import warnings
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")


class BadSoundError(ValueError):
    """A file that cannot be read as sound."""


def list_sounds(root: Path) -> list[Path]:
    """Every sound file below a folder, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no sound.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no file or folder {root}")
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.relative_to(root).parts)
    )
    if not found:
        raise ValueError(f"{root} holds no sound; looked for {', '.join(SUFFIXES)}")
    return found


def read_sound(path: Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Samples `(n,)` float32, within -1..1 for files of integers, and their rate; channels are averaged.

    Args:
        path: A file.
        sample_rate: Rate to resample to; None keeps the file's own.

    Raises:
        FileNotFoundError: no such file.
        BadSoundError: it cannot be read, or is empty.
        ImportError: a file that is no wav, and soundfile is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sound file {path}")
    samples, rate = _read(path)
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not len(samples):
        raise BadSoundError(f"{path} holds no samples")
    samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise BadSoundError(f"{path} holds samples that are not finite")
    return (samples, rate) if sample_rate is None else (resample(samples, rate, sample_rate), sample_rate)


def write_sound(path: Path, samples: Any, sample_rate: int) -> None:
    """Write samples `(n,)` as a wav file of 16 bits, scaled down only if they would clip."""
    values = np.asarray(samples, dtype=np.float64)
    values = values / max(1.0, float(np.abs(values).max(initial=0.0)))
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.round(values * 32767).astype(np.int16)
    try:
        import soundfile
    except ImportError:
        from scipy.io import wavfile

        wavfile.write(path, sample_rate, data)
    else:
        soundfile.write(path, data, sample_rate, subtype="PCM_16")


def sound_blocks(path: Path, seconds: float, overlap: float = 0.0) -> Iterator[tuple[int, np.ndarray, int]]:
    """A file in pieces, of which soundfile holds one at a time in memory.

    Args:
        path: A sound file.
        seconds: Length of a piece.
        overlap: Part of a piece that the next one shares with it.

    Yields: The rate of the file, the samples `(n,)` of the piece, float32 with the channels averaged, and how many the
        next piece shares with it.

    Raises:
        FileNotFoundError: no such file.
        BadSoundError: the file cannot be read, or is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sound file {path}")
    try:
        import soundfile
    except ImportError:
        samples, rate = read_sound(path)
        size = max(1, round(seconds * rate))
        shared = round(size * overlap)
        for start in range(0, len(samples), size - shared):
            yield rate, samples[start : start + size], shared
        return
    try:
        with soundfile.SoundFile(path) as file:
            if not file.frames:
                raise BadSoundError(f"{path} holds no samples")
            size = max(1, round(seconds * file.samplerate))
            shared = round(size * overlap)
            for block in file.blocks(size, shared, dtype="float32"):
                mono = block.mean(1) if block.ndim == 2 else block
                if not np.isfinite(mono).all():
                    raise BadSoundError(f"{path} holds samples that are not finite")
                yield file.samplerate, np.ascontiguousarray(mono, dtype=np.float32), shared
    except soundfile.SoundFileError as error:
        raise BadSoundError(f"{path} cannot be read as sound: {error}") from error


@contextmanager
def sound_writer(path: Path, sample_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends samples `(n,)` to a wav file of 16 bits; what is beyond -1..1 is clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)

        def write(samples: np.ndarray) -> None:
            file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())

        yield write


def resample(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Samples `(n,)` at another rate, `(ceil(n * new / old),)`, by a polyphase filter."""
    if old == new:
        return samples
    from scipy.signal import resample_poly

    factor = math.gcd(old, new)
    return resample_poly(samples, new // factor, old // factor).astype(np.float32)


def resample_blocks(blocks: Iterable[np.ndarray], old: int, new: int) -> Iterator[np.ndarray]:
    """What `resample` makes of a signal that comes in blocks, a few of which are held at a time."""
    if old == new:
        yield from blocks
        return
    factor = math.gcd(old, new)
    up, down = new // factor, old // factor
    # The filter reaches 10 * max(up, down) steps of the common multiple of the rates to either side.
    margin = -(-(10 * max(up, down) // up + 2) // down) * down
    held, before = np.zeros(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        done = before + max(0, (len(held) - before - margin) // down * down)
        if done > before:
            yield resample(held[: done + margin], old, new)[before // down * up : done // down * up]
            left = min(margin, done)
            held, before = held[done - left :], left
    if len(held) > before:
        yield resample(held, old, new)[before // down * up :]


def common_root(paths: Sequence[Path]) -> Path:
    """The folder that holds all files."""
    first = paths[0].parent
    return next(p for p in (first, *first.parents) if all(path.is_relative_to(p) for path in paths))


def _read(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        if path.suffix.lower() != ".wav":
            raise ImportError(
                f"reading {path.suffix} files needs soundfile; install it with: pip install 'mamba_zoo[audio]'"
            ) from None
        return _read_wav(path)
    try:
        return soundfile.read(path, dtype="float32")
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise BadSoundError(f"{path} cannot be read as sound: {error}") from error


def _read_wav(path: Path) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no samples
            rate, data = wavfile.read(path)
    except (ValueError, EOFError, OSError) as error:
        raise BadSoundError(f"{path} cannot be read as sound: {error}") from error
    if data.dtype.kind == "f":
        return data.astype(np.float32), rate
    if data.dtype == np.uint8:
        return (data.astype(np.float32) - 128) / 128, rate
    return (data / -float(np.iinfo(data.dtype).min)).astype(np.float32), rate

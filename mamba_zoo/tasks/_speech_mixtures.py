"""Recordings of single voices, and mixtures made of them: with noise, or with one another."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sound_files import read_sound
from .speech_synthesis import NOISES, synthetic_noise, synthetic_voice

_CACHE = 2**30  # bytes of decoded sound that are kept
_PARTS = {"train": 0, "val": 1, "test": 2}
_SYNTHETIC_SPEAKERS, _SYNTHETIC_PIECES = 12, 10


class Recordings:
    """Voices, read when they are needed and then kept.

    Args:
        paths: Files.
        speakers: Who speaks in each.
        sample_rate: Rate to resample to.
    """

    def __init__(self, paths: Sequence[Path], speakers: Sequence[str], sample_rate: int):
        self.paths, self.sample_rate = list(paths), sample_rate
        self.by_speaker: dict[str, list[int]] = {}
        for i, speaker in enumerate(speakers):
            self.by_speaker.setdefault(speaker, []).append(i)
        self.names = sorted(self.by_speaker)
        self._known: dict[int, np.ndarray] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray:
        """Recording `i`, `(n,)`."""
        found = self._known.get(i)
        if found is None:
            found = self.load(i)
            if self._bytes + found.nbytes <= _CACHE:
                self._known[i], self._bytes = found, self._bytes + found.nbytes
        return found

    def load(self, i: int) -> np.ndarray:
        """Recording `i` from its file."""
        return read_sound(self.paths[i], self.sample_rate)[0]

    def warm(self) -> None:
        """Read everything if it is small, so that processes that are started now need not read it again and again."""
        if sum(path.stat().st_size for path in self.paths if path.exists()) < _CACHE / 4:
            for i in range(len(self)):
                self.read(i)

    def speak(self, speaker: str, samples: int, rng: np.random.Generator) -> np.ndarray:
        """So many samples of a speaker: recordings drawn at random, with short pauses between, cut at random."""
        mine = self.by_speaker[speaker]
        parts, made = [], 0
        while made < samples:
            parts += [
                self.read(mine[rng.integers(len(mine))]),
                np.zeros(int(rng.uniform(0.02, 0.15) * self.sample_rate), np.float32),
            ]
            made += len(parts[-2]) + len(parts[-1])
        joined = np.concatenate(parts)
        start = int(rng.integers(len(joined) - samples + 1))
        return joined[start : start + samples]


class SyntheticRecordings(Recordings):
    """Voices made by arithmetic; see `speech_synthesis`. The pieces of the three parts differ, the speakers do not.

    Args:
        part: "train", "val" or "test".
        sample_rate: Samples per second.
    """

    def __init__(self, part: str, sample_rate: int):
        speakers = [f"voice{s}" for s in range(_SYNTHETIC_SPEAKERS) for _ in range(_SYNTHETIC_PIECES)]
        super().__init__([Path(f"{part}-{i}") for i in range(len(speakers))], speakers, sample_rate)
        self.part = part

    def load(self, i: int) -> np.ndarray:
        """Recording `i`."""
        speaker, piece = divmod(i, _SYNTHETIC_PIECES)
        return synthetic_voice(speaker, 1.5, self.sample_rate, _PARTS[self.part] * _SYNTHETIC_PIECES + piece)


class Mixtures(Dataset):
    """Mixtures of fixed length: `(mixture (n,), voices (s, n))`, float32.

    Training mixtures are new every time they are read, from torch's generator, which the run seeds for every epoch;
    the others are the same on every machine.

    Args:
        part: "train", "val" or "test".
        length: Mixtures.
        seed: Of the validation and test mixtures.
        make: Makes a mixture from a generator.
    """

    def __init__(self, part: str, length: int, seed: int, make: Callable[[np.random.Generator], Any]):
        self.part, self.length, self.seed, self.make = part, length, seed, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        if self.part == "train":
            drawn = int(torch.randint(2**62, ()))
            rng = np.random.default_rng([drawn, i])
        else:
            rng = np.random.default_rng([self.seed, _PARTS[self.part], i])
        mixture, voices = self.make(rng)
        return torch.from_numpy(mixture), torch.from_numpy(voices)


class NoisyVoice:
    """Makes one voice and noise of a random kind at a random signal-to-noise ratio.

    Args:
        voices: Clean recordings.
        samples: Length.
        low: Lowest ratio in dB.
        high: Highest.
        noises: Recordings of noise; None makes noise by arithmetic, and babble out of other voices.
    """

    def __init__(self, voices: Recordings, samples: int, low: float, high: float, noises: Recordings | None = None):
        self.voices, self.samples, self.low, self.high, self.noises = voices, samples, low, high, noises

    def __call__(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`(n,)` and `(1, n)`."""
        speaker = self.voices.names[rng.integers(len(self.voices.names))]
        clean = level(self.voices.speak(speaker, self.samples, rng))
        noise = level(self._noise(speaker, rng)) * 10 ** (-rng.uniform(self.low, self.high) / 20)
        return (clean + noise).astype(np.float32), clean[None]

    def _noise(self, speaker: str, rng: np.random.Generator) -> np.ndarray:
        if self.noises is not None:
            return self.noises.speak(self.noises.names[0], self.samples, rng)
        others = [name for name in self.voices.names if name != speaker]
        kind = int(rng.integers(len(NOISES) + (len(others) > 1)))
        if kind < len(NOISES):
            return synthetic_noise(NOISES[kind], self.samples, self.voices.sample_rate, rng)
        return np.sum(
            [level(self.voices.speak(others[rng.integers(len(others))], self.samples, rng)) for _ in range(5)], 0
        )


class MixedVoices:
    """Makes a mixture of different speakers, the first up to `spread` dB louder or softer than each other.

    Args:
        voices: Clean recordings.
        samples: Length.
        sources: Speakers in a mixture.
        spread: Largest difference in dB.
    """

    def __init__(self, voices: Recordings, samples: int, sources: int, spread: float):
        self.voices, self.samples, self.sources, self.spread = voices, samples, sources, spread

    def __call__(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`(n,)` and `(sources, n)`."""
        chosen = rng.permutation(len(self.voices.names))[: self.sources]
        said = [level(self.voices.speak(self.voices.names[i], self.samples, rng)) for i in chosen]
        gains = [1.0, *(10 ** (rng.uniform(-self.spread, self.spread) / 20) for _ in said[1:])]
        voices = np.stack([gain * voice for gain, voice in zip(gains, said, strict=True)]).astype(np.float32)
        return voices.sum(0), voices


class Pairs(Dataset):
    """Recordings of the same in noise and without, by their names: `(noisy (n,), clean (1, n))`.

    Args:
        pairs: Noisy and clean file of each.
        sample_rate: Rate to resample to.
        samples: Cut a random part of this length, filled up with zeros, as training needs it; None takes all.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], sample_rate: int, samples: int | None = None):
        self.pairs, self.sample_rate, self.samples = list(pairs), sample_rate, samples

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noisy, clean = (read_sound(path, self.sample_rate)[0] for path in self.pairs[i])
        if abs(len(noisy) - len(clean)) > 0.05 * self.sample_rate:
            raise ValueError(f"{self.pairs[i][0]} and {self.pairs[i][1]} differ in length; they are no pair")
        n = min(len(noisy), len(clean))
        both = torch.from_numpy(np.stack([noisy[:n], clean[:n]]))
        if self.samples is not None:
            start = int(torch.randint(max(n - self.samples, 0) + 1, ()))
            both = both[:, start : start + self.samples]
            both = torch.nn.functional.pad(both, (0, self.samples - both.shape[1]))
        return both[0], both[1:]


def level(signal: np.ndarray) -> np.ndarray:
    """The signal with a deviation of 0.1; silence stays silence."""
    return (0.1 * signal / max(float(np.sqrt(np.mean(np.square(signal)))), 1e-5)).astype(np.float32)


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtures `(b, n)`, voices `(b, s, n)` and lengths `(b,)`, filled up with zeros to the longest."""
    lengths = torch.tensor([len(mixture) for mixture, _ in items])
    n = int(lengths.max())
    pad = torch.nn.functional.pad
    mixtures = torch.stack([pad(mixture, (0, n - len(mixture))) for mixture, _ in items])
    return mixtures, torch.stack([pad(voices, (0, n - voices.shape[-1])) for _, voices in items]), lengths


def speakers_of(paths: Sequence[Path], root: Path, pattern: str | None) -> list[str]:
    """Who speaks in each file: group "speaker" of `pattern` in its path below `root`, else the folder it is in.

    Raises:
        ValueError: a pattern that does not parse, has no such group, or does not match a path.
    """
    if pattern is None:
        return [str(path.parent.relative_to(root)) for path in paths]
    try:
        found = [(path, re.search(pattern, path.relative_to(root).as_posix())) for path in paths]
        if missing := [path for path, match in found if match is None]:
            raise ValueError(f"speaker_pattern={pattern!r} does not match {missing[0]}")
        return [match["speaker"] for _, match in found if match is not None]
    except (re.error, IndexError) as error:
        raise ValueError(f"speaker_pattern={pattern!r} needs a group (?P<speaker>...): {error}") from None


def split_paths(
    paths: Sequence[Path], root: Path, test_pattern: str | None, val_pattern: str | None, seed: int
) -> dict[str, list[Path]]:
    """Files of each part: those whose path matches its pattern; without one, a tenth of the others, drawn by name.

    Raises:
        ValueError: a part without files.
    """
    names = {path: path.relative_to(root).as_posix() for path in paths}
    left = sorted(paths, key=lambda path: (zlib.crc32(f"{seed}:{names[path]}".encode()), names[path]))
    tenth = max(1, len(left) // 10)
    parts: dict[str, list[Path]] = {}
    matched = {"test": test_pattern, "val": val_pattern}
    for part in sorted(matched, key=lambda part: matched[part] is None):  # patterns choose first
        pattern = matched[part]
        parts[part] = left[:tenth] if pattern is None else [path for path in left if re.search(pattern, names[path])]
        taken = set(parts[part])
        left = [path for path in left if path not in taken]
    parts = {part: sorted(found) for part, found in {"train": left, **parts}.items()}
    if empty := [part for part, files in parts.items() if not files]:
        raise ValueError(f"no file of {root} is left for {', '.join(empty)}; give more files, or other patterns")
    return parts

"""Speech in noise and speech in speech: pairs of files, or mixtures made of clean recordings."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from ._data import TaskData
from ._speech_mixtures import (
    MixedVoices,
    Mixtures,
    NoisyVoice,
    Pairs,
    Recordings,
    SyntheticRecordings,
    collate,
    speakers_of,
    split_paths,
)
from .sound_files import list_sounds

SYNTHETIC = "synthetic"


class SpeechData(TaskData):
    """Mixtures of voices; see its two kinds.

    Args:
        root: "synthetic" for voices made by arithmetic, which need no recording and are no speech, or a folder of clean
            recordings.
        sample_rate: Samples per second; files of other rates are resampled.
        seconds: Length of a mixture.
        train_mixtures: Training mixtures in an epoch, new ones every time.
        val_mixtures: Validation mixtures, always the same.
        test_mixtures: Test mixtures, always the same.
        speaker_pattern: Regular expression with a group "speaker", searched in the path of a file below `root`; None
            takes the folder of a file for its speaker.
        test_pattern: Regular expression, searched likewise, for the recordings of the test mixtures; None draws a tenth
            of all files by their names.
        val_pattern: The same for validation.
        split_seed: Of that draw, and of the validation and test mixtures.
        batch_size: Mixtures a step and device.
        num_workers: Processes that make mixtures; 0 makes them in the training process.

    Raises:
        ValueError: a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {"sample_rate": "sample_rate"}
    collate = staticmethod(collate)  # type: ignore[assignment]

    def __init__(
        self,
        root: str = SYNTHETIC,
        sample_rate: int = 8000,
        seconds: float = 2.0,
        train_mixtures: int = 1000,
        val_mixtures: int = 100,
        test_mixtures: int = 200,
        speaker_pattern: str | None = None,
        test_pattern: str | None = None,
        val_pattern: str | None = None,
        split_seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        counts = {"train": train_mixtures, "val": val_mixtures, "test": test_mixtures}
        if min(counts.values()) < 1 or seconds <= 0 or sample_rate < 1:
            raise ValueError(
                f"every number of mixtures {counts}, seconds={seconds} and sample_rate={sample_rate} must be positive"
            )
        self.sample_rate, self.samples, self.counts = sample_rate, round(seconds * sample_rate), counts
        self.speaker_pattern, self.test_pattern, self.val_pattern = speaker_pattern, test_pattern, val_pattern
        self.split_seed = split_seed

    def maker(self, part: str, voices: Recordings) -> Callable[..., Any]:
        """What makes the mixtures of a part from its recordings."""
        raise NotImplementedError

    def parts(self) -> dict[str, Dataset]:
        """Mixtures of recordings that no other part uses."""
        voices = self.recordings(self.root, self.speaker_pattern, self.test_pattern, self.val_pattern)
        if self.num_workers:
            for found in voices.values():
                found.warm()
        return {
            part: Mixtures(part, self.counts[part], self.split_seed, self.maker(part, found))
            for part, found in voices.items()
        }

    def recordings(
        self, root: str, speaker_pattern: str | None, test_pattern: str | None = None, val_pattern: str | None = None
    ) -> dict[str, Recordings]:
        """The recordings of each part.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: no sound in it, or a part without any.
        """
        if root == SYNTHETIC:
            return {part: SyntheticRecordings(part, self.sample_rate) for part in self.counts}
        folder = Path(root).expanduser()
        files = split_paths(list_sounds(folder), folder, test_pattern, val_pattern, self.split_seed)
        return {
            part: Recordings(paths, speakers_of(paths, folder, speaker_pattern), self.sample_rate)
            for part, paths in files.items()
        }


class EnhancementData(SpeechData):
    """Speech in noise.

    Where the folder holds `clean` and `noisy` with files of the same names, or `train`, `val` and `test` (or `train`
    and `test`) with these two in each, the pairs are used as they are, and validation takes a tenth of the training
    pairs where it has no folder of its own. Otherwise its recordings are clean, and noise is added to them.

    Args:
        root: "synthetic", or a folder of pairs or of clean recordings.
        noise: "synthetic" for white and pink noise, hum, bursts, and babble of other voices; or a folder of recordings.
        snr_low: Lowest signal-to-noise ratio in dB of the mixtures that are made.
        snr_high: Highest.
        sample_rate: See `SpeechData`, as for all that follow.
        seconds: See `SpeechData`.
        train_mixtures: See `SpeechData`.
        val_mixtures: See `SpeechData`.
        test_mixtures: See `SpeechData`.
        speaker_pattern: See `SpeechData`.
        test_pattern: See `SpeechData`.
        val_pattern: See `SpeechData`.
        split_seed: See `SpeechData`.
        batch_size: See `SpeechData`.
        num_workers: See `SpeechData`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        root: str = SYNTHETIC,
        noise: str = SYNTHETIC,
        snr_low: float = -2.5,
        snr_high: float = 10.0,
        sample_rate: int = 8000,
        seconds: float = 2.0,
        train_mixtures: int = 1000,
        val_mixtures: int = 100,
        test_mixtures: int = 200,
        speaker_pattern: str | None = None,
        test_pattern: str | None = None,
        val_pattern: str | None = None,
        split_seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        if snr_low > snr_high:
            raise ValueError(f"snr_low={snr_low} is above snr_high={snr_high}")
        super().__init__(
            root, sample_rate, seconds, train_mixtures, val_mixtures, test_mixtures,
            speaker_pattern, test_pattern, val_pattern, split_seed, batch_size, num_workers,
        )  # fmt: skip
        self.noise, self.snr = noise, (snr_low, snr_high)
        self._noises: dict[str, Recordings] | None = None
        self.save_hyperparameters(logger=False)

    def parts(self) -> dict[str, Dataset]:
        """Pairs as they are, or mixtures."""
        if self.root == SYNTHETIC or not (pairs := find_pairs(Path(self.root).expanduser(), self.split_seed)):
            self._noises = None if self.noise == SYNTHETIC else self.recordings(self.noise, "(?P<speaker>)")
            return super().parts()
        return {
            part: Pairs(files, self.sample_rate, self.samples if part == "train" else None)
            for part, files in pairs.items()
        }

    def maker(self, part: str, voices: Recordings) -> Callable[..., Any]:
        """One voice in noise."""
        noises = None if self._noises is None else self._noises[part]
        return NoisyVoice(voices, self.samples, *self.snr, noises)


class SeparationData(SpeechData):
    """Voices that speak at the same time.

    Args:
        root: "synthetic" for voices made by arithmetic, or a folder of clean recordings.
        sources: Voices in a mixture, all of different speakers.
        spread: Largest difference of level between them, in dB.
        sample_rate: See `SpeechData`, as for all that follow.
        seconds: See `SpeechData`.
        train_mixtures: See `SpeechData`.
        val_mixtures: See `SpeechData`.
        test_mixtures: See `SpeechData`.
        speaker_pattern: See `SpeechData`.
        test_pattern: See `SpeechData`.
        val_pattern: See `SpeechData`.
        split_seed: See `SpeechData`.
        batch_size: See `SpeechData`.
        num_workers: See `SpeechData`.

    Raises:
        ValueError: a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {"sample_rate": "sample_rate", "sources": "sources"}

    def __init__(
        self,
        root: str = SYNTHETIC,
        sources: int = 2,
        spread: float = 2.5,
        sample_rate: int = 8000,
        seconds: float = 2.0,
        train_mixtures: int = 1000,
        val_mixtures: int = 100,
        test_mixtures: int = 200,
        speaker_pattern: str | None = None,
        test_pattern: str | None = None,
        val_pattern: str | None = None,
        split_seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        if not 2 <= sources <= 5 or spread < 0:
            raise ValueError(f"sources={sources} must be from 2 to 5 and spread={spread} at least 0")
        super().__init__(
            root, sample_rate, seconds, train_mixtures, val_mixtures, test_mixtures,
            speaker_pattern, test_pattern, val_pattern, split_seed, batch_size, num_workers,
        )  # fmt: skip
        self.sources, self.spread = sources, spread
        self.save_hyperparameters(logger=False)

    def maker(self, part: str, voices: Recordings) -> Callable[..., Any]:
        """Several voices."""
        if len(voices.names) < self.sources:
            raise ValueError(
                f"{self.root} has {len(voices.names)} speakers for {part}, but sources={self.sources}; give a folder "
                "per speaker, or speaker_pattern= that finds the speaker in a file name"
            )
        return MixedVoices(voices, self.samples, self.sources, self.spread)


def find_pairs(root: Path, seed: int) -> dict[str, list[tuple[Path, Path]]] | None:
    """Noisy and clean files of each part, by name; None if the folder is not laid out so.

    Raises:
        ValueError: a noisy file without its clean one, or the other way round.
    """
    whole = _pairs_in(root)
    if whole is not None:
        files = split_paths([noisy for noisy, _ in whole], root, None, None, seed)
        return {part: [pair for pair in whole if pair[0] in set(names)] for part, names in files.items()}
    found = {part: pairs for part in ("train", "val", "test") if (pairs := _pairs_in(root / part)) is not None}
    if not {"train", "test"} <= set(found):
        return None
    if "val" not in found:
        every = found["train"]
        kept = _tenth([noisy for noisy, _ in every], root, seed)
        found["val"] = [pair for pair in every if pair[0] in kept]
        found["train"] = [pair for pair in every if pair[0] not in kept]
    return found


def _tenth(paths: list[Path], root: Path, seed: int) -> set[Path]:
    """A tenth of the files, at least one, drawn by name."""
    ranked = sorted(paths, key=lambda path: zlib.crc32(f"{seed}:{path.relative_to(root)}".encode()))
    return set(ranked[: max(1, len(ranked) // 10)])


def _pairs_in(folder: Path) -> list[tuple[Path, Path]] | None:
    noisy, clean = folder / "noisy", folder / "clean"
    if not (noisy.is_dir() and clean.is_dir()):
        return None
    by_name = [{path.relative_to(side).with_suffix(""): path for path in list_sounds(side)} for side in (noisy, clean)]
    if odd := sorted(set(by_name[0]) ^ set(by_name[1])):
        raise ValueError(f"{folder}: {odd[0]} is not in both of noisy and clean")
    return [(by_name[0][name], by_name[1][name]) for name in sorted(by_name[0])]

"""Recordings to name or to tag: read, split, kept in memory, and made into padded batches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..backbones._fbank import FRONT_ENDS, front_end, mel_statistics
from ._data import TaskData
from .audio_sources import TONES, Recording, classes_of, find_recordings
from .image_files import stratified_split
from .sound_files import read_sound

_STATISTICS_FROM = 500  # recordings


class Recordings(Dataset):
    """Recordings of one part: samples `(n,)` and a class number, or 0 or 1 for each class `(classes,)`.

    Args:
        recordings: What they are.
        targets: One for each.
        sample_rate: Rate they are brought to.
        samples: Longest; of a longer recording comes its beginning.
        keep: Keep every recording in memory once it was read.
        anywhere: Of a longer recording comes another part every time.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        targets: Sequence[Any],
        sample_rate: int,
        samples: int,
        keep: bool = True,
        anywhere: bool = False,
    ) -> None:
        self.recordings, self.targets = list(recordings), list(targets)
        self.sample_rate, self.samples, self.anywhere = sample_rate, samples, anywhere
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        wave = self.wave(i)
        spare = len(wave) - self.samples
        start = int(torch.randint(spare + 1, ())) if self.anywhere and spare > 0 else 0
        return wave[start : start + self.samples], self.targets[i]

    def wave(self, i: int) -> Tensor:
        """Samples of the whole recording `i`, `(n,)`."""
        if self._kept is not None and i in self._kept:
            return self._kept[i]
        source = self.recordings[i].source
        samples = read_sound(source, self.sample_rate)[0] if isinstance(source, Path) else source
        wave = torch.from_numpy(np.ascontiguousarray(samples))
        if self._kept is not None:
            self._kept[i] = wave
        return wave


def collate(items: list[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms `(b, n)` padded with zeros, their lengths `(b,)`, and targets `(b,)` or `(b, classes)`."""
    waves, targets = zip(*items, strict=True)
    lengths = torch.tensor([len(wave) for wave in waves])
    return pad_sequence(list(waves), batch_first=True), lengths, torch.as_tensor(np.array(targets))


class AudioData(TaskData):
    """Training, validation and test recordings, each with one label.

    Args:
        root: "tones", synthetic sounds that need no file; a folder with one folder of sound files for each class, or
            `train/`, `val/` and `test/` with such; a CSV file with the columns path (below its own folder), label, and
            if wanted split and speaker; the Speech Commands as torchaudio unpacks them; or the Free Spoken Digits.
        layout: "folders", "csv", "speechcommands" or "fsdd"; "auto" finds out.
        sample_rate: In Hz; files of other rates are resampled.
        seconds: Length that recordings are padded or cut to, for the model.
        mel_bins: Bands of the spectrograms.
        frame_length: Of a frame of the spectrograms, in milliseconds.
        frame_shift: Between frames, in milliseconds.
        normalise: "data" measures mean and deviation of the spectrograms of the training recordings; the name of a
            data set, such as "audioset" or "speechcommands", takes those of the published weights.
        test_speaker: Test on all recordings of this speaker, and train on none: its own way to split.
        val_fraction: Part of the training recordings set apart where the source has no validation split.
        test_fraction: Likewise for a test split.
        split_seed: Of the automatic split.
        batch_size: Recordings a step and device.
        num_workers: Processes that read recordings; 0 reads them in the training process.
        keep: Keep recordings in memory once they were read.

    Raises:
        FileNotFoundError: a missing file or folder.
        ValueError: a setting out of range, an unknown speaker, or classes that a split lacks.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "num_classes": "num_classes", "class_names": "classes", "front_end": "front_end",
    }  # fmt: skip
    collate: ClassVar[Callable[[list[Any]], Any] | None] = staticmethod(collate)
    tagged: ClassVar[bool] = False

    def __init__(
        self,
        root: str = TONES,
        layout: Literal["auto", "folders", "csv", "speechcommands", "fsdd"] = "auto",
        sample_rate: int = 16000,
        seconds: float = 1.0,
        mel_bins: int = 128,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        normalise: str = "data",
        test_speaker: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        keep: bool = True,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if seconds <= 0 or sample_rate < 1 or mel_bins < 1 or frame_length <= 0 or frame_shift <= 0:
            raise ValueError(
                f"seconds={seconds}, sample_rate={sample_rate}, mel_bins={mel_bins}, frame_length={frame_length} and "
                f"frame_shift={frame_shift} must be positive"
            )
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 0.5:
                raise ValueError(f"{name}={value} must lie between 0 and 0.5")
        if normalise != "data" and normalise not in FRONT_ENDS:
            raise ValueError(f"normalise={normalise!r} is unknown; choose data, {', '.join(FRONT_ENDS)}")
        self.save_hyperparameters(logger=False)
        self.layout, self.sample_rate, self.seconds, self.normalise = layout, sample_rate, seconds, normalise
        self.test_speaker, self.val_fraction, self.test_fraction = test_speaker, val_fraction, test_fraction
        self.split_seed, self.keep = split_seed, keep
        frames = max(1, round(seconds * 1000 / frame_shift))
        self.spectrogram: dict[str, Any] = {
            "sample_rate": sample_rate, "mel_bins": mel_bins, "frames": frames, "frame_length": frame_length,
            "frame_shift": frame_shift,
        }  # fmt: skip
        self._classes: list[str] = []
        self._front_end: dict[str, Any] | None = None
        self._recordings: list[Recording] = []

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        self.setup()
        return self._classes

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def front_end(self) -> dict[str, Any]:
        """Settings of the model's front end, mean and deviation among them."""
        if self._front_end is None:
            if self.normalise == "data":
                train = self.split("train")
                chosen = np.random.default_rng(0).permutation(len(train))[:_STATISTICS_FROM]
                waves = [train.wave(int(i)) for i in np.sort(chosen)]
                mean, std = mel_statistics(front_end(self.spectrogram), waves, self.sample_rate)
                statistics = {"mean": round(mean, 4), "std": round(std, 4)}
            else:
                statistics = {key: FRONT_ENDS[self.normalise][key] for key in ("mean", "std")}
            self._front_end = {**self.spectrogram, **statistics}
        return self._front_end

    def parts(self) -> dict[str, Dataset]:
        """List and split the recordings."""
        groups = self._grouped(self.recordings())
        return {name: self._part(group, name == "train") for name, group in groups.items()}

    def adopt(self, model: Any) -> None:
        """Take mean and deviation of the spectrograms from the model; who is tested on is for the training data."""
        super().adopt(model)
        self._front_end = {**model.hparams["front_end"], **self.spectrogram}
        self.test_speaker = None

    def undivided(self) -> bool:
        """Unless folders or a list say which recording is of which part."""
        return not any(recording.split for recording in self.recordings())

    def everything(self, model: Any) -> Dataset:
        """All recordings."""
        return self._part(self.recordings(), anywhere=False)

    def recordings(self) -> list[Recording]:
        """All recordings, listed once."""
        if not self._recordings:
            self._recordings = find_recordings(self.root, self.layout, self.sample_rate)
            self._classes = classes_of(self._recordings, self.tagged)
        return self._recordings

    def _part(self, group: Sequence[Recording], anywhere: bool) -> Recordings:
        samples = round(self.seconds * self.sample_rate)
        return Recordings(group, [self.target(r) for r in group], self.sample_rate, samples, self.keep, anywhere)

    def target(self, recording: Recording) -> Any:
        """The class number of a recording."""
        return self._classes.index(recording.labels[0])

    def _grouped(self, recordings: list[Recording]) -> dict[str, list[Recording]]:
        if self.test_speaker is not None:
            speakers = sorted({r.speaker for r in recordings})
            if speakers == [""]:
                raise ValueError(
                    f"test_speaker={self.test_speaker!r}: {self.root} does not say who speaks; give a CSV file with "
                    "the columns path, label and speaker"
                )
            if self.test_speaker not in speakers:
                raise ValueError(f"test_speaker={self.test_speaker!r} is none of {', '.join(speakers)}")
            recordings = [
                dataclasses.replace(r, split="test" if r.speaker == self.test_speaker else "train") for r in recordings
            ]
        groups = {name: [r for r in recordings if r.split == name] for name in ("train", "val", "test")}
        groups["train"] += [r for r in recordings if not r.split]
        if not groups["train"]:
            raise ValueError(f"{self.root} has no recordings to train on")
        sizes = {"test": self.test_fraction, "val": self.val_fraction}
        missing = {name: size for name, size in sizes.items() if not groups[name]}
        if missing:
            train = groups["train"]
            # Tagged recordings have no one class to keep the shares of.
            strata = [0] * len(train) if self.tagged else [self.target(r) for r in train]
            number, count = min(Counter(strata).items(), key=lambda found: found[1])
            if count <= len(missing):
                of_class = "" if self.tagged else f" of class {self._classes[number]!r}"
                raise ValueError(
                    f"{self.root} has {count} recording{'s' * (count > 1)}{of_class} to divide among train "
                    f"and {' and '.join(missing)}; add some, or give folders train, val and test or a CSV file with a "
                    "column split"
                )
            found = self.divided(
                [recording.source for recording in train],
                lambda: dict(
                    zip(
                        ("train", *missing),
                        stratified_split(strata, list(missing.values()), self.split_seed),
                        strict=True,
                    )
                ),
            )
            groups |= {name: [train[i] for i in index] for name, index in found.items()}
        return groups


class TaggingData(AudioData):
    """Recordings with any number of labels each; in a CSV file, `label` holds them with semicolons between.

    Arguments are those of `AudioData`.
    """

    tagged: ClassVar[bool] = True

    def target(self, recording: Recording) -> Any:
        """0 or 1 for each class, `(classes,)`."""
        target = np.zeros(len(self._classes), dtype=np.int64)
        target[[self._classes.index(label) for label in recording.labels]] = 1
        return target

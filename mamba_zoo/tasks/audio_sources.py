"""Where labelled recordings come from: folders, a CSV file, Speech Commands, spoken digits, or arithmetic."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .sound_files import list_sounds

SPLITS = ("train", "val", "test")
TONES = "tones"
_DIGIT = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)\.wav")
# Version 2 of Speech Commands keeps recordings without a word here.
_BACKGROUND = "_background_noise_"


@dataclass(frozen=True)
class Recording:
    """One labelled recording.

    Attributes:
        source: A file, or samples `(n,)` float32 at the rate of the data set.
        labels: Names of what it holds; one unless recordings are tagged.
        speaker: Who or what was recorded, for splits by speaker; "" is unknown.
        split: "train", "val", "test", or "" where the source does not say.
    """

    source: Path | np.ndarray
    labels: tuple[str, ...]
    speaker: str = ""
    split: str = ""


def find_recordings(root: str, layout: str = "auto", sample_rate: int = 16000) -> list[Recording]:
    """All recordings of a source, in a fixed order.

    Args:
        root: "tones", a CSV file, or a folder.
        layout: "folders": one folder a class, or `train/`, `val/` and `test/` with such; "csv"; "speechcommands": as
            torchaudio unpacks it; "fsdd": files `DIGIT_SPEAKER_TAKE.wav`; "auto" finds out.
        sample_rate: Of recordings made by arithmetic.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: an unknown layout, or a source that does not follow it.
    """
    if root == TONES:
        return tones(sample_rate)
    path = Path(root).expanduser()
    readers = {"csv": _manifest, "speechcommands": _speech_commands, "fsdd": _digits, "folders": _folders}
    if layout != "auto" and layout not in readers:
        raise ValueError(f"layout={layout!r} is unknown; choose auto, {', '.join(readers)}")
    if not path.exists():
        raise FileNotFoundError(f"no folder or CSV file {path}")
    found = readers[_layout(path) if layout == "auto" else layout](path)
    if not found:
        raise ValueError(f"{path} holds no labelled recordings")
    return found


def tones(sample_rate: int, per_class: int = 60, seconds: float = 0.6) -> list[Recording]:
    """Six kinds of synthetic sound, so that everything can be tried without a recording.

    Steady tones, rising and falling chirps, tones whose loudness or pitch wavers, and clicks; pitch, loudness, length,
    phase and noise vary. Sounds made by arithmetic, easier than any real ones. Four "instruments" of other pitch and
    overtones take the place of speakers. The same on every machine.

    Args:
        sample_rate: Samples per second.
        per_class: Sounds of each kind.
        seconds: Longest sound.
    """
    kinds = ("steady", "rising", "falling", "tremolo", "vibrato", "clicks")
    return [
        Recording(_tone(kind, i, sample_rate, seconds), (kind,), f"instrument{i % 4}")
        for kind in kinds
        for i in range(per_class)
    ]


def _tone(kind: str, index: int, rate: int, seconds: float) -> np.ndarray:
    rng = np.random.default_rng([11, sum(map(ord, kind)), index])
    time = np.arange(round(rate * seconds * rng.uniform(0.6, 1.0))) / rate
    pitch = 150 * 2 ** (rng.uniform(0, 2) + 0.3 * (index % 4))
    slope = {"rising": 1.0, "falling": -1.0}.get(kind, 0.0) * rng.uniform(0.8, 1.5) / time[-1]
    rate_of_change = rng.uniform(4, 9)
    wave = np.sin(2 * np.pi * rate_of_change * time + rng.uniform(0, 6))
    hertz = pitch * 2 ** (slope * (time - (time[-1] if slope < 0 else 0) / 2) + (kind == "vibrato") * 0.25 * wave)
    phase = 2 * np.pi * np.cumsum(hertz) / rate + rng.uniform(0, 6)
    overtones = rng.uniform(0.2, 0.8) ** np.arange(1 + index % 4)
    sound = sum(gain * np.sin((i + 1) * phase) for i, gain in enumerate(overtones))
    if kind == "tremolo":
        sound = sound * (0.55 + 0.45 * wave)
    if kind == "clicks":
        every = time * rate_of_change % 1.0
        sound = rng.standard_normal(len(time)) * np.exp(-every * 25)
    sound = sound * rng.uniform(0.1, 0.5) + rng.standard_normal(len(time)) * 10 ** rng.uniform(-3, -1.5)
    return np.clip(sound, -1, 1).astype(np.float32)


def _layout(path: Path) -> str:
    if path.is_file():
        return "csv"
    if _commands_folder(path) is not None:
        return "speechcommands"
    files = sorted(p.name for p in _digits_folder(path).glob("*.wav"))
    return "fsdd" if files and all(map(_DIGIT.fullmatch, files)) else "folders"


def _folders(root: Path) -> list[Recording]:
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if not splits:
        return _classes(root, "")
    if "train" not in splits:
        raise ValueError(f"{root} holds {', '.join(splits)} but no train folder")
    return [recording for name, folder in splits.items() for recording in _classes(folder, name)]


def _classes(folder: Path, split: str) -> list[Recording]:
    names = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no folders; make one for each class, or give a CSV file")
    return [Recording(path, (name.name,), "", split) for name in names for path in list_sounds(name)]


def _manifest(path: Path) -> list[Recording]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if not {"path", "label"} <= columns:
            raise ValueError(f"{path} needs the columns path and label; it has {', '.join(sorted(columns)) or 'none'}")
        rows = list(reader)
    found = []
    for number, row in enumerate(rows, start=2):
        split, sound = (row.get("split") or "").strip(), path.parent / (row["path"] or "")
        if split not in ("", *SPLITS):
            raise ValueError(f"{path}, line {number}: split {split!r} is unknown; use {', '.join(SPLITS)}")
        if not sound.is_file():
            raise FileNotFoundError(f"{path}, line {number}: no file {sound}")
        labels = tuple(label.strip() for label in (row["label"] or "").split(";") if label.strip())
        found.append(Recording(sound, labels, (row.get("speaker") or "").strip(), split))
    return found


def _commands_folder(root: Path) -> Path | None:
    folders = (root, *sorted(root.glob("speech_commands*")), *sorted(root.glob("SpeechCommands/speech_commands*")))
    return next((folder for folder in folders if (folder / "testing_list.txt").is_file()), None)


def _speech_commands(root: Path) -> list[Recording]:
    folder = _commands_folder(root)
    if folder is None:
        raise ValueError(f"{root} holds no Speech Commands: testing_list.txt is missing")
    listed = {}
    for name, split in (("validation_list.txt", "val"), ("testing_list.txt", "test")):
        listed |= dict.fromkeys((folder / name).read_text(encoding="utf-8").split(), split)
    return [
        Recording(
            path,
            (path.parent.name,),
            path.stem.partition("_nohash_")[0],
            listed.get(path.relative_to(folder).as_posix(), "train"),
        )
        for path in list_sounds(folder)
        if path.parent.name != _BACKGROUND
    ]


def _digits_folder(root: Path) -> Path:
    return root / "recordings" if (root / "recordings").is_dir() else root


def _digits(root: Path) -> list[Recording]:
    found = []
    for path in sorted(_digits_folder(root).glob("*.wav")):
        name = _DIGIT.fullmatch(path.name)
        if name is None:
            raise ValueError(f"{path} is not named DIGIT_SPEAKER_TAKE.wav, as the recordings of FSDD are")
        # The first five takes of each speaker are the official test set.
        split = "test" if int(name["take"]) < 5 else "train"
        found.append(Recording(path, (name["digit"],), name["speaker"], split))
    return found


def classes_of(recordings: Sequence[Recording], tagged: bool) -> list[str]:
    """Names of all labels, sorted.

    Raises:
        ValueError: a recording without a label, or with several where each has one; fewer than two classes.
    """
    for recording in recordings:
        if not tagged and len(recording.labels) != 1:
            where = recording.source if isinstance(recording.source, Path) else "a recording"
            if not recording.labels:
                raise ValueError(f"{where} has no label; classification needs one for each recording")
            raise ValueError(
                f"{where} has {len(recording.labels)} labels; classification needs one, use the task audio-tagging"
            )
    names = sorted({label for recording in recordings for label in recording.labels})
    if len(names) < 2:
        raise ValueError(f"there must be at least 2 classes, but the labels are {names}")
    return names

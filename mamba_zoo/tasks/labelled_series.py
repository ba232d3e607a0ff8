"""Series with a class each: the `.ts` files of the UCR and UEA archives, or handwritten digits read row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._data import TaskData
from .series_data import as_is, deviation_of
from .series_files import Labelled, read_ts, sktime_folder

_DIGITS_TEST = 347


class PaddedSeries(Dataset):
    """Series of several lengths in memory, padded with zeros; a batch of them is one indexing.

    Args:
        values: `(items, steps, channels)`.
        lengths: `(items,)`.
        targets: Class numbers `(items,)`.
        noise: Deviation of random values that each reading adds to every value.
        scaling: Deviation of a random factor that each reading multiplies every series with.
        crop: Least part of each series that a reading keeps, cut from anywhere.
    """

    def __init__(
        self,
        values: Tensor,
        lengths: Tensor,
        targets: Tensor,
        noise: float = 0.0,
        scaling: float = 0.0,
        crop: float = 1.0,
    ):
        self.values, self.lengths, self.targets = values, lengths, targets
        self.noise, self.scaling, self.crop = noise, scaling, crop

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One series: see `__getitems__`."""
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch: values `(b, steps, channels)`, class numbers `(b,)`, lengths `(b,)`."""
        at = torch.as_tensor(indices)
        x, lengths = self.values[at], self.lengths[at]
        if self.scaling:
            x = x * (1 + self.scaling * torch.randn(len(x), 1, x.shape[2]))
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        if self.crop < 1:
            kept = (lengths * (self.crop + (1 - self.crop) * torch.rand(len(x)))).round().long().clamp(min=1)
            start = (torch.rand(len(x)) * (lengths - kept + 1)).long()
            index = (start[:, None] + torch.arange(x.shape[1])).clamp(max=x.shape[1] - 1)
            x, lengths = x.gather(1, index[..., None].expand_as(x)), kept
        beyond = torch.arange(x.shape[1]) >= lengths[:, None]
        return x.masked_fill(beyond[..., None], 0.0), self.targets[at], lengths


class LabelledSeries(TaskData):
    """Series with a class each, scaled channel by channel by the training series.

    Missing values become 0, the mean. If no validation part is asked for, the training series validate, which says how
    well they were learned and no more; the last weights are then those to use.

    Args:
        root: "digits", the handwritten digits that come with scikit-learn, 8 steps of 8 channels; "sktime:NAME", a data
            set that comes with sktime, such as `sktime:JapaneseVowels`; or a folder with files `*_TRAIN.ts` and
            `*_TEST.ts`.
        val_fraction: Part of the training series set apart for validation, of every class alike; 0 is none.
        split_seed: Of that split.
        scale: "series" scales every series by its own mean and deviation instead, "none" leaves the values alone.
        noise: See `PaddedSeries`; of training.
        scaling: See `PaddedSeries`; of training.
        crop: See `PaddedSeries`; of training.
        batch_size: Series a step and device.
        num_workers: Processes that read series; they are in memory, so that none is needed.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: series without classes, classes that training does not have, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "num_classes": "num_classes",
        "class_names": "classes",
        "in_chans": "in_chans",
        "seq_len": "seq_len",
        "mean": "mean",
        "deviation": "deviation",
        "scale": "how_scaled",
    }
    measured: ClassVar[tuple[str, ...]] = ("seq_len", "mean", "deviation")
    collate: ClassVar[Callable[[list[Any]], Any] | None] = staticmethod(as_is)

    def __init__(
        self,
        root: str = "digits",
        val_fraction: float = 0.15,
        split_seed: int = 0,
        scale: str = "channels",
        noise: float = 0.0,
        scaling: float = 0.0,
        crop: float = 1.0,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if not 0 <= val_fraction < 0.5 or not 0 < crop <= 1 or noise < 0 or scaling < 0:
            raise ValueError(
                f"val_fraction={val_fraction} must be from 0 to 0.5, crop={crop} above 0 and at most 1, and "
                f"noise={noise} and scaling={scaling} at least 0"
            )
        check_scale(scale)
        self.save_hyperparameters(logger=False)
        self.val_fraction, self.split_seed, self.how_scaled = val_fraction, split_seed, scale
        self.changes = {"noise": noise, "scaling": scaling, "crop": crop}
        self._classes: list[str] = []
        self._told: dict[str, Any] = {}
        self._any_length = False

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
    def in_chans(self) -> int:
        """Channels of the series."""
        self.setup()
        return self._told["in_chans"]

    @property
    def seq_len(self) -> int:
        """Steps of the longest series, to which all are padded."""
        self.setup()
        return self._told["seq_len"]

    @property
    def mean(self) -> list[float]:
        """Mean of each channel of the training series."""
        self.setup()
        return self._told["mean"]

    @property
    def deviation(self) -> list[float]:
        """Deviation of each channel of the training series, 1 for a constant channel."""
        self.setup()
        return self._told["deviation"]

    def parts(self) -> dict[str, Dataset]:
        """Read, scale and pad all series."""
        train, test = read_parts(self.root)
        for part in (train, test):
            if len(part.labels) != len(part.series):
                raise ValueError(f"{part.name} of {self.root} says no classes (@classLabel false)")
        self._classes = train.classes or sorted(set(train.labels))
        if unknown := set(train.labels + test.labels) - set(self._classes):
            raise ValueError(f"{self.root}: class {min(unknown)!r} is not among those of the training series")
        if train.channels != test.channels:
            raise ValueError(f"{self.root}: {train.channels} channels in training series, {test.channels} in others")
        steps = np.concatenate(train.series)
        self._told = {
            "in_chans": train.channels,
            "seq_len": max(len(series) for series in [*train.series, *test.series]),
            "mean": np.nanmean(steps, 0).tolist(),
            "deviation": deviation_of(steps).tolist(),
        }
        longest = self._told["seq_len"]
        self._told |= self.taken
        if longest > self._told["seq_len"]:
            if not self._any_length:
                raise ValueError(
                    f"{self.root} has a series of {longest} steps, but the model was trained on {self._told['seq_len']}"
                    " and reads no more"
                )
            self._told["seq_len"] = longest
        whole, lengths = self._padded(train)
        targets = torch.tensor([self._classes.index(label) for label in train.labels])
        kept, apart = split_classes(targets, self.val_fraction, self.split_seed)
        held = (*self._padded(test), torch.tensor([self._classes.index(label) for label in test.labels]))
        return {
            "train": PaddedSeries(whole[kept], lengths[kept], targets[kept], **self.changes),
            "val": PaddedSeries(whole[apart], lengths[apart], targets[apart]),
            "test": PaddedSeries(*held),
        }

    def adopt(self, model: Any) -> None:
        """Take scales and length from the model; some read series of any length."""
        super().adopt(model)
        self._any_length = bool(getattr(model.net, "takes_lengths", False))

    def _padded(self, part: Labelled) -> tuple[Tensor, Tensor]:
        told = self._told
        return padded(part.series, told["seq_len"], told["mean"], told["deviation"], self.how_scaled)

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """Series, their lengths and channels."""
        lengths = self.split("train").lengths
        shortest, longest = int(lengths.min()), int(lengths.max())
        steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        size = f"{steps} steps of {self.in_chans} channel{'s' * (self.in_chans > 1)}"
        return [*super().describe(unit), ("sizes", f"{size}, {self.num_classes} classes")]


def check_scale(scale: str) -> None:
    """Raise ValueError unless it is one of the known ways."""
    if scale not in ("channels", "series", "none"):
        raise ValueError(f"scale={scale!r} is unknown; choose channels, series or none")


def read_parts(root: str) -> tuple[Labelled, Labelled]:
    """Training and test series of "digits", "sktime:NAME" or a folder; see `LabelledSeries`.

    Raises:
        FileNotFoundError: a folder without the two files.
    """
    if root == "digits":
        return _digits()
    folder = sktime_folder(root.partition(":")[2]) if root.startswith("sktime:") else Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}; series to classify are files *_TRAIN.ts and *_TEST.ts in one"
        )
    found = []
    for part in ("TRAIN", "TEST"):
        files = sorted(folder.glob(f"*_{part}.ts"))
        if len(files) != 1:
            raise FileNotFoundError(f"{root} holds {len(files)} files *_{part}.ts; it needs one")
        found.append(read_ts(files[0]))
    return found[0], found[1]


def _digits() -> tuple[Labelled, Labelled]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    series = list((images.reshape(-1, 8, 8) / 16).astype(np.float32))
    names = [str(label) for label in labels]
    cut, classes = len(series) - _DIGITS_TEST, [str(i) for i in range(10)]
    return (
        Labelled(series[:cut], names[:cut], classes, "digits"),
        Labelled(series[cut:], names[cut:], classes, "digits"),
    )


def padded(
    series: Sequence[np.ndarray], steps: int, mean: Sequence[float], deviation: Sequence[float], scale: str
) -> tuple[Tensor, Tensor]:
    """Series `(l, channels)`, scaled, as one tensor `(items, steps, channels)`, and lengths; longer ones are cut."""
    lengths = torch.tensor([min(len(one), steps) for one in series])
    whole = torch.zeros(len(series), steps, len(mean))
    for i, one in enumerate(series):
        values = torch.from_numpy(one[:steps]).float()
        if scale == "channels":
            values = (values - torch.tensor(mean)) / torch.tensor(deviation)
        elif scale == "series":
            centred = values - values.nanmean(0)
            values = centred / (centred.square().nanmean(0).sqrt() + 1e-8)
        whole[i, : len(values)] = values.nan_to_num()
    return whole, lengths


def split_classes(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to validate on, at least one of each class in either; all for both if `fraction` is 0."""
    if not fraction:
        return torch.arange(len(targets)), torch.arange(len(targets))
    generator, apart = torch.Generator().manual_seed(seed), []
    for number in targets.unique():
        members = (targets == number).nonzero().flatten()
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        apart.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.cat(apart).sort().values
    mask = torch.ones(len(targets), dtype=torch.bool)
    mask[chosen] = False
    return mask.nonzero().flatten(), chosen

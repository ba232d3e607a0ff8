"""Windows of series whose own values are to be found: to fill gaps, and to score how unusual each step is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .series_data import SeriesData
from .series_files import Table, find_table

_LABEL_NAMES = ("label", "labels", "anomaly", "is_anomaly")


class WindowData(SeriesData):
    """Windows of the series in one table; those for validation and test lie side by side in their part.

    Args:
        root: See `SeriesData`, as for all that follow.
        seq_len: Steps of a window.
        columns: Which columns to take; None takes all.
        split: Parts for training, validation and test.
        missing: What a missing value does: "previous" reads the last value before it; no error is ever counted where
            nothing was measured.
        marks: Give the model the time of each step, if it reads them.
        date_column: The column of dates; "none" says that there is none, None finds out.
        batch_size: Windows a step and device.
        num_workers: Processes that cut windows.
    """

    tells: ClassVar[Mapping[str, str]] = {
        key: source for key, source in SeriesData.tells.items() if key not in ("pred_len", "season")
    }
    measured: ClassVar[tuple[str, ...]] = ("mean", "deviation", "correlation")

    def __init__(
        self,
        root: str = "eeg",
        seq_len: int = 96,
        columns: list[str] | None = None,
        split: str = "auto",
        missing: Literal["error", "previous"] = "previous",
        marks: bool = True,
        date_column: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, seq_len, 0, columns, split, missing, None, marks, date_column, batch_size, num_workers)
        self.save_hyperparameters(logger=False)

    def starts(self, name: str, low: int, high: int) -> Tensor:
        """First rows of the windows of a part, whose rows are from `low` to `high`."""
        if name == "train":
            return torch.arange(low, high - self.seq_len + 1)
        return low + side_by_side(high - low, self.seq_len)


class WatchedData(WindowData):
    """The same, beside the true anomalies if the table has them: a column of 0 and 1.

    Windows for validation and test overlap by half, so that what a step is found from lies on both of its sides.

    Args:
        root: See `SeriesData`, as for all that follow.
        seq_len: Steps of a window.
        columns: Which columns to take; None takes all but the labels.
        label_column: Column that says which steps are anomalies, not shown to the model; None looks for one called
            "label" or "anomaly".
        split: Parts for training, validation and test.
        missing: What a missing value does.
        marks: Give the model the time of each step, if it reads them.
        date_column: The column of dates; "none" says that there is none, None finds out.
        batch_size: Windows a step and device.
        num_workers: Processes that cut windows.

    Raises:
        ValueError: labels other than 0 and 1.
    """

    def __init__(
        self,
        root: str = "eeg",
        seq_len: int = 96,
        columns: list[str] | None = None,
        label_column: str | None = None,
        split: str = "auto",
        missing: Literal["error", "previous"] = "previous",
        marks: bool = True,
        date_column: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, seq_len, columns, split, missing, marks, date_column, batch_size, num_workers)
        self.save_hyperparameters(logger=False)
        self.label_column = label_column
        self.labels: np.ndarray | None = None

    def load(self) -> Table:
        """The columns asked for; the labels apart."""
        labels = _LABEL_NAMES if self.label_column is None else (self.label_column.lower(),)
        table = find_table(self.root, self.columns, labels, self.date_column)
        kept, self.labels = without_labels(table, self.label_column)
        return kept if self.columns is None else kept.columns(self.columns)

    def starts(self, name: str, low: int, high: int) -> Tensor:
        """First rows of the windows of a part, whose rows are from `low` to `high`."""
        return super().starts(name, low, high) if name == "train" else low + overlapping(high - low, self.seq_len)

    def windows(self, starts: Tensor) -> Dataset:
        """Windows with their labels, NaN where there are none."""
        rows = len(self._scaled["target"])
        labels = np.full(rows, np.nan) if self.labels is None else self.labels
        return _Labelled(super().windows(starts), torch.from_numpy(labels.astype(np.float32)))


def without_labels(table: Table, label_column: str | None) -> tuple[Table, np.ndarray | None]:
    """The table without its column of labels, and the labels.

    Raises:
        ValueError: no such column, or labels other than 0 and 1.
    """
    name = label_column or next((n for n in table.names if n.lower() in _LABEL_NAMES), None)
    if name is None:
        return table, None
    labels = table.columns([name]).values[:, 0]
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{table.source}: labels in column {name!r} must be 0 or 1, not {labels[:6].tolist()}")
    return table.columns([n for n in table.names if n != name]), labels


class _Labelled(Dataset):
    """Windows, and the label of each of their steps."""

    def __init__(self, windows: Any, labels: Tensor):
        self.windows, self.labels = windows, labels.unfold(0, windows.seq_len, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch of `Windows`, and labels `(b, seq_len)`."""
        batch = self.windows.__getitems__(indices)
        return *batch, self.labels[batch[-1]]


def side_by_side(rows: int, length: int, step: int | None = None) -> Tensor:
    """First rows of windows that together cover all rows, `step` rows apart; None is their length.

    The last one ends at the last row.
    """
    step = step or length
    starts = torch.arange(0, rows - length + 1, step)
    return starts if (rows - length) % step == 0 else torch.cat([starts, torch.tensor([rows - length])])


def overlapping(rows: int, length: int) -> Tensor:
    """The same, half a window apart, so that every row but the first and last is well inside of one."""
    return side_by_side(rows, length, max(1, length // 2))


def laid_together(rows: int, starts: Tensor, parts: Tensor) -> Tensor:
    """What windows `(windows, length, ...)` say of each row `(rows, ...)`: the one that it is furthest inside of.

    The mean of those that it is as far inside of; NaN where there is none.
    """
    place = torch.arange(parts.shape[1], device=parts.device)
    index = (starts[:, None] + place).flatten()
    inside = torch.minimum(place, place.flip(0)).repeat(len(starts))
    most = torch.full((rows,), -1, device=parts.device).scatter_reduce(0, index, inside, "amax")
    chosen = inside == most[index]
    index, flat = index[chosen], parts.flatten(0, 1)[chosen]
    total = flat.new_zeros(rows, *flat.shape[1:]).index_add(0, index, flat)
    count = flat.new_zeros(rows).index_add(0, index, torch.ones_like(index, dtype=flat.dtype))
    return total / count.view(-1, *[1] * (flat.dim() - 1))

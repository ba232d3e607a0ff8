"""Windows of series to forecast, complete or watch: read once, scaled by their training part, cut in whole batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mamba_zoo.scans import correlation_scan

from ._data import TaskData
from .series_dates import time_marks
from .series_files import Table, find_table

_HOURS = 30 * 24  # rows of a month of the ETT data sets


class Windows(Dataset):
    """Windows of a table that is in memory; a batch of them is one indexing.

    Args:
        values: `(rows, v)` float32 without gaps: what models read.
        target: `(rows, v)` float32, NaN where nothing was measured: what they are to find.
        marks: `(rows, m)`, m possibly 0.
        starts: First row of each window.
        seq_len: Steps that models read.
        pred_len: Steps after them; with 0 the target is the window itself.
    """

    def __init__(self, values: Tensor, target: Tensor, marks: Tensor, starts: Tensor, seq_len: int, pred_len: int):
        self.starts, self.seq_len, self.pred_len = starts, seq_len, pred_len
        self.marks = marks.unfold(0, seq_len, 1)
        self.values = values.unfold(0, seq_len, 1)
        self.target = target.unfold(0, pred_len or seq_len, 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One window: see `__getitems__`."""
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch: values `(b, seq_len, v)`, target `(b, pred_len, v)`, marks `(b, seq_len, m)`, first rows `(b,)`."""
        at = self.starts[torch.as_tensor(indices)]
        after = at + self.seq_len if self.pred_len else at
        parts = (self.values[at], self.target[after], self.marks[at])
        return *(part.transpose(1, 2).contiguous() for part in parts), at


def as_is(batch: Any) -> Any:
    """A batch that `__getitems__` made whole."""
    return batch


class SeriesData(TaskData):
    """Windows of the series in one table, split by time: the first part trains, the last one tests.

    All values are scaled by mean and deviation of the training rows. Windows overlap by all but one step, and none is
    left out at validation or test. The steps that a validation or test window reads may lie in the part before.

    Args:
        root: A CSV file with a header and, if it has one, a column of dates; "eeg", 10 seconds of 4 electrodes that
            come with Matplotlib; or "sktime:NAME", such as `sktime:Airline`.
        seq_len: Steps that the model reads.
        pred_len: Steps to forecast.
        columns: Which columns to take; None takes all.
        split: "auto", rows of the published split for files called ETTh and ETTm and else 70/10/20; or parts for
            training, validation and test, in percent or in rows, such as "60/20/20" or "8640/2880/2880".
        missing: What a missing value does: "error" stops, "previous" reads the last value before it. Targets that are
            missing are never counted.
        season: Steps after which the series repeat, for the seasonal reference; None takes a day of hours or minutes, a
            week of days, a year of months or quarters.
        marks: Give the model the time of each step, if there are dates and it reads them.
        date_column: The column of dates; "none" says that there is none, None takes the first one called "date", "time"
            or alike that holds dates, else the first column if it does.
        batch_size: Windows a step and device.
        num_workers: Processes that cut windows; they are cut in memory, so that none is needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a table that is too short, a missing value, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "in_chans": "in_chans",
        "seq_len": "seq_len",
        "pred_len": "pred_len",
        "columns": "column_names",
        "mean": "mean",
        "deviation": "deviation",
        "season": "seasonal_steps",
        "correlation": "correlation",
        "marks": "gives_marks",
    }
    measured: ClassVar[tuple[str, ...]] = ("mean", "deviation", "season", "correlation")
    collate: ClassVar[Callable[[list[Any]], Any] | None] = staticmethod(as_is)

    def __init__(
        self,
        root: str = "eeg",
        seq_len: int = 96,
        pred_len: int = 24,
        columns: list[str] | None = None,
        split: str = "auto",
        missing: Literal["error", "previous"] = "error",
        season: int | None = None,
        marks: bool = True,
        date_column: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if seq_len < 2 or pred_len < 0 or (season is not None and season < 1):
            raise ValueError(f"seq_len={seq_len} must be at least 2, pred_len={pred_len} 0, and season={season} 1")
        _parse_split(split)
        self.save_hyperparameters(logger=False)
        self.seq_len, self.pred_len, self.columns, self.date_column = seq_len, pred_len, columns, date_column
        self.how, self.missing, self.season, self.use_marks = split, missing, season, marks
        self._table: Table | None = None
        self._scaled: dict[str, Any] = {}

    def load(self) -> Table:
        """The columns asked for."""
        table = find_table(self.root, self.columns, None, self.date_column)
        return table if self.columns is None else table.columns(self.columns)

    @property
    def table(self) -> Table:
        """What was read, unscaled."""
        if self._table is None:
            self._table = self.load()
        return self._table

    @property
    def in_chans(self) -> int:
        """Columns."""
        return len(self.column_names)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self.table.names

    @property
    def mean(self) -> list[float]:
        """Mean of each column over the training rows."""
        self.setup()
        return self._scaled["mean"].tolist()

    @property
    def deviation(self) -> list[float]:
        """Deviation of each column over the training rows, 1 for a constant column."""
        self.setup()
        return self._scaled["deviation"].tolist()

    @property
    def correlation(self) -> str:
        """What the scan "correlation" stands for on the training rows."""
        self.setup()
        return correlation_scan(self._scaled["target"][: self._scaled["rows"][0]])

    @property
    def gives_marks(self) -> bool:
        """Whether models are given the time of each step."""
        return self.use_marks and self.table.dates is not None

    @property
    def seasonal_steps(self) -> int:
        """Steps after which the series repeat."""
        return self.season or season_of(self.table.dates)

    def parts(self) -> dict[str, Dataset]:
        """Read the table, scale it, and cut its windows."""
        table = self.table
        rows = split_rows(len(table.values), self.how, Path(self.root).name)
        least = self.seq_len + self.pred_len
        if rows[0] < least or min(rows[1:]) < max(self.pred_len, 1) or (not self.pred_len and min(rows) < self.seq_len):
            steps, smaller = f"{self.seq_len}", "seq_len"
            if self.pred_len:
                steps, smaller = f"{steps} + {self.pred_len}", "seq_len or pred_len,"
            raise ValueError(
                f"{self.root} has {len(table.values)} rows, {'/'.join(map(str, rows))} for training, validation and "
                f"test: too few for windows of {steps} steps; give a smaller {smaller} or another split"
            )
        values = self.check(table)
        train = values[: rows[0]]
        if unknown := np.flatnonzero(np.isnan(train).all(0)).tolist():
            raise ValueError(
                f"{self.root} has no value in column {table.names[unknown[0]]!r} in its {rows[0]:,} training rows; "
                "leave it out with data.columns"
            )
        self._scale(values, np.nanmean(train, 0), deviation_of(train))
        self._scaled["rows"] = rows
        bounds = np.cumsum([0, *rows])
        return {
            name: self.windows(self.starts(name, int(bounds[i]), int(bounds[i + 1])))
            for i, name in enumerate(("train", "val", "test"))
        }

    def adopt(self, model: Any) -> None:
        """Take scales from the model, which is given no time that it was not trained with."""
        super().adopt(model)
        self.use_marks = self.use_marks and bool(model.hparams["marks"])

    def undivided(self) -> bool:
        """Tables have no parts of their own."""
        return True

    def everything(self, model: Any) -> Dataset:
        """Windows over all rows, scaled as the model's training rows were."""
        self.compare(model, other=True)
        values, least = self.check(self.table), self.seq_len + self.pred_len
        if len(values) < least:
            raise ValueError(f"{self.root} has {len(values)} rows, too few for a window of {least} steps")
        self._scale(values, np.array(self.taken["mean"]), np.array(self.taken["deviation"]))
        return self.windows(self.starts("test", self.seq_len if self.pred_len else 0, len(values)))

    def windows(self, starts: Tensor) -> Dataset:
        """The windows of the scaled table that start at these rows."""
        target = self._scaled["target"]
        return Windows(fill_forward(target), target, self._scaled["marks"], starts, self.seq_len, self.pred_len)

    def _scale(self, values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
        target = torch.from_numpy(((values - mean) / deviation).astype(np.float32))
        times = mark_rows(self.table.dates if self.use_marks else None, len(values))
        marks = torch.from_numpy(times).float()
        self._scaled = {"mean": mean, "deviation": deviation, "target": target, "marks": marks}

    def check(self, table: Table) -> np.ndarray:
        """Values of the table; raises ValueError if some are missing and must not be."""
        values = table.values
        gaps = np.isnan(values)
        if self.missing == "error" and gaps.any():
            row, column = np.argwhere(gaps)[0]
            raise ValueError(
                f"{self.root} lacks {gaps.sum():,} of {gaps.size:,} values, the first in column "
                f"{table.names[column]!r}, row {row + 2}; data.missing=previous reads the value before each"
            )
        if empty := [name for name, column in zip(table.names, gaps.T, strict=True) if column.all()]:
            raise ValueError(f"{self.root} has no value in column {empty[0]!r}; leave it out with data.columns")
        return values

    def starts(self, name: str, low: int, high: int) -> Tensor:
        """First rows of the windows of a part, whose rows are from `low` to `high`."""
        first = low if name == "train" else low - self.seq_len
        return torch.arange(first, high - self.seq_len - self.pred_len + 1)

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """Rows and columns of the table, and windows."""
        size = f"{len(self.table.values):,} steps of {self.in_chans} series, {'/'.join(map(str, self._scaled['rows']))}"
        return [("table", size), *super().describe(unit)]


def _parse_split(split: str) -> list[float] | None:
    if split == "auto":
        return None
    parts = [float(part) for part in split.split("/")] if re.fullmatch(r"[\d.]+/[\d.]+/[\d.]+", split) else []
    if len(parts) != 3 or min(parts) <= 0:
        raise ValueError(f"split={split!r} must be 'auto', or three parts such as '70/10/20' or '8640/2880/2880'")
    return parts


def split_rows(rows: int, split: str, name: str) -> tuple[int, int, int]:
    """Rows for training, validation and test.

    Args:
        rows: Of the table.
        split: See `SeriesData`.
        name: Of the file, by which "auto" knows ETTh and ETTm: 12, 4 and 4 months of 30 days, the rest unused.

    Raises:
        ValueError: parts that do not fit.
    """
    parts = _parse_split(split)
    if parts is None:
        if found := re.match(r"ETT([hm])\d", name):
            month = _HOURS if found[1] == "h" else 4 * _HOURS
            parts = [12.0 * month, 4.0 * month, 4.0 * month]
        else:
            parts = [70.0, 10.0, 20.0]
    if abs(sum(parts) - 100) < 1e-6:
        train, test = int(rows * parts[0] / 100), int(rows * parts[2] / 100)
        return train, rows - train - test, test
    if sum(parts) > rows or any(part != int(part) for part in parts):
        raise ValueError(f"split={split!r} must be percent that make 100, or at most the {rows} rows of the table")
    return int(parts[0]), int(parts[1]), int(parts[2])


def mark_rows(dates: np.ndarray | None, rows: int) -> np.ndarray:
    """Marks `(rows, 4)`, or `(rows, 0)` without dates."""
    return np.zeros((rows, 0), np.float32) if dates is None else time_marks(dates)


def season_of(dates: np.ndarray | None) -> int:
    """Steps of a day, of a week if steps are days, of a year if they are months or quarters; 1 where none is known."""
    if dates is None or len(dates) < 3:
        return 1
    gap = int(np.median(np.diff(dates).astype(np.int64)))
    day = 86_400
    if 0 < gap < day and day % gap == 0:
        return day // gap
    if gap == day:
        return 7
    return next((12 // months for months in (1, 3) if 28 * months * day <= gap <= 31 * months * day), 1)


def deviation_of(values: np.ndarray) -> np.ndarray:
    """Deviation of each column of `(rows, v)`, where NaN is missing: `(v,)`, 1 for a column that is constant.

    A column is constant if its values lie no further apart than rounding moves them; the deviation of such a column is
    what rounding left of its mean, and would blow up every later value that is another.
    """
    highest, lowest = np.fmax.reduce(values, 0), np.fmin.reduce(values, 0)
    noise = 16 * np.finfo(values.dtype).eps * np.maximum(np.abs(highest), np.abs(lowest))
    return np.where(highest - lowest > noise, np.nanstd(values, 0), 1.0)


def fill_forward(x: Tensor) -> Tensor:
    """Missing values of `(rows, v)` by the value before; zero, the mean of the training rows, before the first."""
    known = ~x.isnan()
    row = torch.arange(len(x))[:, None].expand_as(x).masked_fill(~known, -1).cummax(0).values
    return torch.where(row < 0, torch.zeros_like(x), x.nan_to_num().gather(0, row.clamp(min=0)))

"""Reading series: CSV files with a date column, and the `.ts` files of the UCR and UEA archives."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_DATE_NAMES = ("date", "datetime", "datetime_gmt", "ds", "month", "period", "quarter", "time", "timestamp")
_DATE = re.compile(
    r"\s*(\d{4})[-/.](\d{1,2})(?:[-/.](\d{1,2}))?(?:[ T](\d{1,2}):(\d{2})(?::(\d{2})(?:\.\d+)?)?)?(?:Z|\+00:?00)?\s*"
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMED = re.compile(rf"\s*(\d{{4}})[- ]?(?:Q([1-4])|({'|'.join(_MONTHS)})[a-z]*)\s*", re.IGNORECASE)
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})


@dataclass
class Table:
    """Several series over the same steps.

    Attributes:
        names: Of the columns.
        values: `(steps, columns)` float64; NaN is missing.
        dates: `(steps,)` datetime64[s], or None if the file has none.
        source: Where it was read.
    """

    names: list[str]
    values: np.ndarray
    dates: np.ndarray | None = None
    source: str = ""

    def columns(self, names: Sequence[str]) -> Table:
        """Some of the columns, in this order.

        Raises:
            ValueError: a column that is not there.
        """
        _check_columns(self.source, self.names, names)
        return Table(list(names), self.values[:, [self.names.index(n) for n in names]], self.dates, self.source)


@dataclass
class Labelled:
    """Series with a class each, of the same or of different lengths.

    Attributes:
        series: Each `(steps, channels)` float32; NaN is missing.
        labels: Name of the class of each; empty if the file has none.
        classes: Names that the file declares, in its order.
        name: Of the data set.
    """

    series: list[np.ndarray]
    labels: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def channels(self) -> int:
        """Channels of every series."""
        return self.series[0].shape[1]


def read_table(path: str | Path, columns: Sequence[str] | None = None, besides: Sequence[str] | None = None) -> Table:
    """Read a CSV file with a header: a column of dates, if there is one, and columns of numbers.

    The dates are the column called "date", "time" or alike, else the first column if it holds dates; they must not
    fall. Lines that start with `#` are left out, and so is a first column without a name that counts the rows. Empty
    cells, "NA", "nan" and "?" are missing.

    Args:
        path: File.
        columns: Which columns to read, so that others may hold anything; None reads all.
        besides: Names, in lower case, of columns that are read as well where the file has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header or no rows, a column that is not there or is there twice, dates that fall, or a cell that
            is neither number, date nor missing; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(line for line in file if not line.startswith("#")) if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from None
    if len(rows) < 2:
        raise ValueError(f"{path} has no rows below its header")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    _check_header(header, path)
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells for {len(header)} columns")
    at = _date_column(header, body[0])
    dates = None if at is None else _dates([row[at] for row in body], path, header[at])
    kept = [i for i in range(len(header)) if i != at and not (i == 0 and not header[0] and _counts(body))]
    if not kept:
        raise ValueError(f"{path} has no column of numbers")
    if columns is not None:
        _check_columns(str(path), [header[i] for i in kept], columns)
        kept = [i for i in kept if header[i] in columns or header[i].lower() in (besides or ())]
    try:
        values = np.array([[row[i] for i in kept] for row in body], dtype=np.float64)
    except ValueError:  # missing cells, or cells that are no numbers
        values = np.array([[_number(row[i], path, n, header[i]) for i in kept] for n, row in enumerate(body, start=2)])
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise ValueError(f"{path}, row {row + 2}: the value in column {header[kept[column]]!r} is infinite")
    return Table([header[i] for i in kept], values, dates, str(path))


def _check_columns(source: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {', '.join(names[:12])}")


def _check_header(header: Sequence[str], path: Path) -> None:
    """Names, each of them once; a first row of numbers is none, but 0, 1, 2 and so on are."""
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path} has {header.count(twice[0])} columns {twice[0]!r}; a name for each is needed")
    counted = [[str(i + start) for i in range(len(header))] for start in (0, 1)]
    if all(_is_number(name) or _date_parts(name) for name in header) and list(header) not in counted:
        raise ValueError(f"{path} has no header: its first row is {', '.join(header[:4])}; put names above the numbers")
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise ValueError(f"{path} has {separator!r} between its columns; it needs commas")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _counts(body: Sequence[Sequence[str]]) -> bool:
    """Whether the first column numbers the rows, as tables often do that were written by a program."""
    first = body[0][0]
    return first.isdigit() and all(row[0] == str(n) for n, row in enumerate(body, start=int(first)))


def _date_column(header: Sequence[str], first: Sequence[str]) -> int | None:
    named = [i for i, name in enumerate(header) if name.lower() in _DATE_NAMES]
    if named:
        return named[0]
    return 0 if _date_parts(first[0]) else None


def _date_parts(text: str) -> list[int] | None:
    """Year, month, day, hour, minute and second; None if the text is no date."""
    if found := _DATE.fullmatch(text):
        return [int(part or default) for part, default in zip(found.groups(), (1, 1, 1, 0, 0, 0), strict=True)]
    if found := _NAMED.fullmatch(text):
        month = 3 * int(found[2]) - 2 if found[2] else _MONTHS.index(found[3].lower()) + 1
        return [int(found[1]), month, 1, 0, 0, 0]
    return None


def _number(text: str, path: Path, row: int, column: str) -> float:
    text = text.strip()
    if text.lower() in _MISSING:
        return float("nan")
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{path}, row {row}: {text!r} in column {column!r} is no number; leave the column out with columns="
        ) from None


def _dates(texts: Sequence[str], path: Path, column: str) -> np.ndarray:
    parts = np.empty((len(texts), 6), dtype=np.int64)
    for i, text in enumerate(texts):
        found = _date_parts(text)
        if found is None:
            raise ValueError(f"{path}, row {i + 2}: {text!r} in column {column!r} is no date such as 2016-07-01 00:00")
        parts[i] = found
    months = ((parts[:, 0] - 1970) * 12 + parts[:, 1] - 1).astype("datetime64[M]")
    seconds = (parts[:, 2] - 1) * 86_400 + parts[:, 3] * 3600 + parts[:, 4] * 60 + parts[:, 5]
    dates = months.astype("datetime64[s]") + seconds.astype("timedelta64[s]")
    falls = np.flatnonzero(np.diff(dates).astype(np.int64) < 0)
    if len(falls):
        raise ValueError(
            f"{path}, row {falls[0] + 3}: {texts[falls[0] + 1]!r} comes after {texts[falls[0]]!r}; sort the rows by "
            f"{column!r}, the oldest first"
        )
    return dates


def time_marks(dates: np.ndarray) -> np.ndarray:
    """Hour of the day, day of the week, of the month and of the year, each from -0.5 to 0.5: `(steps, 4)` float32.

    The marks that S-Mamba's published training gives for hourly data, and for all other data as well.
    """
    days = dates.astype("datetime64[D]")
    hour = (dates - days).astype("timedelta64[h]").astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday; Monday is 0
    of_month = (days - dates.astype("datetime64[M]").astype("datetime64[D]")).astype(np.int64)
    of_year = (days - dates.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    return np.stack([hour / 23, weekday / 6, of_month / 30, of_year / 365], axis=1).astype(np.float32) - 0.5


def later_dates(dates: np.ndarray, steps: int) -> np.ndarray:
    """The dates of the `steps` steps after the last: months and years by the calendar, else by the usual distance."""
    months = dates.astype("datetime64[M]")
    gaps = np.diff(months.astype(np.int64))
    on_days = np.unique((dates - months.astype("datetime64[s]")).astype(np.int64))
    if len(dates) > 2 and len(on_days) == 1 and gaps.min() == gaps.max() > 0:
        offset = np.arange(1, steps + 1) * gaps[0]
        return (months[-1] + offset).astype("datetime64[s]") + on_days.astype("timedelta64[s]")
    gap = np.median(np.diff(dates).astype(np.int64)) if len(dates) > 1 else 1
    return dates[-1] + (np.arange(1, steps + 1) * int(gap)).astype("timedelta64[s]")


def read_ts(path: str | Path) -> Labelled:
    """Read a `.ts` file of the UCR and UEA archives.

    A header of lines that start with `@`, then one series a line: channels separated by `:`, steps by `,`, and after
    the last `:` the class, if `@classLabel` says that there are classes. "?" and "NaN" are missing. Channels of one
    series have the same length; series may differ.

    Args:
        path: File.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a header or a line that does not fit; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found, labelled, started = Labelled([], name=path.stem), False, False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith(("#", "%")):
                continue
            if started:
                _read_line(line, labelled, found, f"{path}, line {number}")
                continue
            key, *rest = line.split()
            key = key.lower()
            if key == "@data":
                started = True
            elif key == "@problemname" and rest:
                found.name = rest[0]
            elif key == "@targetlabel" and rest and rest[0].lower() == "true":
                raise ValueError(f"{path} gives a number for each series (@targetLabel true), and no class")
            elif key == "@classlabel" and rest:
                labelled = rest[0].lower() == "true"
                found.classes = rest[1:] if labelled else []
            elif key == "@timestamps" and rest and rest[0].lower() == "true":
                raise ValueError(f"{path} gives the time of every value (@timeStamps true), which is not read here")
            elif not key.startswith("@"):
                raise ValueError(f"{path}, line {number}: expected a header line or @data, not {line[:40]!r}")
    if not found.series:
        raise ValueError(f"{path} holds no series{'' if started else ': it has no @data line'}")
    return found


def _read_line(line: str, labelled: bool, found: Labelled, where: str) -> None:
    parts = line.split(":")
    label = parts.pop().strip() if labelled else None
    if label is not None and found.classes and label not in found.classes:
        raise ValueError(f"{where}: the class {label!r} is none of {', '.join(found.classes)}")
    try:
        channels = [np.array(part.replace("?", "nan").split(","), dtype=np.float32) for part in parts]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not channels or len({len(channel) for channel in channels}) > 1:
        raise ValueError(f"{where}: channels of {sorted({len(c) for c in channels})} steps; all need the same")
    if found.series and len(channels) != found.channels:
        raise ValueError(f"{where}: {len(channels)} channels, but the series before have {found.channels}")
    found.series.append(np.stack(channels, axis=1))
    if label is not None:
        found.labels.append(label)


def sktime_folder(name: str) -> Path:
    """The folder of a data set that comes with sktime, such as "JapaneseVowels"; sktime itself is not imported.

    Raises:
        ModuleNotFoundError: sktime is not installed; the message says how to install it.
        ValueError: it has no such data set.
    """
    spec = importlib.util.find_spec("sktime")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"sktime:{name} comes with sktime, which is not installed: pip install 'mamba_zoo[series]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    if not (folder / name).is_dir():
        known = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("_"))
        raise ValueError(f"sktime has no data set {name!r}; it has {', '.join(known)}")
    return folder / name


def find_table(root: str, columns: Sequence[str] | None = None, besides: Sequence[str] | None = None) -> Table:
    """The table that `root` stands for: "eeg", 10 seconds of 4 electrodes that come with Matplotlib; "sktime:NAME", a
    table that comes with sktime, such as "sktime:Airline"; or a CSV file.

    Args:
        root: See above.
        columns: See `read_table`, of files.
        besides: Likewise.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a data set of sktime without sktime.
        ValueError: a file that cannot be read.
    """
    if root == "eeg":
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "sample_data" / "eeg.dat"
        return Table(["eeg 1", "eeg 2", "eeg 3", "eeg 4"], np.fromfile(path, "<f8").reshape(800, 4), None, "eeg")
    if root.startswith("sktime:"):
        folder = sktime_folder(root.partition(":")[2])
        files = sorted(folder.glob("*.csv"))
        if not files:
            raise ValueError(f"{root} is no table of series; classify it: --task series-classification")
        return read_table(files[0], columns, besides)
    return read_table(root, columns, besides)

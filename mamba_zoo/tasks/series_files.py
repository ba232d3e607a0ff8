"""Reading series: CSV files with a date column, and the `.ts` files of the UCR and UEA archives."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .series_dates import MISSING, NAMES, find_dates, is_number, written


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


def read_table(
    path: str | Path,
    columns: Sequence[str] | None = None,
    besides: Sequence[str] | None = None,
    date_column: str | None = None,
) -> Table:
    """Read a CSV file with a header: a column of dates, if there is one, and columns of numbers.

    Which column holds the dates, and how they may be written, says `series_dates.find_dates`; they must not fall. Lines
    that start with `#` are left out, and so is a first column without a name, or one called "time" or alike, that only
    counts the rows upwards. Empty cells, "NA", "nan" and "?" are missing.

    Args:
        path: File.
        columns: Which columns to read, so that others may hold anything; None reads all.
        besides: Names, in lower case, of columns that are read as well where the file has them.
        date_column: The column of dates; "none" says that there is none, None finds out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header or no rows, a column that is not there or is there twice, dates that fall, or a cell that
            is neither number, date nor missing; the message names it.
    """
    path = Path(path)
    header, body = read_rows(path)
    at, dates = find_dates(header, body, path, date_column, columns)

    def counts(i: int) -> bool:
        named = header[i].lower() in NAMES or (i == 0 and not header[i])
        return named and (columns is None or header[i] not in columns) and _rises([row[i] for row in body])

    kept = [i for i in range(len(header)) if i != at and not counts(i)]
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


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV file and the cells of its rows, as they are written; see `read_table`."""
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
    return header, body


def _check_columns(source: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {', '.join(names[:12])}")


def _check_header(header: Sequence[str], path: Path) -> None:
    """Names, each of them once; a first row of numbers is none, but 0, 1, 2 and so on are."""
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path} has {header.count(twice[0])} columns {twice[0]!r}; a name for each is needed")
    counted = [[str(i + start) for i in range(len(header))] for start in (0, 1)]
    if all(is_number(name) or written(name) is not None for name in header) and list(header) not in counted:
        raise ValueError(f"{path} has no header: its first row is {', '.join(header[:4])}; put names above the numbers")
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise ValueError(f"{path} has {separator!r} between its columns; it needs commas")


def _rises(cells: Sequence[str]) -> bool:
    """Whether a column only counts the rows upwards, as tables often do that were written by a program."""
    try:
        return bool((np.diff(np.array(cells, dtype=np.float64)) > 0).all())
    except ValueError:
        return False


def _number(text: str, path: Path, row: int, column: str) -> float:
    text = text.strip()
    if text.lower() in MISSING:
        return float("nan")
    try:
        return float(text)
    except ValueError:
        no_date = " and no date such as 2016-07-01 00:00" if column.lower() in NAMES else ""
        raise ValueError(
            f"{path}, row {row}: {text!r} in column {column!r} is no number{no_date}; leave the column out with "
            "columns="
        ) from None


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


def find_table(
    root: str,
    columns: Sequence[str] | None = None,
    besides: Sequence[str] | None = None,
    date_column: str | None = None,
) -> Table:
    """The table that `root` stands for: "eeg", 10 seconds of 4 electrodes that come with Matplotlib; "sktime:NAME", a
    table that comes with sktime, such as "sktime:Airline"; or a CSV file.

    Args:
        root: See above.
        columns: See `read_table`, of files.
        besides: Likewise.
        date_column: Likewise.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a data set of sktime without sktime.
        ValueError: a file that cannot be read.
    """
    path = table_file(root)
    if path is not None:
        return read_table(path, columns, besides, date_column)
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "eeg.dat"
    return Table(["eeg 1", "eeg 2", "eeg 3", "eeg 4"], np.fromfile(path, "<f8").reshape(800, 4), None, "eeg")


def table_file(root: str) -> Path | None:
    """The CSV file that `root` stands for, see `find_table`; None for "eeg".

    Raises:
        ModuleNotFoundError: a data set of sktime without sktime.
        ValueError: a data set of sktime that is no table.
    """
    if root == "eeg":
        return None
    if not root.startswith("sktime:"):
        return Path(root)
    files = sorted(sktime_folder(root.partition(":")[2]).glob("*.csv"))
    if not files:
        raise ValueError(f"{root} is no table of series; classify it: --task series-classification")
    return files[0]

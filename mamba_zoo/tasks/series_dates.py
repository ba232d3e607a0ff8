"""Dates of the rows of a table: which column holds them, how they are written, and what follows from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from itertools import islice

import numpy as np

NAMES = (
    "date", "datetime", "datetime_gmt", "ds", "epoch", "month", "period", "quarter", "time", "timestamp", "timestamps",
    "unix",
)  # fmt: skip
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
_DATE = re.compile(
    r"\s*(\d{4})[-/.](\d{1,2})(?:[-/.](\d{1,2}))?"
    r"(?:[ T](\d{1,2}):(\d{2})(?::(\d{2})(?:\.\d+)?)?(?P<offset> ?[+-]\d{2}:?(?:\d{2})?)?)?(?:Z| ?UTC|\+00:?00)?\s*"
)
_COMPACT = re.compile(r"\s*((?:18|19|20|21)\d{2})(\d{2})(\d{2})(?:[ T]?(\d{2})(?::?(\d{2})(?::?(\d{2}))?)?Z?)?\s*")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMED = re.compile(rf"\s*(\d{{4}})[- ]?(?:Q([1-4])|({'|'.join(_MONTHS)})[a-z]*)\s*", re.IGNORECASE)
_FIRST_DAY = date(1970, 1, 1).toordinal()
_EPOCHS = (1e8, 4.2e9)  # 1973 to 2103 in seconds since 1970
_LOOKED_AT = 10  # cells of a column that say what it holds
_MOST_UNEVEN = 0.01

Reader = Callable[[str], "int | None"]


def find_dates(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    source: object,
    wanted: str | None = None,
    columns: Sequence[str] | None = None,
) -> tuple[int | None, np.ndarray | None]:
    """Which column holds the dates of the rows, and the dates `(rows,)` datetime64[s] in UTC; None if there are none.

    It is the first column called "date", "time" or alike whose first cells are dates, else the first column if it
    holds written dates. Dates are written (2016-07-01 00:00, with or without an offset from UTC; 20160701; 2016-07;
    2016 Q3; 2016 Jul) or count seconds, milli-, micro- or nanoseconds since 1970.

    Args:
        header: Names of the columns.
        body: Cells of each row.
        source: Where they were read, for messages.
        wanted: The column of dates; "none" says that there is none, None finds out.
        columns: Columns that are to be read as numbers.

    Raises:
        ValueError: no such column, a cell that is no date, or dates that fall; the message names the row.
    """
    at, reader = None, None
    if wanted is not None and wanted != "none":
        if wanted not in header:
            raise ValueError(f"{source} has no column {wanted!r} for date_column; it has {', '.join(header[:12])}")
        at = header.index(wanted)
        # None of its cells can be read if the first ones cannot; the message then names the first.
        reader = _reader(_first_cells(body, at)) or written
    elif wanted is None:
        for i in (i for i, name in enumerate(header) if name.lower() in NAMES):
            cells = _first_cells(body, i)
            asked_for = cells and is_number(cells[0]) and header[i] in (columns or ())
            if not asked_for and (reader := _reader(cells)) is not None:
                at = i
                break
        if at is None and not is_number(body[0][0]) and written(body[0][0]) is not None:
            at, reader = 0, written
    if at is None or reader is None:
        return None, None
    dates = _read([row[at] for row in body], reader, source, header[at])
    _warn_of_uneven(dates, source, header[at])
    return at, dates


def _first_cells(body: Sequence[Sequence[str]], at: int) -> list[str]:
    return list(islice((row[at] for row in body if row[at].strip().lower() not in MISSING), _LOOKED_AT))


def _reader(cells: Sequence[str]) -> Reader | None:
    """What reads these cells as dates; None if they are none. Cells of text are told by the first of them."""
    if not cells:
        return None
    numbers = is_number(cells[0])
    for reader in (written, _compact):
        if reader(cells[0]) is not None and (not numbers or all(reader(cell) is not None for cell in cells)):
            return reader
    return next((r for r in _COUNTS if numbers and all(r(cell) is not None for cell in cells)), None)


def is_number(text: str) -> bool:
    """Whether a cell is a number; "nan" is one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def written(text: str) -> int | None:
    """Seconds since 1970 in UTC of a written date; None if the text is none."""
    if found := _DATE.fullmatch(text):
        year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
        seconds = _seconds(year, month, 1 if found[3] is None else day, hour, minute, second)
        offset = (found["offset"] or "").strip().replace(":", "")
        if seconds is None or not offset:
            return seconds
        return seconds - int(f"{offset[0]}1") * (int(offset[1:3]) * 60 + int(offset[3:5] or 0)) * 60
    if found := _NAMED.fullmatch(text):
        month = 3 * int(found[2]) - 2 if found[2] else _MONTHS.index(found[3].lower()) + 1
        return _seconds(int(found[1]), month, 1)
    return None


def _compact(text: str) -> int | None:
    """The same of 20160701, 2016070112, 201607011230 and 20160701123000."""
    found = _COMPACT.fullmatch(text)
    return None if found is None else _seconds(*(int(part or 0) for part in found.groups()))


def _seconds(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int | None:
    if hour > 24 or minute > 59 or second > 60:
        return None
    try:
        days = date(year, month, day).toordinal() - _FIRST_DAY
    except ValueError:
        return None
    return ((days * 24 + hour) * 60 + minute) * 60 + second


def _counted(per_second: float) -> Reader:
    def read(text: str) -> int | None:
        try:
            seconds = float(text) / per_second
        except ValueError:
            return None
        return int(seconds) if _EPOCHS[0] <= seconds <= _EPOCHS[1] else None

    return read


_COUNTS = tuple(_counted(per_second) for per_second in (1, 1e3, 1e6, 1e9))


def _read(texts: Sequence[str], reader: Reader, source: object, column: str) -> np.ndarray:
    seconds = np.empty(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        found = reader(text)
        if found is None:
            raise ValueError(
                f"{source}, row {i + 2}: {text!r} in column {column!r} is no date such as 2016-07-01 00:00; "
                "date_column= names another column, or none"
            )
        seconds[i] = found
    falls = np.flatnonzero(np.diff(seconds) < 0)
    if len(falls):
        raise ValueError(
            f"{source}, row {falls[0] + 3}: {texts[falls[0] + 1]!r} comes after {texts[falls[0]]!r}; sort the rows by "
            f"{column!r}, the oldest first"
        )
    return seconds.astype("datetime64[s]")


def _warn_of_uneven(dates: np.ndarray, source: object, column: str) -> None:
    """Warn if the rows are not equally far apart, by the clock or by the calendar's months."""
    gaps = np.diff(dates).astype(np.int64)
    months = np.diff(dates.astype("datetime64[M]").astype(np.int64))
    if not len(gaps) or (np.median(months) > 0 and np.mean(months != np.median(months)) <= _MOST_UNEVEN):
        return
    usual = int(np.sort(gaps)[len(gaps) // 2])
    uneven = float(np.mean(np.abs(gaps - usual) > max(1.0, 0.01 * usual)))  # dates are cut to whole seconds
    if uneven > _MOST_UNEVEN:
        warnings.warn(
            f"{source}: {uneven:.1%} of the rows do not come {np.timedelta64(usual, 's')} after the one before by "
            f"column {column!r}, as most do; models read rows as if they were equally far apart. Put in the rows that "
            "are missing, with empty cells, or average over equal steps",
            stacklevel=4,
        )


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

"""`mamba-zoo predict` for models of series: forecasts, filled gaps and anomaly scores of a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .running import write_csv
from .series_data import Windows, fill_forward, mark_rows
from .series_dates import later_dates
from .series_files import Table, find_table, read_rows, table_file
from .series_windows import laid_together, overlapping

if TYPE_CHECKING:
    from .anomaly import AnomalyDetector
    from .forecasting import Forecaster
    from .imputation import Imputer

_SHOWN = 4
_MOST_ERRORS = 2000  # windows that say how far forecasts are off


def read_for(model: Any, source: Path, date_column: str | None = None) -> tuple[Table, Tensor, Tensor, Tensor]:
    """The series of a table that `model` was trained on, and as it reads them: filled, scaled, and their marks.

    Args:
        model: With `columns`, `seq_len` and `scaled`.
        source: As for `series_files.find_table`.
        date_column: Likewise.

    Raises:
        ValueError: columns that are missing, or fewer rows than a window.
    """
    table = find_table(str(source), model.columns, None, date_column).columns(model.columns)
    if len(table.values) < model.seq_len:
        raise ValueError(f"{source} has {len(table.values)} rows, but the model reads {model.seq_len}")
    target = model.scaled(torch.from_numpy(table.values)).float()
    marks = torch.from_numpy(mark_rows(table.dates, len(target))).float()
    return table, fill_forward(target), target, marks


def device_for(name: str) -> torch.device:
    """The device that `--device` names."""
    if name == "auto":
        name = "gpu" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda" if name == "gpu" else name)


def batches(data: Windows, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """All windows in order."""
    for i in range(0, len(data), batch_size):
        batch = data.__getitems__(range(i, min(i + batch_size, len(data))))
        yield tuple(part.to(device) for part in batch)


@torch.no_grad()
def forecast_csv(model: Forecaster, args: argparse.Namespace) -> str:
    """Write forecasts of the table `args.data` into `args.out`, and a picture beside it.

    Raises:
        ValueError: a table that does not fit the model, `every` below 1, or an `interval` that cannot be found.
    """
    from ._series_figures import plot_forecasts

    if args.every is not None and args.every < 1:
        raise ValueError(f"every={args.every} must be at least 1 step")
    if args.calibrate is not None and args.interval is None:
        raise ValueError("calibrate is for interval; give both, such as --interval 0.9")
    out = args.out or Path("predictions.csv")
    table, values, target, marks = read_for(model, args.data, args.date_column)
    if not model.reads_marks:
        marks = marks[:, :0]
    n, l, h = len(values), model.seq_len, model.pred_len
    ends = [n - 1]  # last row that each forecast reads
    if args.every is not None:
        ends = [*range(n - 1, l - 2, -args.every)][::-1]
    device = device_for(args.device)
    model = model.to(device)
    # Rows that have not come yet, so that the last windows have targets as well: nothing is known of them.
    beyond = torch.full((h, values.shape[1]), torch.nan)
    data = Windows(values, torch.cat([target, beyond]), marks, torch.tensor(ends) - l + 1, l, h)
    found = torch.cat([model.predict_step(batch, 0).cpu() for batch in batches(data, args.batch_size, device)]).numpy()
    spread = None
    if args.interval is not None:
        spread = spread_of(model, args.calibrate or args.data, args.interval, args.batch_size, args.date_column)
    write_csv(out, _rows(table, ends, found, h, spread))
    shown = _shown(model, data, n, l, h)
    plot_forecasts(shown, model.columns, out.with_suffix(".png"), model.season, spread)
    what = "forecast" if len(ends) == 1 else "forecasts"
    return f"{len(ends):,} {what} of {h} steps -> {out}, {out.with_suffix('.png')}"


def spread_of(
    model: Forecaster, source: Path, level: float, batch_size: int = 256, date_column: str | None = None
) -> np.ndarray:
    """How far from a forecast the truth lies at most, in `level` of the cases: `(pred_len, v)` in units of the table.

    These are quantiles of the absolute errors of each step ahead and series, over windows of a table whose future is
    known, corrected for their number (split conformal prediction, arXiv:1604.04173). They hold for later windows as far
    as these are alike; errors on rows that the model was trained on are too small.

    Args:
        model: On the device that is to work.
        source: The table.
        level: Between 0 and 1.
        batch_size: Windows at a time.
        date_column: See `series_files.find_table`.

    Raises:
        ValueError: a level out of range, or too few windows for it.
    """
    if not 0 < level < 1:
        raise ValueError(f"interval={level} must lie between 0 and 1, such as 0.9")
    _, values, target, marks = read_for(model, source, date_column)
    count = len(values) - model.seq_len - model.pred_len + 1
    least = int(np.ceil(round(level / (1 - level), 6)))
    if count < least:
        raise ValueError(
            f"{source} holds {max(count, 0)} windows of {model.seq_len} steps whose next {model.pred_len} are known; "
            f"interval={level} needs at least {least}: use a longer table or a lower level"
        )
    starts = torch.linspace(0, count - 1, min(count, _MOST_ERRORS)).long()
    marks = marks if model.reads_marks else marks[:, :0]
    data = Windows(values, target, marks, starts, model.seq_len, model.pred_len)
    parts = [(model.predictions(b).float() - b[1]).abs().cpu() for b in batches(data, batch_size, model.device)]
    errors = torch.cat(parts).numpy()
    share = min(1.0, level * (len(errors) + 1) / len(errors))
    return np.nanquantile(errors, share, axis=0, method="higher") * np.asarray(model.deviation)


def _rows(
    table: Table, ends: list[int], found: np.ndarray, h: int, spread: np.ndarray | None = None
) -> list[dict[str, Any]]:
    dates = None if table.dates is None else np.concatenate([table.dates, later_dates(table.dates, h)])
    names = _beside(table.names, ("origin", "step", "date"))
    rows: list[dict[str, Any]] = []
    for end, forecast in zip(ends, found, strict=True):
        for step in range(h):
            row = end + 1 + step
            cells: dict[str, Any] = {"origin": end if dates is None else str(dates[end]), "step": step + 1}
            if dates is not None:
                cells["date"] = str(dates[row])
            cells |= dict(zip(names, forecast[step], strict=True))
            if spread is not None:
                for name, value, width in zip(names, forecast[step], spread[step], strict=True):
                    cells |= {f"{name} (low)": np.float32(value - width), f"{name} (high)": np.float32(value + width)}
            if len(ends) > 1:
                known = row < len(table.values)
                truth = table.values[row] if known else np.full(len(names), np.nan)
                cells |= _cells([f"{name} (truth)" for name in names], truth)
            rows.append(cells)
    return rows


def _shown(model: Forecaster, data: Windows, n: int, l: int, h: int) -> list[list[np.ndarray]]:
    """Windows for the picture: the last whose forecast can be compared with what came, some before it, and the last."""
    last = n - l
    starts = sorted({max(0, last - h - i * h) for i in range(_SHOWN - 1) if last - h >= 0} | {last})
    data.starts = torch.tensor(starts)
    batch = tuple(part.to(model.device) for part in data.__getitems__(range(len(starts))))
    forecast, simple = model.predictions(batch), model.simple_forecasts(batch[0])["season"]
    parts = [model.unscaled(part.detach().float()).cpu().numpy() for part in (*batch[:2], forecast, simple)]
    return [[part[i] for part in parts] for i in range(len(starts))]


def filled_csv(model: Imputer, args: argparse.Namespace) -> str:
    """Write the table `args.data` with its gaps filled into `args.out`, and a picture beside it.

    All other cells, and the columns that the model does not read, are written as they were found.

    Raises:
        ValueError: a table that does not fit the model.
    """
    from ._series_figures import plot_filled

    out = args.out or Path("predictions.csv")
    table, found = _over_table(model, args)
    gaps = np.isnan(table.values)
    filled = model.unscaled(found).numpy()
    rows = _as_written(table, args.data)
    for row, column in np.argwhere(gaps).tolist():
        rows[row][table.names[column]] = filled[row, column]
    write_csv(out, rows)
    plot_filled(table.values, np.where(gaps, filled, table.values), table.names, out.with_suffix(".png"))
    return f"{int(gaps.sum()):,} missing values filled in {len(rows):,} steps -> {out}, {out.with_suffix('.png')}"


def scores_csv(model: AnomalyDetector, args: argparse.Namespace) -> str:
    """Write the score of every step of the table `args.data` into `args.out`, and a picture beside it.

    Raises:
        ValueError: a table that does not fit the model.
    """
    from ._series_figures import plot_anomalies

    out = args.out or Path("predictions.csv")
    table, found = _over_table(model, args)
    scores, limits = found.numpy(), model.limits(len(found))
    names = _beside(table.names, ("date", "step", "score", "threshold", "alarm"))
    rows = [
        {
            **({"step": i} if table.dates is None else {"date": str(table.dates[i])}),
            "score": score,
            "threshold": np.float32(limits[i]),
            "alarm": int(score > limits[i]),
            **_cells(names, table.values[i]),
        }
        for i, score in enumerate(scores)
    ]
    write_csv(out, rows)
    plot_anomalies(table.values, scores, limits, table.names, out.with_suffix(".png"))
    alarms = int((scores > limits).sum())
    return f"{alarms:,} alarms in {len(rows):,} steps -> {out}, {out.with_suffix('.png')}"


@torch.no_grad()
def _over_table(model: Any, args: argparse.Namespace) -> tuple[Table, Tensor]:
    """What the model says of every row of a table, `(rows, ...)`."""
    table, values, target, marks = read_for(model, args.data, args.date_column)
    device = device_for(args.device)
    model = model.to(device)
    starts = overlapping(len(values), model.seq_len)
    data = Windows(values, target, marks, starts, model.seq_len, 0)
    parts = torch.cat([model.predict_step(batch, 0).cpu() for batch in batches(data, args.batch_size, device)])
    model.to("cpu")
    return table, laid_together(len(values), starts, parts)


def _beside(names: list[str], others: tuple[str, ...]) -> list[str]:
    """The names of the table's columns, changed where another column of the result has the same."""
    return [f"{name} (table)" if name in others else name for name in names]


def _cells(names: list[str], values: np.ndarray) -> dict[str, Any]:
    return {name: "" if np.isnan(value) else value for name, value in zip(names, values, strict=True)}


def _as_written(table: Table, source: Path) -> list[dict[str, Any]]:
    """The rows of a table with all of their cells."""
    path = table_file(str(source))
    if path is None:
        return [_cells(table.names, row) for row in table.values]
    header, body = read_rows(path)
    return [dict(zip(header, row, strict=True)) for row in body]

"""Pictures of series: forecasts beside what came, errors by step ahead, gaps that were filled, scores of anomalies."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .checkpoints import write_atomically

# Distinct for colour-blind readers (Okabe and Ito).
_TRUTH, _MODEL, _OTHER, _ALARM = "#333333", "#0072B2", "#E69F00", "#D55E00"
_MOST_COLUMNS = 4
_LABELS = {"model": "model", "repeat": "last value repeated", "season": "last season repeated"}


def plot_forecasts(
    windows: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    path: Path,
    season: int = 1,
    spread: np.ndarray | None = None,
) -> None:
    """A row for each window, a column for each of the first series: what was read, what came, what was forecast.

    Args:
        windows: Each `(read (l, v), came (h, v), forecast (h, v), simple forecast (h, v))`.
        names: Of the series.
        path: Of the PNG.
        season: Steps of the season that the simple forecast repeats; 1 is the last value.
        spread: Half the width of the band around forecasts, `(h, v)`.
    """
    repeated = "last season repeated" if season > 1 else "last value repeated"
    columns = min(len(names), _MOST_COLUMNS)
    figure, axes = _grid(len(windows), columns)
    for row, (read, came, forecast, simple) in enumerate(windows):
        before, ahead = np.arange(-len(read), 0), np.arange(len(came))
        for column in range(columns):
            ax = axes[row][column]
            ax.axvline(-0.5, color="#bbbbbb", lw=0.8)
            ax.plot(before, read[:, column], color=_TRUTH, lw=1.0)
            # The lines ahead start at the last value read.
            start = read[-1:, column]
            for values, colour, width, label in (
                (simple, _OTHER, 0.9, repeated),
                (came, _TRUTH, 1.0, "truth"),
                (forecast, _MODEL, 1.4, "forecast"),
            ):
                line = np.concatenate([start, values[:, column]])
                ax.plot(np.concatenate([[-1], ahead]), line, color=colour, lw=width, label=label)
            if spread is not None:
                low, high = (forecast[:, column] + sign * spread[:, column] for sign in (-1, 1))
                ax.fill_between(ahead, low, high, color=_MODEL, alpha=0.15, lw=0)
            if row == 0:
                ax.set_title(names[column], fontsize=9)
            if row == len(windows) - 1:
                ax.set_xlabel("steps ahead", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def plot_horizon(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Mean squared and mean absolute error by step ahead, of the model and of simple forecasts.

    Args:
        arrays: "model_mse" and so on, each `(steps,)`.
        path: Of the PNG.
    """
    figure, axes = _grid(1, 2, 4.2, 3.0)
    colours = {"model": _MODEL, "repeat": "#999999", "season": _OTHER}
    for ax, error, title in zip(axes[0], ("mse", "mae"), ("mean squared error", "mean absolute error"), strict=True):
        for key, label in _LABELS.items():
            if f"{key}_{error}" in arrays:
                values = arrays[f"{key}_{error}"]
                marker = "o" if len(values) == 1 else None
                ax.plot(np.arange(1, len(values) + 1), values, color=colours[key], lw=1.4, marker=marker, label=label)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("steps ahead", fontsize=8)
        ax.set_title(title, fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def plot_filled(known: np.ndarray, filled: np.ndarray, names: Sequence[str], path: Path, truth: Any = None) -> None:
    """Series with gaps, what was put into them and, if it is known, what belongs there.

    Args:
        known: `(l, v)`, NaN in the gaps.
        filled: `(l, v)`.
        names: Of the series.
        path: Of the PNG.
        truth: `(l, v)` or None.
    """
    rows = min(len(names), _MOST_COLUMNS)
    figure, axes = _grid(rows, 1, 9.0, 1.7)
    for row in range(rows):
        ax = axes[row][0]
        if truth is not None:
            ax.plot(truth[:, row], color="#bbbbbb", lw=2.0, label="truth")
        gaps = np.isnan(known[:, row])
        # The line reaches to the known values on either side.
        near = gaps | np.append(gaps[1:], False) | np.insert(gaps[:-1], 0, False)
        ax.plot(known[:, row], color=_TRUTH, lw=1.0, label="known")
        ax.plot(np.where(near, filled[:, row], np.nan), color=_MODEL, lw=1.0)
        ax.plot(np.where(gaps, filled[:, row], np.nan), color=_MODEL, lw=1.0, marker=".", ms=4, label="filled in")
        ax.set_ylabel(names[row], fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False, ncols=3)
    axes[-1][0].set_xlabel("step", fontsize=8)
    _save(figure, path)


def plot_anomalies(
    values: np.ndarray, scores: np.ndarray, limits: np.ndarray, names: Sequence[str], path: Path, labels: Any = None
) -> None:
    """Series above, the score of every step with its threshold below; alarms and, if known, true anomalies marked.

    Args:
        values: `(l, v)`.
        scores: `(l,)`, NaN where there is none.
        limits: `(l,)`; a score above is an alarm.
        names: Of the series.
        path: Of the PNG.
        labels: `(l,)` of 0 and 1, or None.
    """
    rows = min(len(names), _MOST_COLUMNS - 1)
    figure, axes = _grid(rows + 1, 1, 9.0, 1.6)
    steps = np.arange(len(scores))
    alarms = scores > limits
    for row in range(rows):
        ax = axes[row][0]
        ax.plot(values[:, row], color=_TRUTH, lw=0.8)
        ax.scatter(steps[alarms], values[alarms, row], color=_ALARM, s=10, zorder=3, label="alarm")
        ax.set_ylabel(names[row], fontsize=8)
    below = axes[-1][0]
    below.plot(scores, color=_MODEL, lw=0.8)
    below.plot(limits, color=_ALARM, lw=0.9, ls="--", label="threshold")
    below.set_yscale("log")
    below.set_ylabel("score", fontsize=8)
    below.set_xlabel("step", fontsize=8)
    if labels is not None:
        for ax in (line[0] for line in axes):
            for first, last in _runs(labels > 0):
                ax.axvspan(first - 0.5, last + 0.5, color=_OTHER, alpha=0.4, lw=0, zorder=0)
        axes[0][0].axvspan(np.nan, np.nan, color=_OTHER, alpha=0.4, lw=0, label="true anomaly")
    below.legend(fontsize=7, frameon=False)
    axes[0][0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def _runs(marked: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of True."""
    edges = np.diff(np.concatenate([[0], marked.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(edges > 0).tolist(), (np.flatnonzero(edges < 0) - 1).tolist(), strict=True))


def _grid(rows: int, columns: int, width: float = 3.0, height: float = 1.9) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))

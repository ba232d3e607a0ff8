"""Pictures of receptive fields and of maps per direction."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .receptive import contribution_area

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "magma"
# In untrained models scans bring 1e-5 of what convolutions do.
DECADES = 6  # that the colours of a receptive field span
_LETTERS = 12  # of a title that fit an inch


def plot_receptive_fields(
    fields: Mapping[str, Tensor],
    path: str | PathLike[str] | None = None,
    columns: int = 4,
    panel: float = 2.4,
    title: str = "",
    dpi: int = 100,
) -> Figure:
    """Draw receptive fields side by side, each relative to its largest entry, in logarithmic colours of six decades.

    Under each stands which part of the image a centred square must have to hold half and 99 % of it.

    Args:
        fields: `(height, width)` each, under its name.
        path: Where to save the picture; the ending decides the format. None saves nothing.
        columns: Panels in one row.
        panel: Width of a panel in inches.
        title: Above the panels.
        dpi: Dots per inch of a saved picture.

    Returns:
        The figure, not attached to any window.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    if not fields:
        raise ValueError("fields is empty; give at least one receptive field")
    columns = min(columns, len(fields))
    rows = -(-len(fields) // columns)
    figure = _figure(columns * panel + 0.7, rows * (panel + 0.5) + (0.35 if title else 0.0))
    grid = np.atleast_1d(figure.subplots(rows, columns)).reshape(rows, columns)
    norm = LogNorm(10.0**-DECADES, 1)
    for axes, (name, values) in zip(grid.flat, fields.items(), strict=False):
        share = (values / values.max().clamp(min=1e-30)).clamp(min=10.0**-DECADES).cpu().numpy()
        axes.imshow(share, cmap=COLOURS, norm=norm, interpolation="nearest")
        half, nearly = contribution_area(values, 0.5), contribution_area(values, 0.99)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"50 % in {100 * half:.0f} %, 99 % in {100 * nearly:.0f} % of the image", fontsize=7)
        _bare(axes)
    for axes in list(grid.flat)[len(fields) :]:
        axes.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(grid.flat), shrink=0.75, pad=0.02)
    bar.set_label("gradient, relative to its largest", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return _finish(figure, title, path, dpi)


def plot_scan_maps(
    rows: Mapping[str, Tensor],
    image: Tensor | None = None,
    query: Mapping[str, tuple[int, int] | None] | None = None,
    path: str | PathLike[str] | None = None,
    panel: float = 1.6,
    title: str = "",
    dpi: int = 100,
) -> Figure:
    """Draw maps per direction: one row a layer, one column a direction, and their sum at the end.

    Within a row all directions have the same colours, from zero to the largest entry, in proportion to the square root;
    the sum has its own.

    Args:
        rows: Maps `(k, height, width)`, not negative, under the name of their layer.
        image: `(3, height, width)` or `(1, height, width)` between 0 and 1, drawn at the left of every row.
        query: Place `(row, column)` to mark in the maps of each row; None for one without a place.
        path: Where to save the picture; None saves nothing.
        panel: Width of a panel in inches.
        title: Above the panels.
        dpi: Dots per inch of a saved picture.

    Returns:
        The figure, not attached to any window.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.colors import PowerNorm

    if not rows:
        raise ValueError("rows is empty; give the maps of at least one layer")
    first = int(image is not None)
    columns = first + max(len(maps) + (len(maps) > 1) for maps in rows.values())
    figure = _figure(columns * panel + 0.3, len(rows) * (panel + 0.15) + (0.45 if title else 0.1))
    grid = np.atleast_1d(figure.subplots(len(rows), columns)).reshape(len(rows), columns)
    for line, (name, maps) in zip(grid, rows.items(), strict=True):
        values = maps.detach().double().cpu().numpy()
        panels = [(f"direction {i}", one, values.max()) for i, one in enumerate(values)]
        if len(values) > 1:
            panels.append(("sum", values.sum(0), values.sum(0).max()))
        if image is not None:
            shown = image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
            line[0].imshow(shown.squeeze(-1) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
            _mark(line[0], query, name, (shown.shape[0] / values.shape[1], shown.shape[1] / values.shape[2]))
        line[0].set_ylabel(name, fontsize=7)
        for axes, (label, one, largest) in zip(line[first:], panels, strict=False):
            axes.imshow(one, cmap=COLOURS, norm=PowerNorm(0.5, 0, max(largest, 1e-30)), interpolation="nearest")
            axes.set_title(label, fontsize=7)
            _mark(axes, query, name, (1.0, 1.0))
        for axes in line:
            _bare(axes)
        for axes in line[first + len(panels) :]:
            axes.set_axis_off()
    return _finish(figure, title, path, dpi)


def _mark(axes: Axes, query: Mapping[str, tuple[int, int] | None] | None, name: str, cell: tuple[float, float]) -> None:
    place = None if query is None else query.get(name)
    if place is None:
        return
    from matplotlib.patches import Rectangle

    corner = (place[1] * cell[1] - 0.5, place[0] * cell[0] - 0.5)
    axes.add_patch(Rectangle(corner, cell[1], cell[0], fill=False, edgecolor="#00E5FF", linewidth=1.2))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.8", linewidth=0.6)


def _finish(figure: Figure, title: str, path: str | PathLike[str] | None, dpi: int) -> Figure:
    if title:
        lines = textwrap.wrap(title, int(figure.get_figwidth() * _LETTERS))
        figure.set_figheight(figure.get_figheight() + 0.18 * (len(lines) - 1))
        figure.suptitle("\n".join(lines), fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=dpi)
    return figure

"""Pictures of scans."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from .core import Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_scan(
    scan: Scan,
    path: str | PathLike[str] | None = None,
    columns: int = 4,
    panel: float = 2.2,
    colormap: str = "viridis",
    title: str | None = None,
    dpi: int = 100,
) -> Figure:
    """Draw one panel a direction: its path from the first step (dark) to the last (bright).

    Moves to one of the eight neighbours are thick, jumps thin and dotted. A ring marks the first token, a square the
    last. Cells that the direction never visits are grey. Tokens outside the grid, such as a class token, are left out.
    A video is drawn as its frames side by side.

    Args:
        scan: Of one, two or three dimensions.
        path: Where to save the picture; the ending decides the format. None saves nothing.
        columns: Panels in one row.
        panel: Width of a panel in inches.
        colormap: A matplotlib colour map, from first to last step.
        title: Above the panels; None writes the name and the grid, "" nothing.
        dpi: Dots per inch of a saved picture.

    Returns:
        The figure, not attached to any window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, (height, width) = _places(scan)
    columns = min(columns, scan.k)
    rows = -(-scan.k // columns)
    if title is None:
        title = f"{scan.name}, {' x '.join(map(str, scan.size))}" if scan.size else scan.name
    cell = min(72 * panel / (width + 1), 16.0)  # points; markers and lines follow it
    tall = panel * min(max(height / width, 0.15), 4)
    heading = 0.35 if title else 0.0
    figure = Figure(figsize=(columns * panel, rows * (tall + 0.25) + heading), layout="constrained")
    FigureCanvasAgg(figure)
    for direction, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        if direction >= scan.k:
            axes.set_axis_off()
            continue
        visited = scan.order[direction].cpu().numpy()
        steps = np.flatnonzero((visited >= 0) & (places[visited, 0] >= 0))
        _panel(axes, places, visited[steps], steps, scan.m, (height, width), cell, colormap)
        if scan.k > 1:
            axes.set_title(f"direction {direction}", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=dpi)
    return figure


def _places(scan: Scan) -> tuple[np.ndarray, tuple[int, int]]:
    """Row and column of every token in the picture, -1 for extra tokens, and the size of the picture."""
    places = scan.coordinates()
    size = scan.size or (scan.length - len(scan.extra),)
    if len(size) == 1:
        return np.column_stack([np.where(places[:, 0] < 0, -1, 0), places[:, 0]]), (1, size[0])
    if len(size) == 2:
        return places, (size[0], size[1])
    if len(size) == 3:
        frames, height, width = size
        across = np.where(places[:, 0] < 0, -1, places[:, 0] * (width + 1) + places[:, 2])
        return np.column_stack([places[:, 1], across]), (height, frames * (width + 1) - 1)
    raise ValueError(f"plot draws one to three dimensions, but {scan!r} has {len(size)}")


def _panel(
    axes: Axes,
    places: np.ndarray,
    tokens: np.ndarray,
    steps: np.ndarray,
    m: int,
    size: tuple[int, int],
    cell: float,
    colormap: str,
) -> None:
    from matplotlib.collections import LineCollection

    height, width = size
    never = np.setdiff1d(np.flatnonzero(places[:, 0] >= 0), tokens)
    axes.scatter(*places[never].T[::-1], s=(0.5 * cell) ** 2, marker="s", color="0.88", linewidths=0)
    points = places[tokens][:, ::-1].astype(float)
    if len(points) > 1:
        moves = np.stack([points[:-1], points[1:]], axis=1)
        near = np.abs(np.diff(points, axis=0)).max(axis=1) == 1
        for chosen, width_of_line, style, alpha in ((~near, 0.7, (0, (2, 1.5)), 0.7), (near, 0.22 * cell, "-", 1.0)):
            lines = LineCollection(
                list(moves[chosen]), cmap=colormap, linewidths=max(width_of_line, 0.7), linestyles=[style], alpha=alpha
            )
            lines.set_array(steps[1:][chosen].astype(float))
            lines.set_clim(0, m)
            lines.set_capstyle("round") if style == "-" else None
            axes.add_collection(lines)
    axes.scatter(*points.T, c=steps, cmap=colormap, vmin=0, vmax=m, s=(0.3 * cell) ** 2, linewidths=0, zorder=3)
    if len(points):
        axes.scatter(*points[0], s=(0.75 * cell) ** 2, facecolor="none", edgecolor="crimson", linewidths=1.5, zorder=4)
        axes.scatter(*points[-1], s=(0.5 * cell) ** 2, marker="s", color="crimson", linewidths=0, zorder=4)
    axes.set(xlim=(-0.8, width - 0.2), ylim=(height - 0.2, -0.8), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set(color="0.8", linewidth=0.6)

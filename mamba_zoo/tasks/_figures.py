"""The figures of the report."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mamba_zoo.scans import build_scan

from . import statistics
from ._comparison import MIN_BLOCKS, Comparison, Order, finite

# Distinct for colour-blind readers (Okabe and Ito); controls are grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#6A3D9A")
_GREYS = ("#555555", "#999999")

NEAR = 4  # steps; a wider window would call even shuffled orders of a small grid local


def svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as shapes and without a date, so that equal figures are equal files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "mamba_zoo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def scores(c: Comparison) -> Figure:
    """Score of each order: every seed a dot, the mean with its confidence interval."""
    figure, axes = _figure(7.2, 0.8 + 0.5 * len(c.orders))
    for row, (order, colour) in enumerate(_coloured(c)):
        values = np.array([_scaled(c, r.score) for r in finite(order.runs).values()])
        if not len(values):
            continue
        if math.isfinite(order.low):
            axes.plot([_scaled(c, order.low), _scaled(c, order.high)], [row, row], color=colour, lw=2, alpha=0.45)
        axes.scatter(values, np.full(len(values), row + 0.0), color=colour, s=26, zorder=3, linewidths=0, alpha=0.85)
        axes.scatter([_scaled(c, order.mean)], [row], marker="|", s=380, color=colour, linewidths=2.5, zorder=4)
    _names(axes, [o.scan for o in c.orders])
    # Intervals of few seeds can be far wider than the scores; the scores decide the view.
    seen = [_scaled(c, r.score) for o in c.orders for r in finite(o.runs).values()]
    if seen:
        margin = max(0.35 * (max(seen) - min(seen)), 0.01 * abs(max(seen)), 1e-6)
        axes.set_xlim(min(seen) - margin, max(seen) + margin)
    axes.set_xlabel(_label(c))
    return figure


def differences(c: Comparison) -> Figure | None:
    """Difference of each order to the reference, with its intervals over seeds and over test examples."""
    shown = [(o, colour) for o, colour in _coloured(c) if o.seeds is not None]
    if not shown:
        return None
    figure, axes = _figure(7.2, 1.0 + 0.55 * len(shown))
    axes.axvline(0, color="0.4", lw=1)
    reach = [0.0]
    for row, (order, colour) in enumerate(shown):
        d = order.seeds
        if d is None:
            continue
        mean = _scaled(c, d.mean)
        reach.append(mean)
        if math.isfinite(d.low):
            ends = [_scaled(c, d.low), _scaled(c, d.high)]
            axes.plot(ends, [row, row], color=colour, lw=2.5, solid_capstyle="butt")
            reach += [max(min(e, mean + 6 * (abs(mean) + 1)), mean - 6 * (abs(mean) + 1)) for e in ends]
        if order.items is not None:
            ends = [_scaled(c, order.items.low), _scaled(c, order.items.high)]
            axes.plot(ends, [row + 0.22] * 2, color=colour, lw=2, alpha=0.45, ls=(0, (2, 1)))
            reach += ends
        axes.scatter([mean], [row], color=colour, s=40, zorder=3)
    _names(axes, [o.scan for o, _ in shown])
    margin = 0.06 * (max(reach) - min(reach)) or 1
    axes.set_xlim(min(reach) - margin, max(reach) + margin)
    axes.set_xlabel(f"improvement over {c.reference}{', points' if c.metric.percent else ''}")
    return figure


def costs(c: Comparison) -> Figure | None:
    """Score against training speed."""
    shown = [
        (o, colour, rate) for o, colour in _coloured(c) if (rate := o.cost("train_rate")) and math.isfinite(o.mean)
    ]
    if len(shown) < 2:
        return None
    figure, axes = _figure(6.4, 4.0)
    for order, colour, rate in shown:
        spread = 0.0 if math.isnan(order.std) else order.std
        axes.errorbar(rate, _scaled(c, order.mean), abs(_scaled(c, spread)), fmt="o", color=colour, ms=6, capsize=3)
    _label_points(axes, [(rate, _scaled(c, o.mean), o.scan, colour) for o, colour, rate in shown])
    axes.set_xlabel("training speed, examples a second")
    axes.set_ylabel(_label(c))
    return figure


def curves(c: Comparison) -> Figure | None:
    """Validation score by epoch: mean over seeds, band from the lowest to the highest seed."""
    figure, axes = _figure(6.8, 4.0)
    drawn = False
    for order, colour in _coloured(c):
        kept = [np.array(r.curve) for r in order.runs if len(r.curve) > 1]
        if not kept:
            continue
        length = min(map(len, kept))
        epochs, table = kept[0][:length, 0], np.stack([k[:length, 1] for k in kept])
        table = table * 100 if c.metric.percent else table
        style = "--" if order.control else "-"
        axes.plot(epochs, table.mean(0), color=colour, ls=style, lw=1.8, label=order.scan)
        axes.fill_between(epochs, table.min(0), table.max(0), color=colour, alpha=0.15, lw=0)
        drawn = True
    if not drawn:
        return None
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {_label(c)}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def ranks(c: Comparison) -> Figure | None:
    """Critical-difference diagram (Demsar 2006); None with too few seeds for it to mean anything."""
    f = c.friedman
    if f is None or f.blocks < MIN_BLOCKS:
        return None
    k = len(c.orders)
    distance = statistics.critical_difference(k, f.blocks, c.alpha)
    colours = [colour for _, colour in _coloured(c)]
    by_rank = np.argsort(f.ranks, kind="stable")
    groups = statistics.cliques(f.ranks, distance)
    figure, axes = _figure(7.2, 1.5 + 0.16 * len(groups) + 0.3 * math.ceil(k / 2))
    axes.set_axis_off()
    axes.set_xlim(1 - 0.45 * (k - 1), k + 0.45 * (k - 1))
    axes.plot([1, k], [0, 0], color="black", lw=1)
    for rank in range(1, k + 1):
        axes.plot([rank, rank], [0, 0.12], color="black", lw=1)
        axes.text(rank, 0.2, str(rank), ha="center", va="bottom", fontsize=9)
    axes.plot([1, 1 + distance], [0.85, 0.85], color="black", lw=2)
    axes.text(1 + distance / 2, 0.92, f"critical difference {distance:.2f}", ha="center", va="bottom", fontsize=9)
    for i, group in enumerate(groups):
        ends = [float(f.ranks[group[0]]) - 0.04, float(f.ranks[group[-1]]) + 0.04]
        axes.plot(ends, [-0.22 - 0.2 * i] * 2, color="0.35", lw=4, solid_capstyle="round")
    top = -0.35 - 0.2 * len(groups)
    for place, column in enumerate(by_rank):
        left = place < math.ceil(k / 2)
        depth = top - 0.36 * (place if left else k - 1 - place)
        edge = 1 - 0.06 * k if left else k + 0.06 * k
        at = float(f.ranks[column])
        axes.plot([at, at, edge], [0, depth, depth], color=colours[column], lw=1.2)
        text = f"{c.orders[column].scan}  {f.ranks[column]:.2f}"
        axes.text(
            edge + (-0.04 if left else 0.04), depth, text, ha="right" if left else "left", va="center", fontsize=9
        )
    axes.set_ylim(top - 0.36 * math.ceil(k / 2), 1.25)
    return figure


def locality(c: Comparison) -> Figure | None:
    """Score against how near the neighbours of the grid stay in the sequence."""
    points = []
    for order, colour in _coloured(c):
        found = scan_statistics(c, order.scan)
        if found is not None and math.isfinite(order.mean):
            points.append((100 * found["near"], _scaled(c, order.mean), order.scan, colour))
    if len(points) < 3:
        return None
    figure, axes = _figure(6.4, 4.0)
    for x, y, _, colour in points:
        axes.scatter([x], [y], color=colour, s=40)
    _label_points(axes, points)
    axes.set_xlabel(f"grid neighbours at most {NEAR} steps apart, %")
    axes.set_ylabel(_label(c))
    return figure


def drawing(c: Comparison, scan: str) -> Figure | None:
    """The order itself; None for no scan, or one that does not fit the report's grid."""
    built = _built(c, scan)
    return None if built is None else built.plot(panel=1.7, title="")


def scan_statistics(c: Comparison, scan: str) -> dict[str, float] | None:
    """Statistics of an order on the report's grid."""
    built = _built(c, scan)
    return None if built is None else built.statistics(NEAR)


def _built(c: Comparison, scan: str):
    grid = c.settings.get("grid", (14, 14))
    if scan == "none" or grid is None:
        return None
    if scan == "random" and (k := c.settings.get("random_directions")):
        scan = f"random(seed={c.seeds[0]}, k={k})"
    try:
        return build_scan(scan, *grid)
    except ValueError:  # an object that only the training process knew, or a scan of another grid
        return None


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def _coloured(c: Comparison) -> list[tuple[Order, str]]:
    colours, greys = iter(_COLOURS * len(c.orders)), iter(_GREYS * len(c.orders))
    return [(order, next(greys if order.control else colours)) for order in c.orders]


def _names(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _label_points(axes: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside points; where points are near each other, above and below by turns."""
    height = max(y for _, y, _, _ in points) - min(y for _, y, _, _ in points) or 1.0
    last, turn = -math.inf, 0
    for x, y, name, colour in sorted(points, key=lambda p: p[1]):
        turn = turn + 1 if y - last < 0.08 * height else 0
        last = y
        axes.annotate(
            name, (x, y), xytext=(7, 5 + 9 * turn), textcoords="offset points", fontsize=9, color=colour, va="bottom"
        )
    axes.margins(x=0.22, y=0.15)


def _scaled(c: Comparison, value: float) -> float:
    return value * 100 if c.metric.percent else value


def _label(c: Comparison) -> str:
    return f"{c.metric.name}{', %' if c.metric.percent else ''}"


FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "scores": scores,
    "differences": differences,
    "costs": costs,
    "curves": curves,
    "ranks": ranks,
    "locality": locality,
}

"""The tables of a comparison: in the terminal, as CSV, and as rows for the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._comparison import Comparison, Order
from ._progress import duration
from ._verdict import real

if TYPE_CHECKING:
    from rich.table import Table


def result_rows(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and one row an order: scores and differences, ready to print."""
    unit = " %" if c.metric.percent else ""
    heads = [
        "order",
        f"{c.metric.name}{unit} (± std)",
        "seeds",
        f"difference to {c.reference}",
        "p seeds",
        "p examples",
    ]
    heads.append("finding")
    return heads, [_result_row(c, order) for order in c.orders]


def cost_rows(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and one row an order: what it costs, medians over its runs."""
    heads = ["order", "directions", "parameters", "train /s", "inference /s", "peak memory", "time a run"]
    rows = []
    for order in c.orders:
        k, params, seconds = order.cost("directions"), order.cost("params"), order.cost("seconds")
        memory = order.cost("peak_memory")
        rows.append(
            [
                order.scan,
                "-" if k is None else f"{k:.0f}",
                "n/a" if params is None else f"{params:,.0f}",
                _rate(order.cost("train_rate")),
                _rate(order.cost("inference_rate")),
                "n/a" if memory is None else f"{memory / 2**20:,.0f} MiB",
                "n/a" if seconds is None else duration(seconds),
            ]
        )
    return heads, rows


def rich_tables(c: Comparison) -> list[Table]:
    """Both tables for `rich.console.Console.print`."""
    from rich.table import Table

    tables = []
    for title, (heads, rows) in (("Results", result_rows(c)), ("Cost (medians)", cost_rows(c))):
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(heads):
            justify = "left" if i == 0 or head == "finding" else "right"
            table.add_column(head, justify=justify, overflow="fold")
        for order, row in zip(c.orders, rows, strict=True):
            table.add_row(*row, style="dim" if order.control else None)
        tables.append(table)
    return tables


def write_csv(c: Comparison, out: Path) -> None:
    """`results.csv`, one row a run, and `summary.csv`, one row an order; plain numbers, in the metric's own scale."""
    runs = [
        {
            "order": r.scan, "seed": r.seed, c.metric.name: r.score, "directions": r.directions, "parameters": r.params,
            "seconds": r.seconds, "train_per_second": r.train_rate, "inference_per_second": r.inference_rate,
            "peak_memory_bytes": r.peak_memory, **r.machine,
        }
        for r in c.runs
    ]  # fmt: skip
    _write(out / "results.csv", runs)
    _write(out / "summary.csv", [_summary(c, order) for order in c.orders])


def _summary(c: Comparison, order: Order) -> dict[str, Any]:
    d, i = order.seeds, order.items
    effect = d.effect(c.alpha) if d else (math.nan, math.nan, math.nan)
    return {
        "order": order.scan,
        "control": order.control,
        "reference": c.reference,
        "seeds": len(order.runs),
        "mean": order.mean,
        "std": order.std,
        "interval_low": order.low,
        "interval_high": order.high,
        # Improvements over the reference are positive, whatever the metric.
        **(
            {
                "difference": d.mean, "difference_low": d.low, "difference_high": d.high, "test_over_seeds": d.test,
                "p_over_seeds": d.p, "p_over_seeds_holm": order.seeds_p, "hedges_g": effect[0],
                "hedges_g_low": effect[1], "hedges_g_high": effect[2], "detectable_difference": order.detectable,
            }
            if d
            else {}
        ),
        **(
            {
                "test_examples": i.examples, "examples_difference_low": i.low, "examples_difference_high": i.high,
                "test_over_examples": i.test, "p_over_examples": i.p, "p_over_examples_holm": order.items_p,
            }
            if i
            else {}
        ),
        "parameters": order.cost("params"),
        "directions": order.cost("directions"),
        "train_per_second": order.cost("train_rate"),
        "inference_per_second": order.cost("inference_rate"),
        "peak_memory_bytes": order.cost("peak_memory"),
        "seconds_a_run": order.cost("seconds"),
    }  # fmt: skip


def finding(c: Comparison, order: Order) -> str:
    """One or two words for the table."""
    d = order.seeds
    if order.scan == c.reference:
        return "reference"
    if d is None:
        return "not run"
    if d.blocks == 1:
        return "one seed: unknown"
    if real(order, c.alpha):
        return "better" if d.mean > 0 else "worse"
    if order.seeds_p <= c.alpha:
        return "on this test set only"
    if order.items is not None and order.items_p <= c.alpha:
        return "needs more seeds"
    return "no difference seen"


def _result_row(c: Comparison, order: Order) -> list[str]:
    metric, d = c.metric, order.seeds
    score = metric.show(order.mean) + (f" ± {metric.show(order.std)}" if not math.isnan(order.std) else "")
    difference = ""
    if d is not None:
        difference = metric.show(d.mean, signed=True)
        if d.blocks > 1:
            difference += f" [{metric.show(d.low, signed=True)}, {metric.show(d.high, signed=True)}]"
    p_seeds = _p(order.seeds_p) if d is not None and d.blocks > 1 else ""
    p_items = _p(order.items_p) if order.items is not None else ""
    return [order.scan, score, str(len(order.runs)), difference, p_seeds, p_items, finding(c, order)]


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _rate(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from .checkpoints import write_atomically

    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))

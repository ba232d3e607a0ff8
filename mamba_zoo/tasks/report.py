"""The report of a comparison: one HTML file that needs nothing else, beside two CSV files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from ._comparison import MIN_BLOCKS, Comparison, finite
from ._run_store import flatten
from ._tables import cost_rows, result_rows, write_csv


def write_all(c: Comparison, out: str | Path, page: bool = True) -> None:
    """`results.csv`, `summary.csv` and, with `page`, `report.html` in `out`; nothing if no run has finished."""
    if not c.runs:
        return
    from .checkpoints import write_atomically

    out = Path(out)
    write_csv(c, out)
    if page:
        write_atomically(out / "report.html", lambda file: file.write(render(c).encode()))


def render(c: Comparison) -> str:
    """The report as one HTML page: no script, no other file, nothing from the network."""
    title = f"Scan orders of {c.settings.get('model', 'the model')} on {_data_name(c)}"
    sections = [
        _verdict(c),
        _section("Scores", _table(*result_rows(c), controls=_control_rows(c)) + _figures(c, ("scores", "differences"))),
        _section("Cost", _table(*cost_rows(c), controls=_control_rows(c)) + _figures(c, ("costs",))),
        _section("Learning", _figures(c, ("curves",))),
        _section("Ranks", _ranks(c)),
        _section("The orders", _orders(c)),
        _section("Details of the tests", _details(c)),
        _section("How to read this", _HOW_TO_READ.format(confidence=f"{100 * (1 - c.alpha):g}", alpha=f"{c.alpha:g}")),
        _section("Settings and machine", _settings(c)),
    ]
    body = "\n".join(s for s in sections if s)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def _verdict(c: Comparison) -> str:
    first, *rest = c.verdict
    items = "".join(f"<li>{html.escape(s)}</li>" for s in rest)
    notes = "".join(f"<li>{html.escape(s)}</li>" for s in c.notes)
    state = f"{len(c.runs)} of {c.planned} runs, {len(c.orders)} orders, seeds {', '.join(map(str, c.seeds))}"
    return (
        f'<section class="verdict" aria-label="Verdict"><p class="lead">{html.escape(first)}</p><ul>{items}</ul>'
        + (f'<p class="small"><strong>Bear in mind</strong></p><ul class="small">{notes}</ul>' if notes else "")
        + f'<p class="small">{html.escape(state)}.</p></section>'
    )


def _figures(c: Comparison, names: Sequence[str]) -> str:
    from ._figures import FIGURES, svg

    parts = []
    for name in names:
        figure = FIGURES[name](c)
        if figure is not None:
            parts.append(_image(svg(figure), _alt(c, name), _CAPTIONS[name].format(reference=html.escape(c.reference))))
    return "".join(parts)


def _alt(c: Comparison, name: str) -> str:
    """The figure in words, numbers included."""
    means = "; ".join(f"{o.scan} {c.metric.score(o.mean)}" for o in c.orders)
    texts = {
        "scores": f"Dot plot of the {c.metric.name} of every seed. Means: {means}.",
        "differences": f"Differences to {c.reference} with intervals: "
        + "; ".join(
            f"{o.scan} {c.metric.show(o.seeds.mean, True)} from {c.metric.show(o.seeds.low, True)} to "
            f"{c.metric.show(o.seeds.high, True)}"
            for o in c.orders
            if o.seeds
        )
        + ".",
        "costs": f"Scatter plot of {c.metric.name} against training speed; the numbers are in the tables above.",
        "curves": f"Validation {c.metric.name} by epoch, one line an order. Final test means: {means}.",
        "ranks": "Critical-difference diagram. Mean ranks: "
        + (
            "; ".join(f"{o.scan} {r:.2f}" for o, r in zip(c.orders, c.friedman.ranks, strict=True))
            if c.friedman
            else ""
        )
        + ".",
        "locality": f"Scatter plot of {c.metric.name} against locality; the numbers are in the table above.",
    }
    return texts[name]


def _ranks(c: Comparison) -> str:
    if c.friedman is None:
        return ""
    f = c.friedman
    if len(c.orders) < 3:
        return ""
    text = (
        f"<p>Friedman test over {f.blocks} seeds: chi-square {f.chi2:.2f}, p = {f.p:.3g}, by permutation within seeds. "
        + ("The orders differ somewhere." if f.p <= c.alpha else "No difference among the orders is shown.")
        + "</p>"
    )
    if f.blocks < MIN_BLOCKS:
        return text + f"<p>A critical-difference diagram needs {MIN_BLOCKS} seeds or more to mean anything.</p>"
    return text + _figures(c, ("ranks",))


def _orders(c: Comparison) -> str:
    from ._figures import NEAR, drawing, scan_statistics, svg

    if c.settings.get("grid", ()) is None:
        return "<p>Orders follow from each sample, so that there is no one picture of them.</p>"
    grid = " x ".join(str(n) for n in c.settings.get("grid", ()))
    parts, rows = [], []
    for order in c.orders:
        name = html.escape(order.scan)
        figure, found = drawing(c, order.scan), scan_statistics(c, order.scan)
        if figure is None or found is None:
            reason = "no scan; what surrounds it, such as convolutions, stays" if order.scan == "none" else "not drawn"
            parts.append(f"<h3>{name}</h3><p>{reason}.</p>")
            continue
        alt = f"Paths of {order.scan}, {found['directions']:.0f} directions on a grid of {grid}"
        parts.append(f"<h3>{name}</h3>{_image(svg(figure), alt, '')}")
        rows.append(
            [order.scan, f"{found['directions']:.0f}", f"{found['jump_mean']:.2f}", f"{100 * found['adjacent']:.0f}",
             f"{100 * found['near']:.0f}", f"{found['gap_mean']:.1f}"]
        )  # fmt: skip
    heads = ["order", "directions", "mean move", "moves to a neighbour, %", "neighbours near, %", "steps between them"]
    lead = (
        f"<p>On a grid of {grid}. A move is the way from one token to the next; neighbours are tokens that touch; near "
        f"is at most {NEAR} steps apart, counted over all directions. Colours run from dark (first) to bright (last); "
        "a ring is the first token, a square the last; dotted lines are jumps.</p>"
    )
    return lead + (_table(heads, rows) if rows else "") + _figures(c, ("locality",)) + "".join(parts)


def _details(c: Comparison) -> str:
    show = c.metric
    rows = []
    for o in c.orders:
        d, i = o.seeds, o.items
        if d is None:
            continue
        g, low, high = d.effect(c.alpha)
        effect = "n/a" if d.blocks < 2 else f"{g:.2f} [{low:.2f}, {high:.2f}]"
        rows.append(
            [
                o.scan, d.test, f"{d.p:.3g}", f"{o.seeds_p:.3g}", effect, show.show(o.detectable),
                *((i.test, f"{i.p:.3g}", f"{o.items_p:.3g}", f"[{show.show(i.low, True)}, {show.show(i.high, True)}]")
                  if i else ("none: no per-example scores", "", "", "")),
            ]
        )  # fmt: skip
    if not rows:
        return ""
    heads = ["order", "test over seeds", "p", "p (Holm)", "Hedges' g", "detectable", "test over examples", "p",
             "p (Holm)", "interval over examples"]  # fmt: skip
    seeds = sorted({r.seed for o in c.orders for r in o.runs})
    runs = []
    for o in c.orders:
        by_seed = {r.seed: r for r in o.runs}
        kept = finite(o.runs)
        cells = ["" if s not in by_seed else show.show(by_seed[s].score) if s in kept else "diverged" for s in seeds]
        runs.append([o.scan, *cells])
    return _table(heads, rows) + "<h3>Every run</h3>" + _table(["order", *(f"seed {s}" for s in seeds)], runs)


def _settings(c: Comparison) -> str:
    rows = [[key, str(value)] for key, value in flatten(c.settings)]
    rows += [["reference", c.reference], ["alpha", f"{c.alpha:g}"], ["seeds", ", ".join(map(str, c.seeds))]]
    machines = {tuple(run.machine.items()) for run in c.runs if run.machine}
    for i, found in enumerate(sorted(machines)):
        suffix = f" (environment {i + 1})" if len(machines) > 1 else ""
        rows += [[key + suffix, str(value)] for key, value in found]
    return _table(["setting", "value"], rows, numbers=False)


def _data_name(c: Comparison) -> str:
    data = c.settings.get("data")
    return Path(str(data.get("root", "data"))).name if isinstance(data, dict) else "data"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _control_rows(c: Comparison) -> set[int]:
    return {i for i, order in enumerate(c.orders) if order.control}


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], controls: set[int] | None = None, numbers: bool = True
) -> str:
    head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads)
    lines = []
    for i, row in enumerate(rows):
        first, *rest = (html.escape(cell) for cell in row)
        kind = ' class="control"' if controls and i in controls else ""
        lines.append(f'<tr{kind}><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    kind = "" if numbers else ' class="text"'
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )


def _image(data: bytes, alt: str, caption: str) -> str:
    source = base64.b64encode(data).decode()
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/svg+xml;base64,{source}" alt="{html.escape(alt, quote=True)}">{text}</figure>'


_CAPTIONS = {
    "scores": "Every dot is one seed, the bar across is the mean, the line its confidence interval (cut off where it "
    "is wider than the picture). Controls are grey.",
    "differences": "Difference to {reference}. Solid: interval over seeds (another training). Dotted: interval over "
    "test examples (another test set). An interval that crosses zero leaves open which is better.",
    "costs": "Further right is faster, further up is better. Bars are one standard deviation over seeds.",
    "curves": "Mean over seeds; the band reaches from the lowest to the highest seed.",
    "ranks": "Mean rank over seeds, 1 is best. Orders joined by a grey bar do not differ by the Nemenyi test.",
    "locality": "One dot an order: a picture, not a test. A few orders that differ in many ways cannot show a cause.",
}

_HOW_TO_READ = """
<p><strong>Two questions, two tests.</strong> <em>p seeds</em>: would training again, with other seeds, show the same
winner? It compares the scores of equal seeds: a paired t-test whose spread leans on that of the other orders
(moderated), or an exact sign-flip permutation test where there are enough seeds for one. <em>p examples</em>: would the
models trained here keep their places on other test examples of the same kind? It compares the answers to the same
examples, averaged over seeds: a sign-flip permutation test, or McNemar's test for a single seed. An order is called
better or worse only if both say so.</p>
<p>Every p-value in the first table is corrected for the number of comparisons (Holm): the chance of any false finding
in its column is about {alpha} at most. Intervals are {confidence} % intervals of single differences, not corrected.
<em>Detectable</em> is the true difference that this many seeds would find four times out of five. <em>Hedges' g</em> is
the mean difference in standard deviations of the differences.</p>
<p>No difference seen does not mean equal: look at the interval, and at what was detectable. All of this is about one
model, one budget and one data set. The budget is counted in epochs; an order that is slower had more time.</p>
"""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 56rem; background: #fff; color: #1c1e21;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #dcdfe3; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.verdict { background: #f3f6fa; border-left: 4px solid #0072b2; padding: .8rem 1.1rem; }
.lead { font-size: 1.1rem; font-weight: 600; margin: .2rem 0 .5rem; }
ul { margin: .4rem 0; padding-left: 1.2rem; }
li { margin: .25rem 0; }
.small, figcaption { font-size: .88rem; color: #4b5157; }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
thead th { background: #f7f8f9; border-bottom: 2px solid #c9cdd2; vertical-align: bottom; white-space: normal; }
th[scope=row], thead th:first-child, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
td:last-child { text-align: left; }
.control th, .control td { color: #5d646b; font-style: italic; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
@media print { body { max-width: none; } .wide { overflow: visible; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

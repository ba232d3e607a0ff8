"""A finished (or partial) comparison of scan orders: its runs, and what the statistics say about them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import statistics

MIN_BLOCKS = 5  # seeds below which a rank diagram would only decorate


@dataclass(frozen=True)
class Metric:
    """The number that orders are compared by.

    Attributes:
        name: Key in the trainer's metrics.
        higher_is_better: False for errors and losses.
        percent: Shown in percent, differences in points.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True

    def show(self, value: float, signed: bool = False) -> str:
        """A score or a difference, without its unit."""
        if math.isnan(value):
            return "n/a"
        if math.isinf(value):
            return "any" if value > 0 else "-any"
        return f"{value * 100:{'+' if signed else ''}.1f}" if self.percent else f"{value:{'+' if signed else ''}.4g}"

    def difference(self, value: float, signed: bool = False) -> str:
        """A difference with its unit."""
        return self.show(value, signed) + (" points" if self.percent else "")

    def score(self, value: float) -> str:
        """A score with its unit."""
        return self.show(value) + (" %" if self.percent else "")


@dataclass(frozen=True)
class Run:
    """One training of one order with one seed.

    Attributes:
        scan: Name of the order.
        seed: Of initialisation, data order and augmentation.
        score: The metric on the test set; nan if training diverged.
        curve: `(epoch, validation score)` pairs.
        items: Score of every test example `(examples,)`, None if the trainer keeps none.
        params: Number of parameters.
        directions: Visiting orders that the scan runs side by side; None for a control without a scan.
        seconds: Wall time of the run.
        train_rate: Examples a second in training.
        inference_rate: Examples a second in inference.
        peak_memory: Bytes at the peak of training.
        machine: Device and versions that the run was made with.
    """

    scan: str
    seed: int
    score: float
    curve: tuple[tuple[float, float], ...] = ()
    items: NDArray[np.float64] | None = None
    params: int | None = None
    directions: int | None = None
    seconds: float | None = None
    train_rate: float | None = None
    inference_rate: float | None = None
    peak_memory: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What is known of one order. Differences are to the reference, and positive ones are improvements.

    Attributes:
        scan: Its name.
        control: Whether it is there to tell what scanning in order is worth at all.
        runs: Its finished runs.
        mean: Mean score over seeds.
        std: Standard deviation over seeds.
        low: Lower end of the interval of the mean.
        high: Upper end.
        seeds: Paired differences over seeds; None for the reference, or without common seeds.
        seeds_p: Their p-value after Holm's correction.
        items: Paired differences over test examples; None if unknown.
        items_p: Their p-value after Holm's correction.
        detectable: True difference that this many seeds would find in 80 % of comparisons, corrected as well.
    """

    scan: str
    control: bool
    runs: tuple[Run, ...]
    mean: float
    std: float
    low: float
    high: float
    seeds: statistics.Paired | None = None
    seeds_p: float = 1.0
    items: statistics.Items | None = None
    items_p: float = 1.0
    detectable: float = math.inf

    def cost(self, name: str) -> float | None:
        """Median over runs of a cost attribute of `Run`; None if no run has it."""
        values = [v for run in self.runs if (v := getattr(run, name)) is not None]
        return float(np.median(values)) if values else None


@dataclass(frozen=True)
class Comparison:
    """Scan orders compared on one model and data set.

    Attributes:
        metric: What was compared.
        reference: The order that all others are compared to.
        alpha: Error rate of the whole family of comparisons, for each of the two questions.
        orders: The reference first, then the others in the order asked for, controls last.
        planned: Number of runs asked for.
        seeds: The seeds asked for.
        friedman: Whether the orders differ at all, over the seeds that every order has; None with too few.
        settings: How the runs were made.
        notes: What a reader must know: failed runs, unequal sizes, mixed machines.
    """

    metric: Metric
    reference: str
    alpha: float
    orders: tuple[Order, ...]
    planned: int
    seeds: tuple[int, ...]
    friedman: statistics.Friedman | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every finished run."""
        return tuple(run for order in self.orders for run in order.runs)

    @property
    def complete(self) -> bool:
        """Whether every planned run is there."""
        return len(self.runs) == self.planned

    @property
    def verdict(self) -> list[str]:
        """The result in plain sentences, the most important first."""
        from ._verdict import verdict

        return verdict(self)

    def __getitem__(self, scan: str) -> Order:
        for order in self.orders:
            if order.scan == scan:
                return order
        raise KeyError(f"{scan!r} was not compared; orders are {', '.join(o.scan for o in self.orders)}")


def analyse(
    runs: Sequence[Run],
    scans: Sequence[str],
    controls: Sequence[str],
    seeds: Sequence[int],
    reference: str,
    metric: Metric | None = None,
    alpha: float = 0.05,
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare finished runs; any subset of those planned will do.

    Args:
        runs: Finished runs, in any order.
        scans: Orders asked for.
        controls: Controls asked for.
        seeds: Seeds asked for.
        reference: One of the orders or controls.
        metric: What to compare.
        alpha: Error rate of the family of comparisons with the reference.
        settings: Kept in the result.

    Raises:
        ValueError: `reference` is not among the orders.
    """
    metric = metric or Metric()
    names = [*scans, *controls]
    if reference not in names:
        raise ValueError(f"reference={reference!r} is not among the orders {', '.join(names)}; add it to scans")
    names.sort(key=lambda name: name != reference)  # stable: only the reference moves
    by_order = {name: tuple(sorted((r for r in runs if r.scan == name), key=lambda r: r.seed)) for name in names}
    orders = [_describe(name, name in controls, by_order[name], alpha) for name in names]
    orders = _against_reference(orders, metric, alpha)
    return Comparison(
        metric, reference, alpha, tuple(orders), len(names) * len(seeds), tuple(seeds),
        _friedman(by_order, metric), dict(settings or {}), tuple(_notes(by_order, metric)),
    )  # fmt: skip


def finite(runs: Sequence[Run]) -> dict[int, Run]:
    """Runs that did not diverge, by seed."""
    return {run.seed: run for run in runs if math.isfinite(run.score)}


def _describe(name: str, control: bool, runs: tuple[Run, ...], alpha: float) -> Order:
    scores = [run.score for run in finite(runs).values()]
    spread = statistics.mean_interval(scores, alpha) if scores else (math.nan, math.nan, -math.inf, math.inf)
    return Order(name, control, runs, *spread)


def _against_reference(orders: list[Order], metric: Metric, alpha: float) -> list[Order]:
    """The orders with their differences to the first, each family of p-values corrected."""
    sign = 1 if metric.higher_is_better else -1
    base, others = finite(orders[0].runs), orders[1:]
    family = max(1, len(others))
    pairs, items = [], []
    for order in others:
        mine = finite(order.runs)
        common = sorted(base.keys() & mine.keys())
        pairs.append(([sign * mine[s].score for s in common], [sign * base[s].score for s in common]))
        items.append(_items([mine[s] for s in common], [base[s] for s in common], sign, alpha))
    shared = statistics.shared_spread([float(np.std(np.subtract(x, y), ddof=1)) for x, y in pairs if len(x) > 1])
    seeds = [statistics.paired(x, y, alpha, family, shared) if x else None for x, y in pairs]
    # One family for the size of the plan: a missing order still counts, or partial tables would be the more generous.
    seeds_p = statistics.holm([1.0 if d is None else d.p for d in seeds])
    items_p = statistics.holm([1.0 if d is None else d.p for d in items])
    result = [orders[0]]
    for i, order in enumerate(others):
        d = seeds[i]
        spread = math.nan if d is None else d.error * math.sqrt(d.blocks)
        seen = math.inf if d is None else statistics.detectable(spread, d.blocks, alpha, comparisons=family)
        result.append(
            dataclasses.replace(order, seeds=d, seeds_p=seeds_p[i], items=items[i], items_p=items_p[i], detectable=seen)
        )
    return result


def _items(mine: list[Run], base: list[Run], sign: int, alpha: float) -> statistics.Items | None:
    x, y = [r.items for r in mine if r.items is not None], [r.items for r in base if r.items is not None]
    if not x or len(x) != len(mine) or len(y) != len(base) or len({len(v) for v in [*x, *y]}) != 1:
        return None
    return statistics.items(sign * np.stack(x), sign * np.stack(y), alpha)


def _friedman(by_order: Mapping[str, tuple[Run, ...]], metric: Metric) -> statistics.Friedman | None:
    tables = [finite(runs) for runs in by_order.values()]
    common = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    if len(tables) < 3 or len(common) < 2:
        return None
    return statistics.friedman([[t[s].score for t in tables] for s in common], metric.higher_is_better)


def _notes(by_order: Mapping[str, tuple[Run, ...]], metric: Metric) -> list[str]:
    notes = []
    for name, runs in by_order.items():
        if lost := [run.seed for run in runs if not math.isfinite(run.score)]:
            kept = f"{'its seed is' if len(lost) == 1 else 'their seeds are'} left out of its means and tests"
            notes.append(
                f"{name} diverged with seed {', '.join(map(str, lost))} ({metric.name} is not a number); {kept}, "
                f"which flatters {name}."
            )
    params = {name: p for name, runs in by_order.items() if (p := next((r.params for r in runs if r.params), None))}
    directions = {
        name: k for name, runs in by_order.items() if (k := next((r.directions for r in runs if r.directions), None))
    }
    if len(set(params.values())) > 1:
        sizes = ", ".join(f"{name} {p:,}" for name, p in params.items())
        notes.append(f"The models differ in size, and part of any difference may be that: {sizes} parameters.")
    if len(set(directions.values())) > 1:
        counts = ", ".join(f"{name} {k}" for name, k in directions.items())
        notes.append(
            f"The orders differ in their number of directions ({counts}), hence in parameters and time; "
            "match_directions=True (--match-directions) gives all of them the same number."
        )
    machines = {tuple(sorted(run.machine.items())) for runs in by_order.values() for run in runs if run.machine}
    if len(machines) > 1:
        keys = sorted({k for a in machines for k, _ in a if len({dict(m).get(k) for m in machines}) > 1})
        found = "; ".join(f"{k}: {', '.join(sorted({str(dict(m).get(k)) for m in machines}))}" for k in keys)
        notes.append(f"The runs come from different environments ({found}): do not compare their speed and memory.")
    return notes

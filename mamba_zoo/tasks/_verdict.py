"""The result of a comparison in plain sentences, noise called noise."""

from __future__ import annotations

import math

import numpy as np

from . import statistics
from ._comparison import Comparison, Metric, Order

_CONTROLS = {"none": "scanning helps on this data", "random": "the order matters on this data"}


def verdict(c: Comparison) -> list[str]:
    """Sentences, the most important first; see `Comparison.verdict`."""
    done = [order for order in c.orders if not math.isnan(order.mean)]
    if not done:
        return [f"No run has finished yet: 0 of {c.planned}."]
    text = [] if c.complete else [f"Partial: {len(c.runs)} of {c.planned} runs are done; all below may still change."]
    others = [order for order in done if order.seeds is not None]
    text.append(_headline(c, done, others))
    text += [_sentence(c, order, order.seeds) for order in others if order.seeds]
    if power := _power(c, others):
        text.append(power)
    if best := _choice(c, done):
        text.append(best)
    return text


def real(order: Order, alpha: float) -> bool:
    """Whether the difference to the reference holds over seeds, and over test examples where these are known."""
    return order.seeds_p <= alpha and (order.items is None or order.items_p <= alpha)


def _headline(c: Comparison, done: list[Order], others: list[Order]) -> str:
    if not others:
        scores = "; ".join(f"{o.scan} {c.metric.score(o.mean)}" for o in done)
        return f"Nothing can be compared with {c.reference} yet ({scores})."
    if max(o.seeds.blocks for o in others if o.seeds) == 1:
        return "One seed for each order: no difference below can be told from luck in training. Use 5 seeds or more."
    better = [o for o in others if real(o, c.alpha) and o.seeds and o.seeds.mean > 0]
    worse = [o for o in others if real(o, c.alpha) and o.seeds and o.seeds.mean < 0]
    if not better and not worse:
        return f"No order is shown to be better or worse than {c.reference}: the differences could be noise."
    parts = []
    if better:
        parts.append(f"{_names(better)} {'is' if len(better) == 1 else 'are'} better than {c.reference}")
    if worse:
        parts.append(f"{_names(worse)} {'is' if len(worse) == 1 else 'are'} worse than {c.reference}")
    open_ = [o for o in others if not real(o, c.alpha)]
    rest = f"; {_names(open_)} cannot be told apart from it" if open_ else ""
    return " and ".join(parts) + rest + "."


def _sentence(c: Comparison, order: Order, d: statistics.Paired) -> str:
    """One order against the reference."""
    metric, name, reference = c.metric, _title(order), c.reference
    signed = metric.difference(d.mean, signed=True)
    if d.blocks == 1:
        return f"{name} and {reference}: difference {signed} with one seed each."
    over_seeds = f"{_p(order.seeds_p)} over {d.blocks} seeds"
    over_items = f"{_p(order.items_p)} over {order.items.examples:,} test examples" if order.items else ""
    result = f"{name} is {'better' if d.mean > 0 else 'worse'} than {reference}"
    amount = f"by {metric.difference(abs(d.mean))} ({100 * (1 - c.alpha):g} % interval {_interval(metric, d)}; "
    sure, sure_items = order.seeds_p <= c.alpha, order.items is not None and order.items_p <= c.alpha
    if sure and order.items is None:
        return f"{result} {amount}{over_seeds}): training again should show it again."
    if sure and sure_items:
        return (
            f"{result} {amount}{over_seeds}, {over_items}): expect it again after another training, and on other "
            "examples of the same kind."
        )
    if sure:
        return (
            f"{result} on this test set {amount}{over_seeds}), but the test set is too small to say so of other "
            f"examples ({over_items})."
        )
    if sure_items:
        return (
            f"{name} and {reference}: the models trained here differ by {signed} ({over_items}), but {d.blocks} seeds "
            f"cannot tell this from luck in training ({over_seeds}): train more seeds before believing it."
        )
    if d.mean == d.std == 0:
        return (
            f"{name} and {reference} score exactly alike with every one of {d.blocks} seeds: the order does not reach "
            "the model's answers. Few tokens (small images) or very short training can be why."
        )
    unseen = metric.difference(order.detectable)
    sentence = (
        f"{name} and {reference} do not differ measurably: difference {metric.show(d.mean, signed=True)} ± "
        f"{metric.difference((d.high - d.low) / 2)}, {over_seeds}; with {d.blocks} seeds a true difference under "
        f"{unseen} would mostly go unseen."
    )
    return sentence + (f" So nothing here shows that {_CONTROLS[order.scan]}." if order.scan in _CONTROLS else "")


def _power(c: Comparison, others: list[Order]) -> str | None:
    """How many seeds it would take to see a difference worth having."""
    spreads = [o.seeds.std for o in others if o.seeds and o.seeds.blocks > 1]
    if not spreads:
        return None
    std = float(np.median(spreads))
    wanted = 0.01 if c.metric.percent else 0.02 * abs(c.orders[0].mean)
    needed = statistics.blocks_needed(std, wanted, c.alpha, comparisons=len(c.orders) - 1)
    if std == 0 or needed is None or needed <= len(c.seeds):
        return None
    return (
        f"To see a difference of {c.metric.difference(wanted)} between two of these orders (80 % of the time, all "
        f"comparisons corrected) takes about {needed} seeds; this comparison has {len(c.seeds)}."
    )


def _choice(c: Comparison, done: list[Order]) -> str | None:
    """A warning about choosing the best mean, where it is not the reference anyway."""
    orders = [o for o in done if not o.control]
    sign = 1 if c.metric.higher_is_better else -1
    best = max(orders, key=lambda o: sign * o.mean, default=None)
    if best is None or len(orders) < 2:
        return None
    if best.scan != c.reference and real(best, c.alpha):
        return None
    return (
        f"{best.scan} has the best mean, {c.metric.score(best.mean)}. As the best of {len(orders)} picked on the test "
        "set it is likely to be flattered; where scores do not differ, choose by speed and memory."
    )


def _title(order: Order) -> str:
    known = {"none": "none (no scan at all)", "random": "random (shuffled orders)"}
    return known.get(order.scan, order.scan)


def _interval(metric: Metric, d: statistics.Paired) -> str:
    ends = sorted((abs(d.low), abs(d.high))) if d.low * d.high > 0 else (d.low, d.high)
    return f"{metric.show(ends[0])} to {metric.show(ends[1])}"


def _names(orders: list[Order]) -> str:
    names = [o.scan for o in orders]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"

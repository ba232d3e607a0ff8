"""Statistics for comparing a few trained models: paired tests over seeds and over test examples, and their power.

Two questions need two tests. *Would another training give the same winner?* is answered over seeds (`paired`). *Would
other test examples give the same winner, for these trained models?* is answered over examples (`items`, `mcnemar`).
Everything here is numpy and scipy on plain arrays; a random draw uses a fixed seed, so a table never changes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

EXACT_FLIPS = 16  # sign flips are enumerated up to 2**16 and drawn at random beyond
_DRAWS = 20_000


@dataclass(frozen=True)
class Paired:
    """Differences `x - y` over blocks (seeds), each block measured under both.

    Attributes:
        blocks: Number of pairs.
        mean: Mean difference.
        std: Standard deviation of the differences; nan with one block.
        error: Standard error of the mean that interval and test use; inf with one block.
        low: Lower end of the confidence interval of the mean (Student's t); -inf with one block.
        high: Upper end.
        p: Two-sided p-value of `test`; 1 with one block.
        test: "paired t-test", "moderated paired t-test" or "sign-flip permutation test".
    """

    blocks: int
    mean: float
    std: float
    error: float
    low: float
    high: float
    p: float
    test: str

    def effect(self, alpha: float = 0.05) -> tuple[float, float, float]:
        """Hedges' g of the differences (mean over std, corrected for few blocks), and its noncentral t interval."""
        if self.blocks < 2:
            return math.nan, -math.inf, math.inf
        return _hedges(self.mean, self.std, self.blocks, alpha)


@dataclass(frozen=True)
class Items:
    """Difference of two sets of trained models over the test examples they share.

    Attributes:
        examples: Number of test examples.
        mean: Mean difference of the per-example scores, each averaged over seeds first.
        low: Lower end of the paired bootstrap interval over examples.
        high: Upper end.
        p: Two-sided p-value; exact McNemar for one seed of right/wrong answers, else a sign-flip permutation test.
        test: Which of them it is.
        error: Standard error of the mean over examples.
    """

    examples: int
    mean: float
    low: float
    high: float
    p: float
    test: str
    error: float


@dataclass(frozen=True)
class Friedman:
    """Do several orders differ at all, by their ranks within each block?

    Attributes:
        ranks: Mean rank of every column, 1 for the best.
        chi2: Friedman's statistic, corrected for ties.
        p: Its p-value, by permuting ranks within blocks (the chi-square approximation needs more blocks than one has).
        blocks: Number of blocks.
    """

    ranks: NDArray[np.float64]
    chi2: float
    p: float
    blocks: int


def paired(
    x: ArrayLike, y: ArrayLike, alpha: float = 0.05, comparisons: int = 1, shared_std: float | None = None
) -> Paired:
    """Paired comparison of scores `x` and `y` `(blocks,)`.

    Student's t by default. With `shared_std`, the typical spread of the other comparisons counts as `borrowed` more
    blocks in estimating this one's (a moderated t-test: Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3(1), with a fixed
    prior): with 3 seeds, a spread estimated from 3 numbers alone would hide almost everything. Where there are blocks
    enough for the exact sign-flip test to reach a tenth of `alpha / comparisons`, it replaces the t-test. The choice
    depends on the number of blocks alone, never on the data.

    Args:
        x: Scores.
        y: Scores of the reference in the same blocks.
        alpha: Error rate of the interval.
        comparisons: Size of the family that will be corrected with `holm`.
        shared_std: Standard deviation of differences typical of the family; see `shared_spread`.

    Raises:
        ValueError: shapes that differ, or nothing to compare.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"x and y must be (blocks,) with at least one block, not {x.shape} and {y.shape}")
    d = x - y
    n, mean, inf = len(d), float(d.mean()), math.inf
    if n == 1:
        return Paired(1, mean, math.nan, inf, -inf, inf, 1.0, "none: one seed")
    std = float(d.std(ddof=1))
    if np.ptp(d) <= 1e-12 * max(1.0, float(np.abs(d).max())):
        std = 0.0  # equal differences, up to rounding
    more = 0.0 if shared_std is None else borrowed(comparisons, n)
    df = n - 1 + more
    error = math.sqrt(((n - 1) * std**2 + more * (shared_std or 0.0) ** 2) / df / n)
    half = float(stats.t.ppf(1 - alpha / 2, df)) * error
    if 2.0 ** (1 - n) <= alpha / comparisons / 10:
        p, test = sign_flip(d), "sign-flip permutation test"
    elif error == 0:
        # A t-test of identical differences would claim certainty; few blocks cannot give any.
        p, test = (1.0 if mean == 0 else 2.0 ** (1 - n)), "sign-flip permutation test"
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, df))
        test = "moderated paired t-test" if more else "paired t-test"
    return Paired(n, mean, std, error, mean - half, mean + half, p, test)


def shared_spread(stds: Sequence[float]) -> float | None:
    """The typical standard deviation of several comparisons' differences (root mean square); None for one alone."""
    known = [std for std in stds if math.isfinite(std)]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) > 1 else None


def borrowed(comparisons: int, blocks: int) -> float:
    """How many blocks the other comparisons' spread is worth in `paired`.

    Few enough that the family's error rate stays near alpha when the spreads really differ: in simulations with 3 to 6
    orders and 3 to 5 seeds, at most 0.055 for alpha = 0.05 with one order, or the reference, three times as noisy as
    the others.
    """
    return min(3.0, (comparisons - 1) * (blocks - 1) / 4)


def sign_flip(d: ArrayLike) -> float:
    """Two-sided p-value of a zero mean: the share of sign patterns whose mean is as far from zero as that of `d`.

    Exact up to `EXACT_FLIPS` differences; drawn with a fixed seed beyond, where p is never below 1 / (draws + 1).
    """
    d = np.asarray(d, float)
    observed, size = abs(float(d.sum())), np.abs(d[d != 0])
    if not len(size):
        return 1.0
    reach = observed * (1 - 1e-9)
    if len(size) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for v in size:
            sums = np.concatenate([sums + v, sums - v])
        return float(np.mean(np.abs(sums) >= reach))
    rng = np.random.default_rng(0)
    # Examples share few distinct differences, so the flips of each value are one binomial number.
    values, counts = np.unique(size, return_counts=True)
    draws = _draws(len(values))
    up = rng.binomial(counts, 0.5, size=(draws, len(counts)))
    beyond = int(np.sum(np.abs((2 * up - counts) @ values) >= reach))
    return (1 + beyond) / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that may be compared with alpha as if each were the only one."""
    m, corrected, running = len(p), [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p[i])):
        running = max(running, min(1.0, (m - rank) * p[i]))
        corrected[i] = running
    return corrected


def detectable(std: float, blocks: int, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1) -> float:
    """The true mean difference that `paired` would find over `blocks` pairs with probability `power`.

    Args:
        std: Standard deviation of the differences.
        blocks: Number of pairs; one pair can detect nothing (inf).
        alpha: Two-sided error rate of the family.
        power: Wanted probability.
        comparisons: Size of the family; the first step of Holm's correction is counted.
    """
    if blocks < 2 or math.isnan(std):
        return math.inf
    return std * _standardised(blocks, blocks - 1 + borrowed(comparisons, blocks), alpha / comparisons, power)


def blocks_needed(
    std: float, difference: float, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1, most: int = 999
) -> int | None:
    """The fewest seeds with which `detectable` reaches `difference`; None beyond `most`."""
    if std == 0:
        return 2
    if not math.isfinite(std) or difference <= 0 or detectable(std, most, alpha, power, comparisons) > difference:
        return None
    low, high = 1, most  # low cannot, high can
    while high - low > 1:
        middle = (low + high) // 2
        found = detectable(std, middle, alpha, power, comparisons) <= difference
        low, high = (low, middle) if found else (middle, high)
    return high


def friedman(scores: ArrayLike, higher_is_better: bool = True) -> Friedman:
    """Friedman's test over `scores` `(blocks, orders)`, p by permutation within blocks.

    Raises:
        ValueError: fewer than 3 orders or 2 blocks.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 3:
        raise ValueError(f"friedman needs (blocks >= 2, orders >= 3), not {scores.shape}; use paired for two orders")
    n, k = scores.shape
    # Rounding noise must not break ties: models with the same number of right answers rank alike.
    ranks = stats.rankdata(np.round(-scores if higher_is_better else scores, 12), axis=1)
    spread = float(((ranks - (k + 1) / 2) ** 2).sum()) / (n * (k - 1))
    if spread == 0:
        return Friedman(ranks.mean(0), 0.0, 1.0, n)

    def between(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((sums / n - (k + 1) / 2) ** 2).sum(-1) * n / spread

    chi2 = float(between(ranks.sum(0)))
    rng, sums = np.random.default_rng(0), np.zeros((_DRAWS, k))
    for row in ranks:
        sums += rng.permuted(np.broadcast_to(row, (_DRAWS, k)), axis=1)
    beyond = int(np.sum(between(sums) >= chi2 * (1 - 1e-9)))
    return Friedman(ranks.mean(0), chi2, (1 + beyond) / (1 + _DRAWS), n)


def critical_difference(orders: int, blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of mean ranks (Demsar 2006, JMLR 7, section 3.2.2)."""
    q = float(stats.studentized_range.ppf(1 - alpha, orders, np.inf)) / math.sqrt(2)
    return q * math.sqrt(orders * (orders + 1) / (6 * blocks))


def cliques(ranks: ArrayLike, difference: float) -> list[tuple[int, ...]]:
    """Groups of orders whose mean ranks lie within `difference`, none inside another: bars of the diagram.

    Returns:
        Column indices of each group of two or more, best rank first.
    """
    ranks = np.asarray(ranks, float)
    by_rank = np.argsort(ranks, kind="stable")
    found: list[tuple[int, ...]] = []
    for first in range(len(ranks)):
        last = max(j for j in range(first, len(ranks)) if ranks[by_rank[j]] - ranks[by_rank[first]] <= difference)
        group = tuple(int(i) for i in by_rank[first : last + 1])
        if len(group) > 1 and not any(set(group) <= set(other) for other in found):
            found.append(group)
    return found


def mcnemar(x: ArrayLike, y: ArrayLike) -> float:
    """Exact McNemar test of two classifiers' right/wrong answers `(examples,)`: p of equal error rates."""
    x, y = np.asarray(x, bool), np.asarray(y, bool)
    if x.shape != y.shape:
        raise ValueError(f"x and y must be answers to the same examples, not {x.shape} and {y.shape}")
    only_x, only_y = int(np.sum(x & ~y)), int(np.sum(~x & y))
    if only_x + only_y == 0:
        return 1.0
    return float(stats.binomtest(only_x, only_x + only_y, 0.5).pvalue)


def items(x: ArrayLike, y: ArrayLike, alpha: float = 0.05) -> Items:
    """Compare per-example scores `(seeds, examples)` of two orders on the test set they share.

    Scores are averaged over seeds first: seeds answer the same examples, and counting them as more examples would make
    the test far too sure of itself.

    Args:
        x: Scores, for instance 1 where the answer was right.
        y: Scores of the reference for the same examples; its number of seeds may differ.
        alpha: 1 - confidence of the interval.

    Raises:
        ValueError: another shape, or different numbers of examples.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(f"x and y must be (seeds, examples) on the same examples, not {x.shape} and {y.shape}")
    d = np.round(x.mean(0) - y.mean(0), 12)
    n = len(d)
    values, counts = np.unique(d, return_counts=True)
    rng = np.random.default_rng(0)
    means = rng.multinomial(n, counts / n, size=_draws(len(values))) @ values / n
    low, high = (float(q) for q in np.quantile(means, [alpha / 2, 1 - alpha / 2]))
    answers = len(x) == len(y) == 1 and bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
    p, test = (mcnemar(x[0], y[0]), "exact McNemar test") if answers else (sign_flip(d), "sign-flip permutation test")
    return Items(n, float(d.mean()), low, high, p, test, float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf)


def mean_interval(x: ArrayLike, alpha: float = 0.05) -> tuple[float, float, float, float]:
    """Mean, standard deviation, and the t interval of the mean over seeds; one seed has no spread and infinite ends."""
    x = np.asarray(x, float)
    if len(x) < 2:
        return float(x.mean()), math.nan, -math.inf, math.inf
    mean, std = float(x.mean()), float(x.std(ddof=1))
    half = float(stats.t.ppf(1 - alpha / 2, len(x) - 1)) * std / math.sqrt(len(x))
    return mean, std, mean - half, mean + half


def _draws(values: int) -> int:
    """Random draws over `values` distinct numbers: enough for p = 0.001, fewer where each costs more."""
    return max(2000, min(_DRAWS, 10_000_000 // values))


def _standardised(blocks: int, df: float, alpha: float, power: float) -> float:
    """`detectable` for differences of unit standard deviation, known with `df` degrees of freedom."""
    critical = float(stats.t.ppf(1 - alpha / 2, df))

    def missing(effect: float) -> float:
        return power - float(stats.nct.sf(critical, df, effect * math.sqrt(blocks)))

    high = 1.0
    while missing(high) > 0:
        high *= 2
    return float(optimize.brentq(missing, 0.0, high))  # type: ignore[arg-type]


def _hedges(mean: float, std: float, n: int, alpha: float) -> tuple[float, float, float]:
    """Hedges' g of n differences with its interval (Hedges & Olkin 1985; noncentral t)."""
    if std == 0:
        edge = 0.0 if mean == 0 else math.copysign(math.inf, mean)
        return edge, edge, edge
    df, t = n - 1, mean / std * math.sqrt(n)
    bias = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else 0.5
    ends = (math.copysign(1.0, t) * _noncentrality(abs(t), df, q) for q in (1 - alpha / 2, alpha / 2))
    low, high = sorted(end / math.sqrt(n) * bias for end in ends)
    return mean / std * bias, low, high


def _noncentrality(t: float, df: int, quantile: float) -> float:
    """The shift of the noncentral t distribution that puts `t >= 0` at its quantile `quantile`."""
    guess = t * math.sqrt(float(stats.chi2.ppf(1 - quantile, df)) / df)
    if t > 30:  # beyond, scipy's distribution breaks down and the spread of the standard deviation is all that counts
        return guess
    low, high = min(guess, 0.0) - 5.0, max(guess, t) + 5.0
    return float(optimize.brentq(lambda shift: float(stats.nct.cdf(t, df, shift)) - quantile, low, high))  # type: ignore[arg-type]

"""Statistics against scipy and numbers worked out by hand, and their error rates on data whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from mamba_zoo.tasks import statistics


def test_paired_agrees_with_scipy():
    x, y = np.array([0.81, 0.84, 0.80, 0.86]), np.array([0.79, 0.80, 0.81, 0.82])
    found, want = statistics.paired(x, y), stats.ttest_rel(x, y)
    assert found.test == "paired t-test"
    assert found.p == pytest.approx(want.pvalue)
    interval = want.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.std == pytest.approx(np.std(x - y, ddof=1))


def test_paired_with_many_blocks_is_the_exact_sign_flip_test():
    d = np.array([0.3, -0.1, 0.4, 0.2, 0.5, -0.2, 0.1, 0.6, 0.7, 0.35, 0.25])
    found = statistics.paired(d, np.zeros(11))
    want = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**11)
    assert found.test == "sign-flip permutation test"
    assert found.p == pytest.approx(want.pvalue)


def test_moderated_interval_by_hand():
    # 3 seeds, 5 comparisons: 4 * 2 / 4 = 2 blocks borrowed; variance (2 * 1 + 2 * 4) / 4 with 4 degrees of freedom
    found = statistics.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], comparisons=5, shared_std=2.0)
    error = math.sqrt(2.5 / 3)
    assert found.error == pytest.approx(error)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 4) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(2 / error, 4))


def test_identical_differences_are_not_certainty():
    assert statistics.paired([0.8, 0.8, 0.8], [0.7, 0.7, 0.7]).p == 0.25
    assert statistics.paired([0.8, 0.8, 0.8], [0.8, 0.8, 0.8]).p == 1


def test_effect_size_and_its_interval():
    d = np.array([1.0, 2.0, 0.5, 1.5, 1.0, 3.0])
    g, low, high = statistics.paired(d, np.zeros(6)).effect()
    t = d.mean() / d.std(ddof=1) * math.sqrt(6)
    bias = 1 - 3 / (4 * 5 - 1)  # Hedges' usual approximation
    assert g == pytest.approx(t / math.sqrt(6) * bias, rel=0.01)
    assert stats.nct.cdf(t, 5, low * math.sqrt(6) / g * t / math.sqrt(6)) == pytest.approx(0.975, abs=1e-6)
    assert stats.nct.cdf(t, 5, high * math.sqrt(6) / g * t / math.sqrt(6)) == pytest.approx(0.025, abs=1e-6)
    assert statistics.paired([1.0, 1.001, 0.999], [0, 0, 0]).effect()[1] > 0  # beyond scipy's noncentral t


def test_one_seed_says_nothing():
    found = statistics.paired([0.9], [0.1])
    assert found.p == 1
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert statistics.detectable(found.std, 1) == math.inf


def test_paired_rejects_unequal_lengths():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        statistics.paired([1, 2], [1, 2, 3])


def test_sign_flip_drawn_agrees_with_normal_theory():
    d = np.repeat([1.0, -1.0, 0.0], [60, 40, 900])
    assert statistics.sign_flip(d) == pytest.approx(stats.binomtest(60, 100).pvalue, abs=0.01)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]


def test_mcnemar_by_hand():
    x = np.array([1] * 9 + [0] * 1 + [1] * 50)
    y = np.array([0] * 9 + [1] * 1 + [1] * 50)
    assert statistics.mcnemar(x, y) == pytest.approx(2 * (1 + 10) / 2**10)
    assert statistics.mcnemar(x, x) == 1


def test_items_of_one_seed_is_mcnemar_and_seeds_are_no_extra_examples():
    draw = np.random.default_rng(0)
    x, y = draw.random(300) < 0.85, draw.random(300) < 0.75
    one = statistics.items(x[None], y[None])
    assert one.test == "exact McNemar test"
    assert one.p == statistics.mcnemar(x, y)
    three = statistics.items(np.stack([x] * 3), np.stack([y] * 3))
    assert three.p == pytest.approx(one.p, abs=0.01)  # the same answers three times over are no more evidence
    d = x.astype(float) - y
    assert (one.low + one.high) / 2 == pytest.approx(d.mean(), abs=0.005)
    assert one.high - one.low == pytest.approx(2 * 1.96 * d.std(ddof=1) / math.sqrt(300), rel=0.05)


def test_detectable_is_detected_four_times_of_five():
    draw = np.random.default_rng(1)
    effect = statistics.detectable(1.0, 6)
    found = [statistics.paired(effect + draw.normal(size=6), np.zeros(6)).p <= 0.05 for _ in range(1500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_blocks_needed_is_the_smallest_number():
    n = statistics.blocks_needed(1.0, 0.8, comparisons=3)
    assert n is not None
    assert statistics.detectable(1.0, n, comparisons=3) <= 0.8 < statistics.detectable(1.0, n - 1, comparisons=3)
    assert statistics.blocks_needed(1.0, 1e-6) is None


def test_friedman_and_nemenyi_agree_with_published_tables():
    scores = np.random.default_rng(2).normal(loc=[0, 0, 0.3, 0.5], size=(30, 4))
    found, want = statistics.friedman(scores), stats.friedmanchisquare(*scores.T)
    assert found.chi2 == pytest.approx(want.statistic)
    assert found.p == pytest.approx(want.pvalue, rel=0.15)
    assert found.ranks.sum() == pytest.approx(10)
    # Demsar 2006, table 5: q = 2.569 for 4 classifiers; section 3.2.4: 14 data sets give 1.25
    assert statistics.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_friedman_ranks_the_best_first():
    assert statistics.friedman([[3, 2, 1]] * 5).ranks.tolist() == [1, 2, 3]
    assert statistics.friedman([[3, 2, 1]] * 5, higher_is_better=False).ranks.tolist() == [3, 2, 1]


def test_cliques_join_neighbours_only():
    assert statistics.cliques([1.0, 3.0, 1.5, 2.4], 1.0) == [(0, 2), (2, 3), (3, 1)]
    assert statistics.cliques([1.0, 3.0], 1.0) == []


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", [(1, 1, 1, 1, 1), (3, 1, 1, 1, 1), (1, 1, 1, 1, 3)], ids=str)
def test_false_findings_stay_rare(seeds, noise):
    """The chance of any finding among equal orders, even where one is noisier than the others."""
    draw, found, trials = np.random.default_rng(3), 0, 600
    for _ in range(trials):
        scores = draw.normal(size=(seeds, 1)) + draw.normal(size=(seeds, 5)) * noise
        found += min(_family(scores)) <= 0.05
    assert found / trials <= 0.055 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_large_effects_are_found_with_three_seeds():
    draw = np.random.default_rng(4)
    found = [
        _family(draw.normal(size=(3, 1)) + draw.normal(size=(3, 5)) + [0, 6, 0, 0, 0])[0] <= 0.05 for _ in range(200)
    ]
    assert np.mean(found) > 0.8


def _family(scores: np.ndarray) -> list[float]:
    """Corrected p-values of every column against the first."""
    k = scores.shape[1] - 1
    shared = statistics.shared_spread([float(np.std(scores[:, j + 1] - scores[:, 0], ddof=1)) for j in range(k)])
    pairs = [statistics.paired(scores[:, j + 1], scores[:, 0], 0.05, k, shared) for j in range(k)]
    return statistics.holm([d.p for d in pairs])

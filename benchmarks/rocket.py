"""Random convolutional kernels and a ridge classifier, ROCKET (arXiv:1910.13051): a strong baseline for series."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np


def rocket_accuracy(
    train: Sequence[np.ndarray],
    train_labels: Sequence[str],
    test: Sequence[np.ndarray],
    test_labels: Sequence[str],
    seed: int = 0,
    kernels: int = 2000,
) -> float:
    """Accuracy on the test series of a ridge classifier over maxima and parts above zero of random convolutions.

    Every channel is scaled by the training series. Each kernel has 7, 9 or 11 taps, a random dilation that fits the
    shortest series, and reads a random choice of channels.

    Args:
        train: Series `(l, channels)`, of any lengths.
        train_labels: Their classes.
        test: Series.
        test_labels: Their classes.
        seed: Of the kernels.
        kernels: How many.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = np.concatenate(train)
    mean, deviation = np.nanmean(steps, 0), np.nanstd(steps, 0) + 1e-8
    scaled = [[np.nan_to_num((one - mean) / deviation).astype(np.float64) for one in part] for part in (train, test)]
    made = _make(kernels, min(map(len, train)), len(mean), np.random.default_rng(seed))
    features = [np.stack([_features(one, *made) for one in part]) for part in scaled]
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-3, 3, 10)))
    model.fit(features[0], list(train_labels))
    return float(model.score(features[1], list(test_labels)))


def _make(kernels: int, length: int, channels: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    taps = rng.choice([t for t in (7, 9, 11) if t <= max(length, 7)], kernels)
    weights = np.zeros((kernels, channels, 11))
    dilation, padded = np.ones(kernels, dtype=np.int64), np.zeros(kernels, dtype=np.int64)
    for i, t in enumerate(taps):
        chosen = rng.permutation(channels)[: int(2 ** rng.uniform(0, np.log2(channels + 1)))]
        drawn = rng.standard_normal((len(chosen), t))
        weights[i, chosen, :t] = drawn - drawn.mean(1, keepdims=True)
        dilation[i] = int(2 ** rng.uniform(0, np.log2(max((length - 1) / (t - 1), 1))))
        padded[i] = (t - 1) * dilation[i] // 2 if rng.random() < 0.5 or length < (t - 1) * dilation[i] + 1 else 0
    return weights, rng.uniform(-1, 1, kernels), taps.astype(np.int64), dilation, padded


@numba.njit(cache=False)
def _features(x, weights, bias, taps, dilation, padded):
    """Maximum and part above zero of every convolution of one series `(l, channels)`."""
    length, channels = x.shape
    out = np.zeros(2 * len(bias))
    for i in range(len(bias)):
        reach = (taps[i] - 1) * dilation[i]
        ends = length + 2 * padded[i] - reach
        most, above = -np.inf, 0
        for start in range(-padded[i], -padded[i] + ends):
            total = bias[i]
            for tap in range(taps[i]):
                at = start + tap * dilation[i]
                if 0 <= at < length:
                    for c in range(channels):
                        total += weights[i, c, tap] * x[at, c]
            if total > most:
                most = total
            if total > 0:
                above += 1
        if ends > 0:
            out[2 * i] = most
            out[2 * i + 1] = above / ends
    return out

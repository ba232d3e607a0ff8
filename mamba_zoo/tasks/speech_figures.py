"""Spectrograms beside each other: before, after, and what should have come out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.signal import ShortTimeFFT

from .checkpoints import write_atomically

_RANGE = 70  # dB below the loudest point that are shown


def plot_spectrograms(signals: Mapping[str, np.ndarray], sample_rate: int, path: Path) -> None:
    """One panel a signal, all on one scale of time, frequency and level, as a PNG.

    Args:
        signals: Samples by title; all of the same length.
        sample_rate: Samples per second.
        path: Of the picture.
    """
    powers = {name: _power(np.asarray(signal, np.float64), sample_rate) for name, signal in signals.items()}
    top = max(float(power.max()) for power in powers.values())
    seconds = max(len(signal) for signal in signals.values()) / sample_rate
    figure = Figure(figsize=(8, 0.6 + 1.5 * len(signals)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(signals), 1, sharex=True, squeeze=False)[:, 0]
    style: Any = {"origin": "lower", "aspect": "auto", "cmap": "magma", "interpolation": "nearest"}
    style |= {"extent": (0, seconds, 0, sample_rate / 2000), "vmin": top - _RANGE, "vmax": top}
    for axis, (name, power) in zip(axes, powers.items(), strict=True):
        axis.imshow(power, **style)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylabel("kHz")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(axes[0].images[0], ax=axes, label="dB")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data.getvalue()))


def _power(signal: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in dB `(frequencies, frames)`, in frames of 32 ms, at most about 2,000 of them."""
    size = max(16, round(0.032 * sample_rate))
    signal = np.pad(signal, (0, max(0, size - len(signal))))
    hop = max(size // 4, len(signal) // 2000)
    transform = ShortTimeFFT(np.hanning(size), hop, sample_rate)
    return 20 * np.log10(np.abs(transform.stft(signal)) + 1e-7)

"""Voices and noises made by arithmetic, so that speech models can be tried without any recording.

The voices are no speech: a train of pulses with a wandering pitch, sent through three resonances that move from vowel
to vowel, with pauses and bursts of noise between them. They have what enhancement and separation work on, harmonics,
formants and a rhythm, and no words.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

# First three resonances in Hz of a, e, i, o, u, as an average male voice has them (Peterson and Barney 1952, rounded).
_VOWELS = np.array([[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]])
_WIDTHS = (80.0, 100.0, 140.0)
NOISES = ("white", "pink", "hum", "bursts")


def synthetic_voice(speaker: int, seconds: float, sample_rate: int, seed: int) -> np.ndarray:
    """A voice `(n,)` float32 of deviation about 0.1.

    Args:
        speaker: Sets the pitch, from 85 to 250 Hz, and the size of the throat.
        seconds: Length.
        sample_rate: Samples per second.
        seed: Of what is said.
    """
    who = np.random.default_rng([7, speaker])
    pitch, throat = 85 * (250 / 85) ** who.random(), 0.9 + 0.3 * who.random()
    rng = np.random.default_rng([8, speaker, seed])
    parts, made, wanted = [], 0, round(seconds * sample_rate)
    while made < wanted:
        parts.append(_syllable(rng, pitch, throat, sample_rate))
        if rng.random() < 0.3:
            parts.append(np.zeros(round(rng.uniform(0.03, 0.2) * sample_rate)))
        made = sum(map(len, parts))
    voice = np.concatenate(parts)[:wanted]
    return (0.1 * voice / max(float(voice.std()), 1e-6)).astype(np.float32)


def synthetic_noise(kind: str, samples: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """A noise `(samples,)` float32 of deviation 1.

    Args:
        kind: "white", "pink" (power falls with frequency), "hum" (50 Hz and its harmonics, in white noise), or
            "bursts" (pink noise that comes and goes).
        samples: Length.
        sample_rate: Samples per second.
        rng: Draws it.

    Raises:
        ValueError: unknown `kind`.
    """
    if kind not in NOISES:
        raise ValueError(f"noise {kind!r} is unknown; choose one of {', '.join(NOISES)}")
    noise = rng.standard_normal(samples)
    if kind in ("pink", "bursts"):
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), samples)
    time = np.arange(samples) / sample_rate
    if kind == "hum":
        tones = [np.sin(2 * np.pi * (50 * k * time + rng.random())) / k for k in range(1, 9)]
        noise = 0.3 * noise + np.sum(tones, axis=0)
    if kind == "bursts":
        rate, phase = rng.uniform(1, 4), rng.random()
        noise = noise * (0.1 + (0.5 + 0.5 * np.sin(2 * np.pi * (rate * time + phase))) ** 3)
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def _syllable(rng: np.random.Generator, pitch: float, throat: float, sample_rate: int) -> np.ndarray:
    n = round(rng.uniform(0.12, 0.35) * sample_rate)
    start, end = rng.uniform(0.85, 1.2, 2)
    f0 = pitch * np.linspace(start, end, n) * (1 + 0.01 * np.sin(2 * np.pi * 5 * np.arange(n) / sample_rate))
    phase = np.cumsum(f0) / sample_rate
    harmonics = np.arange(1, int(0.45 * sample_rate / f0.max()) + 1)
    source = (np.cos(2 * np.pi * phase[None] * harmonics[:, None]) / harmonics[:, None]).sum(0)
    voice = source + 0.02 * rng.standard_normal(n)
    for centre, width in zip(_VOWELS[rng.integers(len(_VOWELS))] * throat, _WIDTHS, strict=True):
        if centre < 0.45 * sample_rate:
            radius = np.exp(-np.pi * width / sample_rate)
            angle = 2 * np.pi * centre / sample_rate
            voice = np.asarray(lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], voice))
    voice = voice / max(float(np.abs(voice).max()), 1e-9) * np.sin(np.pi * np.linspace(0, 1, n)) ** 0.5
    if rng.random() < 0.4:
        burst = rng.standard_normal(round(rng.uniform(0.02, 0.07) * sample_rate))
        voice = np.concatenate([0.15 * np.diff(burst, prepend=0.0), voice])
    return voice

"""Pictures of spectrograms, as the network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .sound_files import read_sound
from .summary import _figure, _save

if TYPE_CHECKING:
    from .audio_classification import AudioClassifier


def plot_examples(
    spectrograms: Sequence[Tensor], titles: Sequence[str], path: Path, front_end: Any, columns: int = 4
) -> None:
    """A panel for each spectrogram `(frames, mel_bins)`, as a PNG.

    Args:
        spectrograms: As the network is given them.
        titles: One for each.
        path: Of the picture.
        front_end: Gives the length of a frame.
        columns: Panels beside each other.
    """
    columns = min(columns, len(spectrograms))
    rows = -(-len(spectrograms) // columns)
    figure = _figure((3 * columns, 0.3 + 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[len(spectrograms) :]:
        axis.axis("off")
    for axis, x, title in zip(axes, spectrograms, titles, strict=False):
        values = x.float().cpu().numpy()
        seconds = len(values) * front_end.frame_shift / 1000
        axis.imshow(values.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, values.shape[1]))
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("seconds")
        axis.set_ylabel("mel band")
    _save(figure, path)


@torch.inference_mode()
def plot_recording(model: AudioClassifier, source: Path, path: Path, most: float = 60.0) -> None:
    """The log-mel spectrogram of a recording, or of its first minute, before normalisation, as a PNG.

    Args:
        model: Gives the front end.
        source: A sound file.
        path: Of the picture.
        most: Seconds that are shown.
    """
    front: Any = model.front_end
    samples, rate = read_sound(source, front.sample_rate)
    wave = torch.from_numpy(np.ascontiguousarray(samples[: round(most * rate)]))
    window = round(rate * front.frame_length / 1000) + 1
    wave = torch.nn.functional.pad(wave, (0, max(0, window - len(wave))))
    x = front.spectrogram((wave - wave.mean())[None], rate)[0]
    plot_examples([x], [source.name], path, front, columns=1)

"""Pictures of several handwritten digits with the box, the mask and the class of each: data that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

CLASSES = [str(digit) for digit in range(10)]
SIZE = 64
COUNTS = {"train": 480, "val": 80, "test": 120}
_SPLITS = ("train", "val", "test")
_SIDES = (14, 26)  # pixels of a digit
_MOST_COVERED = 0.15  # part of a digit that later ones may hide


@dataclass(frozen=True)
class Canvas:
    """One picture.

    Attributes:
        image: `(SIZE, SIZE, 3)` uint8.
        instances: `(SIZE, SIZE)`; 0 is background, i + 1 a pixel of digit i.
        digits: `(n,)` the digits.
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.int64]
    digits: NDArray[np.int64]


class Canvases(Dataset):
    """The canvases of one split; no handwritten digit is in two splits.

    Args:
        split: "train", "val" or "test".
        seed: Of every canvas.
    """

    def __init__(self, split: Literal["train", "val", "test"], seed: int = 0) -> None:
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> Canvas:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return draw_canvas(np.random.default_rng([self.seed, _SPLITS.index(self.split), index]), self.split)


def draw_canvas(draw: np.random.Generator, split: str) -> Canvas:
    """Two to five digits of many sizes and colours on a soft, noisy ground."""
    pixels, labels = digits_of(split)
    image = _ground(draw)
    instances = np.zeros((SIZE, SIZE), np.int64)
    found: list[int] = []
    for _ in range(int(draw.integers(2, 6))):
        which = int(draw.integers(len(labels)))
        side = int(draw.integers(*_SIDES))
        shape = np.asarray(Image.fromarray(pixels[which]).resize((side, side), Image.Resampling.BICUBIC)) / 255.0
        mask = shape > 0.35
        colour = draw.uniform(0.55, 1.0, 3)
        for _ in range(20):
            top, left = draw.integers(0, SIZE - side, 2)
            under = instances[top : top + side, left : left + side]
            covered = [(mask & (under == i)).sum() / (instances == i).sum() for i in range(1, len(found) + 1)]
            if max(covered, default=0.0) <= _MOST_COVERED:
                break
        else:
            continue
        found.append(int(labels[which]))
        under[mask] = len(found)
        soft = shape[..., None] * mask[..., None]
        patch = image[top : top + side, left : left + side]
        patch[:] = patch * (1 - soft) + soft * colour
    return Canvas(np.rint(255 * image.clip(0, 1)).astype(np.uint8), instances, np.array(found))


def boxes_of(canvas: Canvas) -> NDArray[np.float32]:
    """`(n, 4)` corners `x0, y0, x1, y1` in pixels of the visible part of each digit."""
    boxes = np.zeros((len(canvas.digits), 4), np.float32)
    for i in range(len(boxes)):
        rows, columns = np.nonzero(canvas.instances == i + 1)
        boxes[i] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return boxes


def classes_of(canvas: Canvas) -> NDArray[np.int64]:
    """`(SIZE, SIZE)`: 0 is background, 1 + d a pixel of the digit d."""
    return np.concatenate([[0], canvas.digits + 1])[canvas.instances]


@lru_cache(maxsize=3)
def digits_of(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits `(n, 8, 8)` of scikit-learn and their classes, split in the order of the file."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    part = {"train": slice(0, 1200), "val": slice(1200, 1450), "test": slice(1450, None)}[split]
    return pixels[part], bunch.target[part].astype(np.int64)


def _ground(draw: np.random.Generator) -> NDArray[np.float64]:
    """Soft patches of dark colours, and noise."""
    coarse = np.rint(255 * draw.uniform(0.0, 0.4, (4, 4, 3))).astype(np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255.0
    return soft + draw.normal(0, 0.03, (SIZE, SIZE, 3))

"""Clips: folders of frames and video files, which frames of them are seen, and moving digits that need no files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .canvases import digits_of
from .image_files import EXTENSIONS, BadImageError, read_image

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
MOTIONS = ("right", "down", "left", "up")
SIZE, FRAMES = 24, 8
COUNTS = {"train": 3000, "val": 120, "test": 240}
_SPLITS = ("train", "val", "test")
_DIGIT = 12  # pixels


class ClipError(ValueError):
    """A clip that cannot be read."""


class Moving(NamedTuple):
    """A moving digit, by its number in a split."""

    split: Literal["train", "val", "test"]
    seed: int
    number: int

    @property
    def motion(self) -> int:
        """Its class number: motions come by turns."""
        return self.number % len(MOTIONS)


def is_clip(path: Path) -> bool:
    """Whether a path is a video file, or a folder that holds frames."""
    if path.is_file():
        return path.suffix.lower() in VIDEO_EXTENSIONS
    return path.is_dir() and any(p.suffix.lower() in EXTENSIONS for p in path.iterdir())


def list_clips(folder: Path) -> list[Path]:
    """Every clip below a folder, in name order; the folder itself if it holds frames.

    Raises:
        FileNotFoundError: no such path, or no clip in it.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no clip or folder {folder}")
    if is_clip(folder):
        return [folder]
    found = sorted(p for p in folder.rglob("*") if is_clip(p)) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"no clip in {folder} (looked for folders of frames and {', '.join(sorted(VIDEO_EXTENSIONS))})"
        )
    return found


def read_clip(clip: Path | Moving, count: int, train: bool = False) -> list[Image.Image]:
    """Frames of a clip, spread over its length.

    The clip is cut into `count` equal parts and one frame is taken of each: the middle one, or in training any. Clips
    with fewer frames show some of them twice.

    Args:
        clip: A folder of frames in the order of their numbers, a video file, or a moving digit.
        count: Frames to take.
        train: Take random frames.

    Raises:
        ClipError: naming the clip, if it cannot be read.
        ModuleNotFoundError: a video file without the package that reads it.
    """
    if isinstance(clip, Moving):
        frames = _draw(clip)
        return [Image.fromarray(frames[i]) for i in sampled(len(frames), count, train)]
    if clip.is_dir():
        files = sorted((p for p in clip.iterdir() if p.suffix.lower() in EXTENSIONS), key=_by_number)
        if not files:
            raise ClipError(f"the clip {clip} holds no frames; expected images in the order of their numbers")
        try:
            frames = [read_image(files[i], "RGB") for i in sampled(len(files), count, train)]
        except BadImageError as error:
            raise ClipError(f"cannot read the clip {clip}: {str(error).partition(';')[0]}") from None
        if len({frame.size for frame in frames}) > 1:
            raise ClipError(f"the frames of the clip {clip} differ in size")
        return frames
    return _decoded(clip, count, train)


def sampled(length: int, count: int, train: bool) -> list[int]:
    """One frame number of each of `count` equal parts of a clip of `length` frames."""
    places = torch.rand(count) if train else torch.full((count,), 0.5)
    return [min(length - 1, int((i + float(place)) * length / count)) for i, place in enumerate(places)]


def to_clip(frames: Sequence[Image.Image]) -> Tensor:
    """Frames as `(t, 3, h, w)` uint8."""
    return torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in frames])).permute(0, 3, 1, 2)


def _decoded(clip: Path, count: int, train: bool) -> list[Image.Image]:
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError and OSError: without ffmpeg's libraries
        raise ModuleNotFoundError(
            f"reading {clip} needs torchcodec and ffmpeg ({str(error).splitlines()[0]}); install them, or turn each "
            "video into a folder of frames: ffmpeg -i clip.mp4 clip/%05d.jpg"
        ) from None
    try:
        decoder: Any = VideoDecoder(str(clip))
        frames = decoder.get_frames_at(indices=sampled(len(decoder), count, train)).data
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise ClipError(f"cannot read the clip {clip}: {' '.join(str(error).split())[:200]}") from None
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


@lru_cache(maxsize=4096)
def _draw(clip: Moving) -> NDArray[np.uint8]:
    """`(FRAMES, SIZE, SIZE, 3)`: where a digit stands in the middle of a clip says nothing of where it goes."""
    draw = np.random.default_rng([clip.seed, _SPLITS.index(clip.split), clip.number, 1])
    pixels, _ = digits_of(clip.split)
    shape = Image.fromarray(pixels[int(draw.integers(len(pixels)))]).resize((_DIGIT, _DIGIT), Image.Resampling.BICUBIC)
    angle = clip.motion * np.pi / 2
    step = draw.uniform(0.9, 1.4) * np.array([np.cos(angle), np.sin(angle)])
    middle = (SIZE - _DIGIT) / 2 + draw.uniform(-4, 4, 2)
    ground, colour = draw.uniform(0, 0.35, 3), draw.uniform(0.6, 1.0, 3)
    frames = np.empty((FRAMES, SIZE, SIZE, 3))
    for t in range(FRAMES):
        x, y = middle + step * (t - (FRAMES - 1) / 2)
        # Moved by parts of a pixel, as an object before a camera.
        moved = shape.transform((SIZE, SIZE), Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y), Image.Resampling.BILINEAR)
        soft = np.asarray(moved)[..., None] / 255.0
        frames[t] = ground * (1 - soft) + colour * soft + draw.normal(0, 0.03, (SIZE, SIZE, 3))
    return np.rint(255 * frames.clip(0, 1)).astype(np.uint8)

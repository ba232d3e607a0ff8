"""Labelled image files in class folders: listing, splitting and reading, with one clear error for each bad input."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
_TRAIN, _VAL, _TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")


class BadImageError(ValueError):
    """An image file that cannot be read."""


class Member(NamedTuple):
    """One image of a data set that yields `(PIL image, label)`."""

    data: Any
    position: int


class Images(Dataset):
    """Images and their class numbers.

    Args:
        items: Paths, members of another data set, or PIL images in memory.
        targets: One class number an item.
        mode: PIL mode the images are converted to, "RGB" or "L".
        transform: From a PIL image to the tensor `(channels, height, width)`.
    """

    def __init__(
        self, items: Sequence[Any], targets: Sequence[int], mode: str, transform: Callable[[Image.Image], Any]
    ) -> None:
        self.items, self.targets = list(items), [int(t) for t in targets]
        self.mode, self.transform = mode, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.items[index]
        if isinstance(item, Member):
            item = item.data[item.position][0]
        try:
            image = item.convert(self.mode) if isinstance(item, Image.Image) else read_image(item, self.mode)
        except BadImageError as error:
            raise BadImageError(f"{error}, or leave such files out with on_bad_image='skip'") from None
        return self.transform(image), self.targets[index]


def read_image(path: Path, mode: str, upright: bool = True) -> Image.Image:
    """The whole image, decoded, turned upright as its EXIF tag says, and converted.

    Args:
        path: Of a file that Pillow can read. 16-bit grey values are scaled to 8 bits, transparency is dropped.
        mode: PIL mode, "RGB" or "L".
        upright: False leaves the image as it is stored.

    Raises:
        BadImageError: naming the file, if it cannot be decoded to its end or holds floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image) if upright else image).convert(mode)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImageError(f"cannot read the image {path}: {reason}; replace or remove the file") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pixels whose range Pillow's own conversion would clip are scaled; it is silent about both."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels exceed 16 bits")
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    return image


def drop_unreadable(paths: Sequence[Path], targets: Sequence[int]) -> tuple[list[Path], list[int], list[Path]]:
    """Decode every file once; return the readable ones with their classes, and those left out."""

    def readable(path: Path) -> bool:
        try:
            read_image(path, "RGB")
        except BadImageError:
            return False
        return True

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        good = list(pool.map(readable, paths))
    kept = [(p, t) for p, t, ok in zip(paths, targets, good, strict=True) if ok]
    return [p for p, _ in kept], [t for _, t in kept], [p for p, ok in zip(paths, good, strict=True) if not ok]


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, in name order.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"no image in {folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    return found


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of `root` that hold its splits, by "train", "val" and "test"; empty if `root` holds classes.

    Capitals do not matter. Beside folders of other names, one counts as a split only if it holds folders and no images:
    "train" may be a class.

    Raises:
        FileNotFoundError: no such folder, or a training split alone.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; root is 'digits', 'torchvision:NAME', or a folder with class folders or train/ and val/"
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    only_splits = all(p.name.lower() in (*_TRAIN, *_VAL, *_TEST) for p in folders)
    found = {}
    for split, names in (("train", _TRAIN), ("val", _VAL), ("test", _TEST)):
        for name in names:
            for folder in folders:
                if folder.name.lower() == name and (only_splits or _holds_classes(folder)):
                    found.setdefault(split, folder)
    if "train" not in found:
        return {}
    if len(found) == 1:
        raise FileNotFoundError(
            f"{root} has {found['train'].name}/ but neither val/ nor test/; add one, or give {found['train']} as root "
            "to split it automatically"
        )
    return found


def _holds_classes(folder: Path) -> bool:
    inside = list(folder.iterdir())
    return any(p.is_dir() for p in inside) and not any(p.suffix.lower() in EXTENSIONS for p in inside)


def read_classes(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Files, class numbers and class names of a folder that holds one folder a class.

    Args:
        folder: With the class folders.
        classes: The names it must hold, if they are known.

    Raises:
        FileNotFoundError: no such folder, no class folder, or a class folder without an image.
        ValueError: other classes than `classes`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE.jpg")
    if classes is not None and names != list(classes):
        missing, extra = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        parts = ([f"lacks {', '.join(missing)}"] if missing else []) + ([f"adds {', '.join(extra)}"] if extra else [])
        raise ValueError(
            f"the classes of {folder} differ from those trained on: it {' and '.join(parts)}; "
            "every split needs the same class folders"
        )
    paths, targets = [], []
    for number, name in enumerate(names):
        try:
            files = list_images(folder / name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; fill the class folder {name!r} or remove it") from None
        paths += files
        targets += [number] * len(files)
    return paths, targets, names


def stratified_split(
    targets: Sequence[int], sizes: Sequence[int | float], seed: int, names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Indices of disjoint parts that keep the proportions of the classes.

    Args:
        targets: Class numbers.
        sizes: Of each part after the first, as counts or fractions; the first part takes the rest.
        seed: Of the shuffle.
        names: Of the classes, for messages.

    Raises:
        ValueError: a class too small to be in every part.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(np.asarray(targets), return_counts=True)
    if counts.min() < len(sizes) + 1:
        rare = int(classes[counts.argmin()])
        which = repr(names[rare]) if names else f"number {rare}"
        raise ValueError(
            f"class {which} has {counts.min()} images, too few to split into {len(sizes) + 1} parts; "
            "add images, or give train/ and val/ folders"
        )
    rest, parts = np.arange(len(targets)), []
    for size in sizes:
        count = max(len(classes), round(size * len(targets)) if isinstance(size, float) else size)
        rest, part = train_test_split(
            rest, test_size=count, random_state=seed, stratify=np.asarray(targets)[rest], shuffle=True
        )
        parts.append(np.sort(part))
    return [np.sort(rest), *parts]

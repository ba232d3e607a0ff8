"""Images with a class for every pixel: digits on canvases, a folder of images and masks, or VOC and Cityscapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ._data import TaskData
from .canvases import CLASSES, SIZE, Canvas, Canvases, classes_of
from .detection_data import cut_twice, to_tensor
from .image_files import list_images, read_image

IGNORED = 255
_SPLITS = ("train", "val", "test")
_LARGE = 512  # pixels of images that are not digits
_VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


class MaskError(ValueError):
    """A mask that cannot be trained on."""


class Pair(NamedTuple):
    """An image file and the file of its mask."""

    image: Path
    mask: Path


class Regions(Dataset):
    """Images `(3, size, size)` from 0 to 1 and class numbers `(size, size)`.

    Images are resized to fit and padded with black, which is ignored in the masks.

    Args:
        items: Pairs of files, canvases, or members of another data set.
        read: From an item to the image and its class numbers `(h, w)`.
        size: Pixels of each side.
        scales: Least and most factor by which an image is enlarged before a part of `size` is cut out at random; None
            cuts nothing.
        hflip: Probability of a left-right flip.
    """

    def __init__(
        self,
        items: Any,
        read: Callable[[Any], tuple[Image.Image, NDArray[Any]]],
        size: int,
        scales: tuple[float, float] | None = None,
        hflip: float = 0.0,
    ) -> None:
        self.items, self.read, self.size, self.scales, self.hflip = items, read, size, scales, hflip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.read(self.items[index])
        labels = Image.fromarray(mask.astype(np.uint8))
        scale = 1.0
        if self.scales is not None:
            scale = float(torch.empty(()).uniform_(*self.scales))
        image, labels = (fitted(x, round(self.size * scale)) for x in (image, labels))
        left, top = (self._start(side) for side in image.size)
        box = (left, top, left + self.size, top + self.size)
        x, y = to_tensor(image.crop(box)), np.array(labels.crop(box), dtype=np.int64)
        # What lies beyond the image is black there, and no class here.
        y[max(0, image.height - top) :], y[:, max(0, image.width - left) :] = IGNORED, IGNORED
        found = torch.from_numpy(y)
        if self.hflip and torch.rand(()) < self.hflip:
            x, found = x.flip(-1), found.flip(-1)
        return x, found

    def _start(self, side: int) -> int:
        spare = side - self.size
        return int(torch.randint(spare + 1, ())) if self.scales is not None and spare > 0 else 0


def fitted(image: Image.Image, size: int) -> Image.Image:
    """An image whose longer side is `size`; masks of class numbers take the nearest pixel."""
    factor = size / max(image.size)
    to = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if to == image.size:
        return image
    return image.resize(to, Image.Resampling.BICUBIC if image.mode == "RGB" else Image.Resampling.NEAREST)


class SegmentationData(TaskData):
    """Training, validation and test images with masks.

    Args:
        root: "digits", handwritten digits on canvases of 64x64 pixels; "torchvision:VOCSegmentation" (downloaded to
            `download_dir` unless `VOCdevkit/VOC2012` is there) or "torchvision:Cityscapes" (whose `leftImg8bit/` and
            `gtFine/` must be there); or a folder with `classes.txt`, one name
            a line, and `images/` and `masks/`, whose files have the same names. A mask is a PNG whose pixels are class
            numbers from 0 in the order of the names, and 255 where nothing is known. Both folders may hold `train/`,
            `val/` and `test/`; otherwise they are split automatically.
        image_size: Pixels of the longer side, to which images are resized and padded. None: 64 for digits, else 512.
        batch_size: Images a step and device.
        num_workers: Processes that read images; 0 reads them in the training process.
        val_fraction: Part of the images set apart for validation, and as much again for the test, where the folder
            holds no splits.
        split_seed: Of that split, and of the canvases.
        scale_min: Least factor of the random enlargement of training images; see `scale_max`.
        scale_max: Most factor. With both at 1 nothing is cut.
        hflip: Probability of a left-right flip of training images.
        download_dir: Where torchvision data sets are kept.

    Raises:
        FileNotFoundError: a missing folder, list of classes, image or mask.
        ValueError: masks that cannot be trained on, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {"class_names": "classes", "img_size": "size"}

    def __init__(
        self,
        root: str = "digits",
        image_size: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        split_seed: int = 0,
        scale_min: float = 1.0,
        scale_max: float = 1.0,
        hflip: float = 0.0,
        download_dir: str = "data",
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 0.5")
        if not 0 < scale_min <= scale_max:
            raise ValueError(f"scale_min={scale_min} must be above 0 and at most scale_max={scale_max}")
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip={hflip} is a probability and must lie between 0 and 1")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1 pixel")
        self.save_hyperparameters(logger=False)
        self.size = image_size or (SIZE if root == "digits" else _LARGE)
        self.val_fraction, self.split_seed, self.hflip, self.download_dir = (
            val_fraction,
            split_seed,
            hflip,
            download_dir,
        )
        self.scales = None if scale_min == scale_max == 1 else (scale_min, scale_max)
        self._classes: list[str] = []

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        self.setup()
        return self._classes

    def parts(self) -> dict[str, Dataset]:
        """The images of each part with their masks."""
        if self.root == "digits":
            self._classes, read = ["background", *CLASSES], _of_canvas
            items: dict[str, Any] = {name: Canvases(name, self.split_seed) for name in _SPLITS}
        elif self.root.startswith("torchvision:"):
            items, self._classes, read = _torchvision(self.root.partition(":")[2], self.download_dir)
        else:
            root = Path(self.root).expanduser()
            self._classes = read_names(root)
            items, read = self._folder(root), _Reader(len(self._classes))
        train = Regions(items["train"], read, self.size, self.scales, self.hflip)
        held = {name: Regions(items[name], read, self.size) for name in ("val", "test") if name in items}
        return {"train": train, **held}

    def undivided(self) -> bool:
        """Whether the images of a folder lie in no folders of parts."""
        root = Path(self.root).expanduser()
        return root.is_dir() and not (root / "images" / "train").is_dir()

    def everything(self, model: Any) -> Dataset:
        """Every image."""
        root = Path(self.root).expanduser()
        self._classes = read_names(root)
        return Regions(paired(root / "images", root / "masks"), _Reader(len(self._classes)), self.size)

    def _folder(self, root: Path) -> dict[str, list[Pair]]:
        if not (root / "images" / "train").is_dir():
            pairs = paired(root / "images", root / "masks")
            count = max(1, round(self.val_fraction * len(pairs)))
            if len(pairs) < 2 * count + 1:
                raise MaskError(f"{root} has {len(pairs)} images, too few to split into train, val and test")
            index = self.divided([pair.image for pair in pairs], lambda: cut_twice(len(pairs), count, self.split_seed))
            return {name: [pairs[i] for i in numbers] for name, numbers in index.items()}
        found = {
            name: paired(root / "images" / name, root / "masks" / name)
            for name in _SPLITS
            if (root / "images" / name).is_dir()
        }
        if "val" not in found:
            raise FileNotFoundError(f"{root}/images has train/ but no val/")
        return found


def read_names(root: Path) -> list[str]:
    """The classes of a folder.

    Raises:
        FileNotFoundError: no folder, or no `classes.txt` in it.
        MaskError: fewer than two classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; root is 'digits', 'torchvision:VOCSegmentation', 'torchvision:Cityscapes' or a folder "
            "with classes.txt, images/ and masks/"
        )
    file = root / "classes.txt"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; it names the classes, one a line, in the order of their numbers")
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 2 <= len(names) <= IGNORED:
        raise MaskError(f"{file} names {len(names)} classes; 2 to {IGNORED} are possible")
    return names


def paired(images: Path, masks: Path) -> list[Pair]:
    """Every image of a folder with its mask.

    Raises:
        FileNotFoundError: no folder, no image, or an image without a mask.
    """
    pairs = []
    for image in list_images(images):
        mask = masks / image.relative_to(images).with_suffix(".png")
        if not mask.is_file():
            raise FileNotFoundError(f"the image {image} has no mask {mask}")
        pairs.append(Pair(image, mask))
    return pairs


def read_mask(path: Path, num_classes: int) -> NDArray[np.uint8]:
    """The class numbers `(h, w)` of a mask.

    Raises:
        MaskError: no picture of class numbers, or one with an unknown class.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode, mask = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise MaskError(f"cannot read the mask {path}: {error}") from None
    if mode not in ("L", "P", "I", "I;16", "1"):
        raise MaskError(f"the mask {path} has colours ({mode}); its pixels must be class numbers, as in a grey PNG")
    unknown = np.setdiff1d(np.unique(mask), [*range(num_classes), IGNORED])
    if len(unknown):
        raise MaskError(
            f"the mask {path} has the unknown class {unknown[0]}; classes are 0 to {num_classes - 1}, and {IGNORED} "
            "where nothing is known"
        )
    return mask.astype(np.uint8)


class _Reader:
    """Reads a pair of files."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, pair: Pair) -> tuple[Image.Image, NDArray[Any]]:
        image, mask = read_image(pair.image, "RGB"), read_mask(pair.mask, self.num_classes)
        if image.size != (mask.shape[1], mask.shape[0]):
            raise MaskError(
                f"the mask {pair.mask} is {mask.shape[1]}x{mask.shape[0]} pixels, its image is "
                f"{image.width}x{image.height}"
            )
        return image, mask


def _of_canvas(canvas: Canvas) -> tuple[Image.Image, NDArray[Any]]:
    return Image.fromarray(canvas.image), classes_of(canvas)


class _Translated:
    """Reads a member of a torchvision data set; class numbers go through a table."""

    def __init__(self, table: Sequence[int]) -> None:
        self.table = np.asarray(table, np.uint8)

    def __call__(self, member: tuple[Image.Image, Image.Image]) -> tuple[Image.Image, NDArray[Any]]:
        image, mask = member
        return image.convert("RGB"), self.table[np.asarray(mask).astype(np.uint8)]


def _torchvision(name: str, folder: str) -> tuple[dict[str, Any], list[str], Any]:
    from torchvision import datasets

    try:
        if name == "VOCSegmentation":
            sets: list[Any] = [_voc(folder, split) for split in ("train", "val")]
            names, table = _VOC, [*range(len(_VOC)), *[IGNORED] * (256 - len(_VOC))]
        elif name == "Cityscapes":
            sets = [datasets.Cityscapes(folder, split=s, target_type="semantic") for s in ("train", "val")]
            for each in sets:  # which lists them as the file system does
                each.images, each.targets = zip(*sorted(zip(each.images, each.targets, strict=True)), strict=True)
            learnt = {c.id: c for c in datasets.Cityscapes.classes if 0 <= c.train_id < IGNORED}
            names = [c.name for c in sorted(learnt.values(), key=lambda c: c.train_id)]
            table = [learnt[i].train_id if i in learnt else IGNORED for i in range(256)]
        else:
            raise ValueError(f"root='torchvision:{name}' is not known here; choose VOCSegmentation or Cityscapes")
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not get torchvision's {name} in {folder}: {error}") from error
    return {"train": sets[0], "val": sets[1]}, names, _Translated(table)


def _voc(folder: str, split: str) -> Any:
    """Downloaded if it is not there: torchvision would fetch or unpack the archive again if it is."""
    from torchvision.datasets import VOCSegmentation

    return VOCSegmentation(folder, image_set=split, download=not (Path(folder) / "VOCdevkit" / "VOC2012").is_dir())

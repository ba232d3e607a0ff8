"""Images with boxes, and with masks: digits on canvases, or a folder with annotations in COCO's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ._data import TaskData
from .canvases import CLASSES, Canvas, Canvases, boxes_of
from .coco import Annotated, AnnotationError, read_coco
from .image_files import read_image

_FILES = ("annotations.json", "_annotations.coco.json", "instances.json")
_SPLITS = ("train", "val", "test")


class Objects(Dataset):
    """Images and their objects, as torchvision's detectors take them.

    Args:
        items: Annotated images, or canvases.
        masks: Give the masks too.
        train: Leave out crowds, which cannot be learnt.
        hflip: Probability of a left-right flip.
    """

    def __init__(
        self, items: Sequence[Annotated] | Canvases, masks: bool = False, train: bool = False, hflip: float = 0.0
    ) -> None:
        self.items, self.masks, self.train, self.hflip = items, masks, train, hflip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image `(3, h, w)` from 0 to 1, and its `boxes` `(n, 4)`, `labels` `(n,)` from 1, `iscrowd`, `masks`."""
        item = self.items[index]
        image, found = _of_canvas(item, self.masks) if isinstance(item, Canvas) else _of_file(item, self.masks)
        if self.train:
            kept = ~found["iscrowd"].bool()
            found = {key: value[kept] for key, value in found.items()}
        if self.hflip and torch.rand(()) < self.hflip:
            image = image.flip(-1)
            boxes = found["boxes"]
            found["boxes"] = torch.stack(
                [image.shape[-1] - boxes[:, 2], boxes[:, 1], image.shape[-1] - boxes[:, 0], boxes[:, 3]], dim=1
            )
            if self.masks:
                found["masks"] = found["masks"].flip(-1)
        return image, found


def listed(items: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch of images of any size: a list of images and one of their objects."""
    images, objects = zip(*items, strict=True)
    return list(images), list(objects)


class DetectionData(TaskData):
    """Training, validation and test images with boxes.

    Args:
        root: "digits", pictures of several handwritten digits on canvases of 64x64 pixels, made from scikit-learn's; or
            a folder with annotations in COCO's format. It holds `train/`, `val/` and, if there is one, `test/`, each
            with images and `annotations.json`; or `annotations/instances_train*.json` with images in `train*/` or
            `images/train*/` and likewise for `val`, as COCO itself; or one `annotations.json` with images beside it or
            in `images/`, split automatically.
        batch_size: Images a step and device.
        num_workers: Processes that read images; 0 reads them in the training process.
        val_fraction: Part of the images set apart for validation, and as much again for the test, where the folder
            holds no splits.
        split_seed: Of that split, and of the canvases.
        hflip: Probability of a left-right flip of training images.
        on_bad_box: "error" stops at an object whose box is empty or outside its image, or that has no mask where
            masks are needed; "drop" leaves such objects out. COCO's own training images have a few empty boxes.

    Raises:
        FileNotFoundError: a missing folder, annotation file or image.
        ValueError: annotations that cannot be trained on, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {"class_names": "classes"}
    masks: ClassVar[bool] = False
    collate = listed

    def __init__(
        self,
        root: str = "digits",
        batch_size: int = 8,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        split_seed: int = 0,
        hflip: float = 0.0,
        on_bad_box: Literal["error", "drop"] = "error",
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 0.5")
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip={hflip} is a probability and must lie between 0 and 1")
        self.save_hyperparameters(logger=False)
        self.val_fraction, self.split_seed, self.hflip, self.on_bad_box = val_fraction, split_seed, hflip, on_bad_box
        self._classes: list[str] = []
        self._left_out = 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        self.setup()
        return self._classes

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """As `TaskData.describe`, and how many objects were left out."""
        rows = super().describe(unit)
        return [*rows, ("left out", f"{self._left_out:,} objects")] if self._left_out else rows

    def parts(self) -> dict[str, Dataset]:
        """The images of each part with their objects."""
        if self.root == "digits":
            self._classes = CLASSES
            items: dict[str, Any] = {name: Canvases(name, self.split_seed) for name in _SPLITS}
        else:
            items = self._folder(Path(self.root).expanduser())
        return {
            name: Objects(items[name], self.masks, name == "train", self.hflip if name == "train" else 0.0)
            for name in items
        }

    def undivided(self) -> bool:
        """Whether one file annotates all images."""
        return self.root != "digits" and "" in annotation_files(Path(self.root).expanduser())

    def everything(self, model: Any) -> Dataset:
        """Every image."""
        file, images = annotation_files(Path(self.root).expanduser())[""]
        found, self._classes = read_coco(
            file, images, model.hparams["class_names"], self.on_bad_box == "drop", self.masks
        )
        return Objects(found, self.masks, False, 0.0)

    def _folder(self, root: Path) -> dict[str, list[Annotated]]:
        places, drop = annotation_files(root), self.on_bad_box == "drop"
        first = next(iter(places.values()))
        found, self._classes = read_coco(*first, drop=drop, masks=self.masks)
        self._left_out = sum(item.left_out for item in found)
        if not any(len(item.boxes) for item in found):
            cause = f" but the {self._left_out} that cannot be right; on_bad_box='error' names them"
            raise AnnotationError(
                f"{first[0]} annotates no object{cause if self._left_out else ''}; there is nothing to learn"
            )
        if "train" in places:
            parts = {"train": found}
            for name in ("val", "test"):
                if name in places:
                    parts[name] = read_coco(*places[name], self._classes, drop, self.masks)[0]
                    self._left_out += sum(item.left_out for item in parts[name])
            if "val" not in parts:
                raise FileNotFoundError(f"{root} has annotations for train but none for val")
            return parts
        count = max(1, round(self.val_fraction * len(found)))
        if len(found) < 2 * count + 1:
            raise AnnotationError(f"{root} has {len(found)} images, too few to split into train, val and test")
        index = self.divided([item.path for item in found], lambda: cut_twice(len(found), count, self.split_seed))
        return {name: [found[i] for i in numbers] for name, numbers in index.items()}


class InstanceData(DetectionData):
    """Training, validation and test images with boxes and masks; see `DetectionData`."""

    masks: ClassVar[bool] = True


def cut_twice(items: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Numbers of the items of each part, in order: `count` for the test, as many for validation, the rest to train."""
    order = np.random.default_rng(seed).permutation(items)
    cuts = {"train": order[2 * count :], "val": order[count : 2 * count], "test": order[:count]}
    return {name: np.sort(index) for name, index in cuts.items()}


def annotation_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Annotation file and folder of images of each split; of "" if there is one file for all.

    Raises:
        FileNotFoundError: no folder, or no annotation file in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; root is 'digits' or a folder with annotations in COCO's format")
    found: dict[str, tuple[Path, Path]] = {}
    for split, folder in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")):
        file = next((f for name in _FILES if (f := root / folder / name).is_file()), None)
        images = next((f for f in sorted((root / "annotations").glob(f"instances_{folder}*.json"))), None)
        if file is not None:
            found.setdefault(split, (file, _images(root / folder)))
        elif images is not None:
            name = images.stem.removeprefix("instances_")
            places = (root / name, root / "images" / name)
            found.setdefault(split, (images, next((p for p in places if p.is_dir()), _images(root))))
    if "train" in found:
        return found
    alone = next((f for name in _FILES if (f := root / name).is_file()), None)
    if alone is None:
        raise FileNotFoundError(
            f"no annotation file in {root}; expected {root}/train/annotations.json and {root}/val/annotations.json, "
            f"{root}/annotations/instances_train.json, or {root}/annotations.json"
        )
    return {"": (alone, _images(root))}


def _images(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _of_canvas(canvas: Canvas, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    count = len(canvas.digits)
    found = {
        "boxes": torch.from_numpy(boxes_of(canvas)),
        "labels": torch.from_numpy(canvas.digits) + 1,
        "iscrowd": torch.zeros(count, dtype=torch.int64),
    }
    if masks:
        found["masks"] = torch.from_numpy(canvas.instances[None] == np.arange(1, count + 1)[:, None, None]).to(
            torch.uint8
        )
    return to_tensor(Image.fromarray(canvas.image)), found


def _of_file(item: Annotated, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    size, image = (item.width, item.height), read_image(item.path, "RGB")
    if image.size != size and image.size == size[::-1]:
        # Some tools annotate the pixels as they are stored, whatever the EXIF tag says.
        image = read_image(item.path, "RGB", upright=False)
    if image.size != size:
        raise AnnotationError(
            f"{item.path} is {image.width}x{image.height} pixels, its annotations are for {item.width}x{item.height}"
        )
    found = {
        "boxes": torch.from_numpy(item.boxes),
        "labels": torch.from_numpy(item.classes) + 1,
        "iscrowd": torch.from_numpy(item.crowd.astype(np.int64)),
    }
    if masks:
        found["masks"] = torch.from_numpy(item.masks()).to(torch.uint8)
    return to_tensor(image), found


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as `(3, h, w)`, float32 from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)

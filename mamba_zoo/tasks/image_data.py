"""Images to train on: handwritten digits from scikit-learn, a folder, or a torchvision data set by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ._data import Split, TaskData
from .image_files import Images, Member, drop_unreadable, read_classes, split_folders, stratified_split
from .image_transforms import Preprocess, eval_transform, train_transform

_DIGITS_STATISTICS = (0.3053, 0.3760)  # of all 1,797 images, scaled to 0..1
_DIGITS_VAL, _DIGITS_TEST = 250, 347


class ImageData(TaskData):
    """Training, validation and test images of one source.

    Args:
        root: "digits", the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; "torchvision:NAME", a
            data set of torchvision such as `torchvision:CIFAR10`; or a folder. A folder holds `train/` with `val/` or
            `test/` or both, each with one folder a class; or the class folders themselves, split automatically.
        model_name: The model to be trained: where not given, image size and statistics are the ones it expects.
        image_size: Height and width in pixels that images are resized to. None: 8 for digits, else the model's.
        in_chans: 1 for grey images, 3 for colour. None: 1 for digits, else 3.
        batch_size: Images a step and device.
        num_workers: Processes that read images; 0 reads them in the training process.
        val_fraction: Part of the training images set apart where the source has no validation split.
        test_fraction: Likewise for a test split.
        split_seed: Of the automatic split.
        train_crop: How training images are cut: "resized" takes a random part and resizes it, "none" takes the central
            square as in evaluation, "padded" shifts that by up to an eighth.
        crop_scale: Least part of the image that "resized" keeps.
        hflip: Probability of a left-right flip.
        color_jitter: Strength of random brightness, contrast and saturation; 0 is off. Only with "resized".
        auto_augment: A policy of timm, such as "rand-m9-mstd0.5-inc1".
        random_erase: Probability of erasing a random rectangle.
        on_bad_image: "error" stops at the first unreadable file; "skip" reads all files first, leaves such files out
            and says which.
        download_dir: Where torchvision data sets are kept.

    Raises:
        FileNotFoundError: a missing folder, or one without images.
        ValueError: classes that differ between splits, an unknown torchvision data set, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "num_classes": "num_classes",
        "class_names": "classes",
        "in_chans": "in_chans",
        "img_size": "image_size",
        "preprocess": "preprocess_values",
    }

    def __init__(
        self,
        root: str = "digits",
        model_name: str | None = None,
        image_size: int | None = None,
        in_chans: Literal[1, 3] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        train_crop: Literal["resized", "padded", "none"] = "none",
        crop_scale: float = 0.35,
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erase: float = 0.0,
        on_bad_image: Literal["error", "skip"] = "error",
        download_dir: str = "data",
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1 pixel")
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 0.5:
                raise ValueError(f"{name}={value} must lie between 0 and 0.5")
        self.save_hyperparameters(logger=False)
        self.split_seed = split_seed
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.on_bad_image, self.download_dir = on_bad_image, download_dir
        self.order_seed = split_seed
        self.preprocess = self._preprocess(model_name, image_size, in_chans)
        self.train_transform = train_transform(
            self.preprocess, train_crop, crop_scale, hflip, color_jitter, auto_augment, random_erase
        )
        self.eval_transform = eval_transform(self.preprocess)
        self.skipped: list[Path] = []
        self._classes: list[str] = []

    def _preprocess(self, model_name: str | None, image_size: int | None, in_chans: int | None) -> Preprocess:
        if self.root == "digits":
            mean, std = _DIGITS_STATISTICS
            channels = in_chans or 1
            return Preprocess(image_size or 8, channels, (mean,) * channels, (std,) * channels)
        return Preprocess.for_model(model_name, image_size, in_chans or 3)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        self.setup()
        return self._classes

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.preprocess.in_chans

    @property
    def image_size(self) -> int:
        """Height and width the model sees, in pixels."""
        return self.preprocess.size

    @property
    def preprocess_values(self) -> dict[str, Any]:
        """The preprocessing as plain values, for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.preprocess).items()}

    def parts(self) -> dict[str, Dataset]:
        """The images, listed and split; downloads a torchvision data set that is not there yet."""
        if self.root == "digits":
            parts = self._digits()
        elif self.root.startswith("torchvision:"):
            parts = self._torchvision(self.root.partition(":")[2])
        else:
            parts = self._folder(Path(self.root).expanduser())
        mode = "L" if self.preprocess.in_chans == 1 else "RGB"
        return {
            name: Images(items, targets, mode, self.train_transform if name == "train" else self.eval_transform)
            for name, (items, targets) in parts.items()
        }

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """Counts, and what was left out."""
        rows = super().describe(unit)
        if self.skipped:
            rows.append(("left out", f"{len(self.skipped)} unreadable files, the first is {self.skipped[0]}"))
        return rows

    def scored(self, model: Any, split: Split, other: bool) -> Dataset:
        """The part to score, prepared as the checkpoint says."""
        part: Any = super().scored(model, split, other)
        return prepared(model, part.items, part.targets)

    def undivided(self) -> bool:
        """Whether the root holds class folders."""
        root = Path(self.root).expanduser()
        return root.is_dir() and not split_folders(root)

    def everything(self, model: Any) -> Dataset:
        """Every image."""
        paths, targets, self._classes = read_classes(Path(self.root).expanduser(), model.class_names)
        return prepared(model, paths, targets)

    def compare(self, model: Any, other: bool) -> None:
        """Classes must be the same; the rest is prepared as the model needs it."""
        if self.classes != model.class_names:
            raise ValueError(
                f"the classes of {self.root} ({', '.join(self.classes[:5])} ...) are not those of the checkpoint "
                f"({', '.join(model.class_names[:5])} ...)"
            )

    def _digits(self) -> dict[str, tuple[Sequence[Any], Sequence[int]]]:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        pixels, targets = bunch.data, bunch.target.tolist()
        images = [Image.fromarray(np.rint(p * (255 / 16)).astype(np.uint8).reshape(8, 8)) for p in pixels]
        self._classes = [str(i) for i in range(10)]
        return self._split(images, targets, {"test": _DIGITS_TEST, "val": _DIGITS_VAL})

    def _folder(self, root: Path) -> dict[str, tuple[Sequence[Any], Sequence[int]]]:
        folders = split_folders(root)
        if not folders:
            paths, targets, self._classes = read_classes(root)
            paths, targets = self._readable(paths, targets)
            return self._split(paths, targets, {"test": self.test_fraction, "val": self.val_fraction})
        paths, targets, self._classes = read_classes(folders["train"])
        parts: dict[str, tuple[Sequence[Any], Sequence[int]]] = {"train": self._readable(paths, targets)}
        for name in ("val", "test"):
            if name in folders:
                parts[name] = self._readable(*read_classes(folders[name], self._classes)[:2])
        if "val" not in parts:
            parts |= self._split(*parts["train"], {"val": self.val_fraction})
        return parts

    def _readable(self, paths: list[Path], targets: list[int]) -> tuple[list[Path], list[int]]:
        if self.on_bad_image == "error":
            return paths, targets
        paths, targets, bad = drop_unreadable(paths, targets)
        self.skipped += bad
        if len(set(targets)) < len(self._classes):
            empty = self._classes[min(set(range(len(self._classes))) - set(targets))]
            raise ValueError(f"no image of the class {empty!r} can be read; {len(bad)} files were left out")
        return paths, targets

    def _torchvision(self, name: str) -> dict[str, tuple[Sequence[Any], Sequence[int]]]:
        import torchvision

        kind = getattr(torchvision.datasets, name, None)
        known = inspect.signature(kind).parameters if isinstance(kind, type) else {}
        if kind is None or "download" not in known or not {"train", "split"} & set(known):
            raise ValueError(
                f"root='torchvision:{name}' names no torchvision data set with a training split and a download, "
                "such as torchvision:CIFAR10, torchvision:MNIST or torchvision:SVHN"
            )
        train, test = (
            ({"train": True}, {"train": False}) if "train" in known else ({"split": "train"}, {"split": "test"})
        )
        try:
            sets: list[Any] = [kind(self.download_dir, download=True, **which) for which in (train, test)]
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"could not get torchvision's {name} into {self.download_dir}: {error}; check the connection and the "
                "free space, or put the files there"
            ) from error
        parts: dict[str, tuple[Sequence[Any], Sequence[int]]] = {}
        for part, data in zip(("train", "test"), sets, strict=True):
            targets = next((getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key)), None)
            if targets is None:
                targets = [label for _, label in data]
            parts[part] = ([Member(data, i) for i in range(len(targets))], [int(t) for t in targets])
        self._classes = [str(c) for c in getattr(sets[0], "classes", sorted(set(parts["train"][1])))]
        return parts | self._split(*parts["train"], {"val": self.val_fraction})

    def _split(
        self, items: Sequence[Any], targets: Sequence[int], sizes: dict[str, Any]
    ) -> dict[str, tuple[Sequence[Any], Sequence[int]]]:
        found = self.divided(items, lambda: self._drawn(targets, sizes))
        return {name: ([items[i] for i in index], [int(targets[i]) for i in index]) for name, index in found.items()}

    def _drawn(self, targets: Sequence[int], sizes: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            indices = stratified_split(targets, list(sizes.values()), self.split_seed, self._classes)
        except ValueError as error:
            raise ValueError(f"{self.root}: {error}") from None
        return dict(zip(("train", *sizes), indices, strict=True))


def prepared(model: Any, items: Sequence[Any], targets: Sequence[int]) -> Images:
    """Images as the trained `model` expects them.

    Raises:
        ValueError: the model does not say how its images were prepared.
    """
    stored = model.hparams["preprocess"]
    if stored is None:
        raise ValueError(
            "the checkpoint does not say how its images were prepared; train with ImageClassifier(preprocess=)"
        )
    preprocess = Preprocess.from_dict(stored)
    return Images(items, targets, "L" if preprocess.in_chans == 1 else "RGB", eval_transform(preprocess))

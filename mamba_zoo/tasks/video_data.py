"""Clips to classify: moving digits, or folders of clips, one folder a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ._data import TaskData
from .clips import COUNTS, FRAMES, MOTIONS, SIZE, Moving, is_clip, list_clips, read_clip, to_clip
from .image_files import split_folders, stratified_split
from .image_transforms import Preprocess


class Clips(Dataset):
    """Clips `(3, frames, size, size)`, as a model expects them, and class numbers.

    Args:
        items: Clips.
        targets: One class number a clip.
        frames: To take of each clip.
        preprocess: What the model expects of its images.
        train: Take random frames and, with `crop_scale` below 1, a random part of the picture.
        crop_scale: Least part of the picture that such a cut keeps.
        hflip: Probability of a left-right flip.
    """

    def __init__(
        self,
        items: Sequence[Any],
        targets: Sequence[int],
        frames: int,
        preprocess: Preprocess,
        train: bool = False,
        crop_scale: float = 1.0,
        hflip: float = 0.0,
    ) -> None:
        self.items, self.targets, self.frames, self.train = list(items), list(targets), frames, train
        size = [preprocess.size, preprocess.size]
        steps: list[Any] = []
        if train and crop_scale < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(crop_scale, 1.0), antialias=True))
        else:
            shorter = round(preprocess.size / preprocess.crop_pct)
            steps += [v2.Resize(shorter, antialias=True), v2.CenterCrop(size)]
        if train and hflip:
            steps.append(v2.RandomHorizontalFlip(hflip))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(preprocess.mean), list(preprocess.std))]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip = to_clip(read_clip(self.items[index], self.frames, self.train))
        return self.transform(clip).transpose(0, 1), self.targets[index]


class VideoData(TaskData):
    """Training, validation and test clips.

    Args:
        root: "moving-digits", clips of 8 frames of 24x24 pixels in which a handwritten digit of scikit-learn moves in
            one of four directions, which no single frame shows; or a folder. It holds `train/` with `val/` or `test/`
            or both, each with one folder a class; or the class folders themselves, split automatically. A clip is a
            folder of frames (`CLASS/CLIP/00001.jpg`), or a video file where torchcodec is installed.
        model_name: The model to be trained: where not given, image size and statistics are the ones it expects.
        image_size: Height and width in pixels that frames are resized to. None: 24 for digits, else the model's.
        num_frames: Taken of each clip, spread over its length.
        batch_size: Clips a step and device.
        num_workers: Processes that read clips; 0 reads them in the training process.
        val_fraction: Part of the training clips set apart where the source has no validation split.
        test_fraction: Likewise for a test split.
        split_seed: Of the automatic split, and of the moving digits.
        crop_scale: Least part of the picture that random cuts of training clips keep; 1 cuts nothing.
        hflip: Probability of a left-right flip of training clips. It turns motions round too.

    Raises:
        FileNotFoundError: a missing folder, or one without clips.
        ValueError: classes that differ between splits, clips that cannot be read, or a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "num_classes": "num_classes",
        "class_names": "classes",
        "img_size": "image_size",
        "num_frames": "num_frames",
        "preprocess": "preprocess_values",
    }

    def __init__(
        self,
        root: str = "moving-digits",
        model_name: str | None = None,
        image_size: int | None = None,
        num_frames: int = FRAMES,
        batch_size: int = 16,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        crop_scale: float = 1.0,
        hflip: float = 0.0,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 0.5:
                raise ValueError(f"{name}={value} must lie between 0 and 0.5")
        if num_frames < 1 or (image_size is not None and image_size < 1):
            raise ValueError(f"num_frames={num_frames} and image_size={image_size} must be at least 1")
        if not 0 < crop_scale <= 1 or not 0 <= hflip <= 1:
            raise ValueError(f"crop_scale={crop_scale} and hflip={hflip} must lie between 0 and 1")
        self.save_hyperparameters(logger=False)
        self.num_frames, self.split_seed = num_frames, split_seed
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.crop_scale, self.hflip = crop_scale, hflip
        size = SIZE if root == "moving-digits" and image_size is None else image_size
        self.preprocess = Preprocess.for_model(model_name, size, 3)
        self._classes: list[str] = []

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
    def image_size(self) -> int:
        """Height and width the model sees, in pixels."""
        return self.preprocess.size

    @property
    def preprocess_values(self) -> dict[str, Any]:
        """The preprocessing as plain values, for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.preprocess).items()}

    def parts(self) -> dict[str, Dataset]:
        """The clips of each part with their classes."""
        if self.root == "moving-digits":
            self._classes = list(MOTIONS)
            found = {s: [Moving(s, self.split_seed, i) for i in range(COUNTS[s])] for s in ("train", "val", "test")}
            parts: dict[str, Any] = {s: (clips, [clip.motion for clip in clips]) for s, clips in found.items()}
        else:
            parts = self._folder(Path(self.root).expanduser())
        both: Any = {"frames": self.num_frames, "preprocess": self.preprocess}
        train = Clips(*parts["train"], **both, train=True, crop_scale=self.crop_scale, hflip=self.hflip)
        return {"train": train, **{s: Clips(*parts[s], **both) for s in ("val", "test") if s in parts}}

    def undivided(self) -> bool:
        """Whether the root holds class folders."""
        root = Path(self.root).expanduser()
        return root.is_dir() and not split_folders(root)

    def everything(self, model: Any) -> Dataset:
        """Every clip."""
        clips, targets, self._classes = read_clip_classes(Path(self.root).expanduser(), model.class_names)
        return Clips(clips, targets, self.num_frames, self.preprocess)

    def _folder(self, root: Path) -> dict[str, tuple[list[Path], list[int]]]:
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}; root is 'moving-digits' or a folder with class folders of clips"
            )
        folders = split_folders(root)
        clips, targets, self._classes = read_clip_classes(folders.get("train", root))
        if not folders:
            return self._split(clips, targets, {"test": self.test_fraction, "val": self.val_fraction})
        parts = {"train": (clips, targets)}
        for name in ("val", "test"):
            if name in folders:
                parts[name] = read_clip_classes(folders[name], self._classes)[:2]
        if "val" not in parts:
            parts |= self._split(*parts["train"], {"val": self.val_fraction})
        return parts

    def _split(
        self, clips: list[Path], targets: list[int], sizes: dict[str, float]
    ) -> dict[str, tuple[list[Path], list[int]]]:
        found = self.divided(clips, lambda: self._drawn(targets, sizes))
        return {name: ([clips[i] for i in index], [targets[i] for i in index]) for name, index in found.items()}

    def _drawn(self, targets: list[int], sizes: dict[str, float]) -> dict[str, np.ndarray]:
        try:
            indices = stratified_split(targets, list(sizes.values()), self.split_seed, self._classes)
        except ValueError as error:
            raise ValueError(f"{self.root}: {str(error).replace('images', 'clips')}") from None
        return dict(zip(("train", *sizes), indices, strict=True))


def read_clip_classes(folder: Path, classes: list[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Clips, class numbers and class names of a folder that holds one folder a class.

    Raises:
        FileNotFoundError: no class folder, or one without a clip.
        ValueError: other classes than `classes`.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} holds no class folders; expected {folder}/CLASS/CLIP/00001.jpg")
    if classes is not None and names != classes:
        raise ValueError(
            f"the classes of {folder} ({', '.join(names[:5])}) are not those trained on ({', '.join(classes[:5])}); "
            "every split needs the same class folders"
        )
    clips: list[Path] = []
    targets: list[int] = []
    for number, name in enumerate(names):
        if is_clip(folder / name):
            raise FileNotFoundError(
                f"{folder / name} holds frames where clips were expected: {folder}/CLASS/CLIP/00001.jpg"
            )
        found = list_clips(folder / name)
        clips += found
        targets += [number] * len(found)
    return clips, targets, names

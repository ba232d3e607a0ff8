"""Point clouds to train on: bundled ones, a file of arrays, or folders of clouds and meshes; all kept in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._bundled_clouds import SOLIDS, digit_clouds, solid_clouds
from ._data import TaskData
from .image_files import split_folders, stratified_split
from .point_files import Cloud, class_folders, estimate_normals, read_cloud, resample, to_unit_sphere, voxel_downsample

Feature = Literal["normals", "height"]


class Clouds(Dataset):
    """Clouds of one size with their labels; an item is `(points, label)` or `(points, label, part)`.

    Args:
        points: `(s, n, 3)`, or `(s, n, 6)` with normals.
        labels: `(s,)`.
        parts: `(s, n)`, numbered through all classes, or None.
    """

    def __init__(self, points: Tensor, labels: Tensor, parts: Tensor | None) -> None:
        self.tensors = [points, labels] if parts is None else [points, labels, parts]
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return tuple(tensor[i] for tensor in self.tensors)


class PointData(TaskData):
    """Shapes with their classes.

    Args:
        root: "digits", scikit-learn's handwritten digits as points (x, y, intensity); "solids", four kinds of made
            shapes with parts; a `.npz` file, see `read_bundle`; or a folder with one folder of clouds or meshes a
            class, or with `train/` and `val/` or `test/`, each such a folder.
        points: Points that every cloud is brought to: of a mesh as many on equal areas, of a cloud a random part.
        voxel: Thin clouds of files to one point for every voxel of this side first; 0 is off.
        batch_size: Clouds a step and device.
        num_workers: Processes that put batches together.
        val_fraction: Part of the training clouds set apart where the source has no validation clouds. 0 sets none
            apart: validation then repeats the training clouds and says nothing, and the last weights count.
        test_fraction: Likewise for test clouds, where it must be above 0.
        split_seed: Of the automatic split, and of the points that are drawn.
        repeats: An epoch goes so many times through the training clouds; for sets of a few hundred.
        features: What the model is told of each point beside its place: "normals", those of the files, or where there
            are none, of planes through the nearest points (Open3D); "height" above the lowest point, along y.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a setting out of range, or classes that differ between splits.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "num_classes": "num_classes", "class_names": "classes", "features": "features",
    }  # fmt: skip
    with_parts: ClassVar[bool] = False

    def __init__(
        self,
        root: str = "digits",
        points: int = 2048,
        voxel: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        repeats: int = 1,
        features: list[Feature] | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        if odd := [name for name in features or [] if name not in get_args(Feature)]:
            raise ValueError(f"features={features}: {odd[0]!r} is unknown; choose of {', '.join(get_args(Feature))}")
        if min(points, repeats) < 1 or voxel < 0:
            raise ValueError(f"points={points} and repeats={repeats} must be at least 1, voxel={voxel} at least 0")
        if not 0 <= val_fraction < 0.5 or not 0 < test_fraction < 0.5:
            raise ValueError(f"val_fraction={val_fraction} and test_fraction={test_fraction} must be below 0.5")
        self.save_hyperparameters(logger=False)
        self.points, self.voxel, self.split_seed, self.repeats = points, voxel, split_seed, repeats
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.order_seed, self.features = split_seed, features or None
        self._classes: list[str] = []
        self._part_names: list[list[str]] = []

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
    def part_names(self) -> list[list[str]]:
        """Names of the parts of each class."""
        self.setup()
        return self._part_names

    def parts(self) -> dict[str, Dataset]:
        """The clouds, read and split."""
        if self.root in ("digits", "solids"):
            found = self._bundled()
        elif Path(self.root).suffix == ".npz":
            found = self._bundle(Path(self.root).expanduser())
        else:
            found = self._folder(Path(self.root).expanduser())
        if self.with_parts and not self._part_names:
            raise ValueError(
                f"the clouds of {self.root} have no parts; give 'solids', a .npz file with 'part' and 'part_names', or "
                "folders of .npz files with 'labels'"
            )
        if self.repeats > 1:
            found["train"] = _subset(found["train"], np.tile(np.arange(len(found["train"])), self.repeats))
        return dict(found)

    def undivided(self) -> bool:
        """Whether the root holds class folders."""
        root = Path(self.root).expanduser()
        return root.is_dir() and not split_folders(root)

    def everything(self, model: Any) -> Dataset:
        """Every cloud."""
        self._part_names = list(model.hparams.get("part_names") or [])
        paths, targets, self._classes = class_folders(Path(self.root).expanduser(), getattr(model, "class_names", None))
        return self._read(paths, targets)

    def _bundled(self) -> dict[str, Clouds]:
        part = None
        if self.root == "digits":
            points, labels = digit_clouds()
            self._classes = [str(i) for i in range(10)]
        else:
            points, labels, part = solid_clouds()
            self._classes, self._part_names = list(SOLIDS), [list(names) for names in SOLIDS.values()]
        return self._split(self._clouds(list(map(Cloud, points)), labels, part))

    def _bundle(self, path: Path) -> dict[str, Clouds]:
        bundle = read_bundle(path)
        self._classes = bundle["class_names"]
        if "part" in bundle:
            self._part_names = bundle["part_names"]
        normals = bundle.get("normals", [None] * len(bundle["points"]))
        whole = self._clouds(list(map(Cloud, bundle["points"], normals)), bundle["label"], bundle.get("part"))
        if "split" not in bundle:
            return self._split(whole)
        index = {name: np.flatnonzero(bundle["split"] == i) for i, name in enumerate(("train", "test", "val"))}
        found = {name: _subset(whole, at) for name, at in index.items() if len(at)}
        if "train" not in found or "test" not in found:
            raise ValueError(f"{path}: 'split' must mark training (0) and test (1) clouds")
        return self._with_validation(found)

    def _folder(self, root: Path) -> dict[str, Clouds]:
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}; root is 'digits', 'solids', a .npz file, or a folder with a folder of clouds for "
                "each class"
            )
        folders = split_folders(root)
        if not folders:
            paths, targets, self._classes = class_folders(root)
            return self._split(self._read(paths, targets), paths)
        paths, targets, self._classes = class_folders(folders["train"])
        found = {"train": self._read(paths, targets)}
        for name in ("val", "test"):
            if name in folders:
                found[name] = self._read(*class_folders(folders[name], self._classes)[:2])
        return self._with_validation(found, paths)

    def _read(self, paths: Sequence[Path], targets: Sequence[int]) -> Clouds:
        clouds = [prepared_cloud(path, self.points, self.voxel, self.split_seed) for path in paths]
        part = None
        if self.with_parts and all(cloud.labels is not None for cloud in clouds):
            clouds = [resample(cloud, self.points, self.split_seed) for cloud in clouds]
            part = np.stack([cloud.labels for cloud in clouds])  # type: ignore[arg-type]
            if not self._part_names:
                counts = [max(int(p.max()) for p, t in zip(part, targets, strict=True) if t == c) + 1
                          for c in range(len(self._classes))]  # fmt: skip
                self._part_names = [[str(i) for i in range(count)] for count in counts]
        return self._clouds(clouds, np.asarray(targets), part)

    def _clouds(self, clouds: list[Cloud], labels: np.ndarray, part: np.ndarray | None) -> Clouds:
        """Brought to one size, in an order in which the first points are a fair sample, in the unit sphere."""
        drawn, normals = [], "normals" in (self.features or [])
        for i, cloud in enumerate(clouds):
            if part is not None:
                cloud = replace(cloud, labels=part[i].astype(np.int64))
            if normals and cloud.normals is None:
                cloud = estimate_normals(cloud)
            drawn.append(resample(cloud, min(self.points, len(cloud)) if self._bundled_size() else self.points, i))
        points = torch.from_numpy(to_unit_sphere(np.stack([cloud.points for cloud in drawn])))
        if normals:
            beside = np.stack([cloud.normals for cloud in drawn])  # type: ignore[arg-type]
            points = torch.cat([points, torch.from_numpy(beside).float()], dim=-1)
        numbers = torch.from_numpy(np.asarray(labels).astype(np.int64))
        if part is None:
            return Clouds(points, numbers, None)
        first = np.cumsum([0, *(len(names) for names in self._part_names)])
        within = np.stack([cloud.labels for cloud in drawn])  # type: ignore[arg-type]
        return Clouds(points, numbers, torch.from_numpy(within + first[np.asarray(labels)][:, None]))

    def _bundled_size(self) -> bool:
        return self.root in ("digits", "solids")

    def _split(
        self, whole: Clouds, files: Sequence[Path] = (), parts: Sequence[str] = ("test", "val")
    ) -> dict[str, Any]:
        """`parts` cut off the clouds one after the other, and the rest to train on."""
        index = self.divided(files, lambda: self._drawn(whole, parts))
        found = {name: _subset(whole, np.array(numbers)) for name, numbers in index.items()}
        return {"val": found["train"], **found}

    def _with_validation(self, found: dict[str, Clouds], files: Sequence[Path] = ()) -> dict[str, Clouds]:
        return found if "val" in found else {**found, **self._split(found["train"], files, ("val",))}

    def _drawn(self, whole: Clouds, parts: Sequence[str]) -> dict[str, np.ndarray]:
        left, found = np.arange(len(whole)), {}
        for name in parts:
            if fraction := self.test_fraction if name == "test" else self.val_fraction:
                rest, cut = self._cut(_subset(whole, left), fraction)
                left, found[name] = left[rest], left[cut]
        return {"train": left, **found}

    def _cut(self, whole: Clouds, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        try:
            rest, cut = stratified_split(whole.targets, [fraction], self.split_seed, self._classes)
        except ValueError as error:
            raise ValueError(f"{self.root}: {str(error).replace('images', 'clouds')}") from None
        return rest, cut


class PartData(PointData):
    """Shapes with their classes and the part of every point; see `PointData` for the arguments."""

    tells: ClassVar[Mapping[str, str]] = {
        "class_names": "classes", "part_names": "part_names", "features": "features",
    }  # fmt: skip
    with_parts = True

    def __init__(
        self,
        root: str = "solids",
        points: int = 2048,
        voxel: float = 0.0,
        batch_size: int = 16,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        repeats: int = 1,
        features: list[Feature] | None = None,
    ) -> None:
        super().__init__(
            root, points, voxel, batch_size, num_workers, val_fraction, test_fraction, split_seed, repeats, features
        )


class UnlabelledData(PointData):
    """Shapes whose classes are not told to the model; see `PointData` for the arguments."""

    tells: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        root: str = "digits",
        points: int = 2048,
        voxel: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__(root, points, voxel, batch_size, num_workers, val_fraction, test_fraction, split_seed, repeats)


def read_bundle(path: Path) -> dict[str, Any]:
    """Clouds of one size in a `.npz` file.

    Arrays: "points" `(s, n, 3)` and "label" `(s,)`; if there are any "normals" `(s, n, 3)`, "split" `(s,)` (0 train, 1
    test, 2 validation), "class_names" `(classes,)`, "part" `(s, n)` within the class, and "part_names"
    `(classes, most)`, "" where a class has fewer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: arrays that are missing or do not fit.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    with np.load(path, allow_pickle=False) as file:
        found: dict[str, Any] = {name: file[name] for name in file.files}
    if missing := {"points", "label"} - set(found):
        raise ValueError(f"{path} holds {', '.join(found)}, but no array {sorted(missing)[0]!r}")
    shape = found["points"].shape
    if len(shape) != 3 or shape[2] != 3 or found["label"].shape != shape[:1]:
        raise ValueError(f"{path}: points {shape} must be (s, n, 3) and label {found['label'].shape} (s,)")
    if "normals" in found and found["normals"].shape != shape:
        raise ValueError(f"{path}: normals {found['normals'].shape} must be {shape}, as the points")
    classes = int(found["label"].max()) + 1
    found["class_names"] = [str(name) for name in found.get("class_names", range(classes))]
    if "part" in found:
        if found["part"].shape != shape[:2]:
            raise ValueError(f"{path}: part {found['part'].shape} must be {shape[:2]}, one number a point")
        names = found.get("part_names")
        if names is None:
            counts = [int(found["part"][found["label"] == c].max(initial=0)) + 1 for c in range(classes)]
            found["part_names"] = [[str(i) for i in range(count)] for count in counts]
        else:
            found["part_names"] = [[str(name) for name in row if str(name)] for row in names]
    return found


def prepared_cloud(path: Path, points: int, voxel: float = 0.0, seed: int = 0) -> Cloud:
    """A file as a cloud, thinned if asked; all its points."""
    cloud = read_cloud(path, points, seed)
    return voxel_downsample(cloud, voxel) if voxel > 0 else cloud


def _subset(whole: Clouds, index: np.ndarray) -> Clouds:
    points, labels, *parts = (tensor[torch.from_numpy(index)] for tensor in whole.tensors)
    return Clouds(points, labels, parts[0] if parts else None)

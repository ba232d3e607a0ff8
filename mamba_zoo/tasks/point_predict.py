"""`mamba-zoo predict` for point clouds: classes as CSV; parts as labels, pictures, and a page that turns them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._classifier import write_classes
from .point_data import prepared_cloud
from .point_figures import plot_parts, write_viewer
from .point_files import Cloud, estimate_normals, list_clouds, read_cloud, resample, to_unit_sphere
from .result_names import name_results
from .running import write_csv

if TYPE_CHECKING:
    from .points import PartSegmenter, PointClassifier, PointTask


def predict_classes(model: PointClassifier, args: argparse.Namespace) -> str:
    """Write the likeliest classes of each file, by default into `predictions.csv`.

    Raises:
        ValueError: `top` below 1, or a file that cannot be read.
        FileNotFoundError: no such file or folder.
    """
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    paths = _files(args.data)
    device = _device(args)
    model = model.to(device).eval()
    found = []
    for start in range(0, len(paths), args.batch_size):
        clouds = [
            resample(_with_normals(model, prepared_cloud(path, 2048, args.voxel)), model.num_points)
            for path in paths[start : start + args.batch_size]
        ]
        x = torch.stack([_tensor(model, cloud) for cloud in clouds]).to(device)
        with torch.no_grad():
            found.append(model.predict_step((x,), 0).cpu())
    out = args.out or Path("predictions.csv")
    write_classes(out, paths, torch.cat(found), model.class_names, args.top)
    return f"{len(paths):,} clouds -> {out}"


def predict_parts(model: PartSegmenter, args: argparse.Namespace) -> str:
    """Write the part of every point of each file, a picture of it, and one page for all, by default into `predictions`.

    Raises:
        ValueError: a shape whose class is not known.
        FileNotFoundError: no such file or folder.
    """
    paths = _files(args.data)
    out, device = args.out or Path("predictions"), _device(args)
    model = model.to(device).eval()
    shown: list[Any] = []
    for path, called in zip(paths, name_results(paths, args.data), strict=True):
        stem = out / called
        label = _label(model, path, args.shape)
        cloud = _with_normals(model, read_cloud(path))
        # Drawn in another order, so that the pieces that the model reads are fair samples; and put back.
        shuffle = np.random.default_rng(0).permutation(len(cloud))
        x = _tensor(model, cloud.take(shuffle))[None].to(device)
        with torch.no_grad():
            part = np.empty(len(cloud), dtype=np.int64)
            try:
                part[shuffle] = model.label(x, torch.tensor([label], device=device))[0].cpu().numpy()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        part -= sum(map(len, model.part_names[:label]))
        names = model.part_names[label]
        rows = [
            {"x": x, "y": y, "z": z, "part": names[p]}
            for (x, y, z), p in zip(written(cloud).tolist(), part.tolist(), strict=True)
        ]
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_csv(stem.with_name(f"{stem.name}.csv"), rows)
        plot_parts(cloud.points, {model.class_names[label]: part}, names, stem.with_name(f"{stem.name}.png"))
        shown.append((f"{path.name}: {model.class_names[label]}", cloud.points, part, names))
    write_viewer(shown, out / "parts.html")
    return f"{len(paths):,} clouds -> {out}: parts as CSV and PNG, and parts.html"


def written(cloud: Cloud) -> np.ndarray:
    """Coordinates as text `(n, 3)`, in the units and from the origin of the file, with all digits that are known."""
    if not cloud.origin.any():
        return cloud.points.astype(str)  # as few digits as read back the same
    size = float(np.abs(cloud.points).max())
    digits = 9 if size == 0 else max(0, math.ceil(-math.log10(np.spacing(np.float32(size)))))
    return np.round(cloud.origin + cloud.points, digits).astype(str)


def _with_normals(model: PointTask, cloud: Cloud) -> Cloud:
    return estimate_normals(cloud) if "normals" in model.features and cloud.normals is None else cloud


def _tensor(model: PointTask, cloud: Cloud) -> torch.Tensor:
    """Points `(n, 3)` in the unit sphere, with their normals `(n, 6)` if the model reads them."""
    points = to_unit_sphere(cloud.points)
    if "normals" in model.features and cloud.normals is not None:
        points = np.concatenate([points, cloud.normals], axis=1)
    return torch.from_numpy(points)


def _files(data: Path) -> list[Path]:
    if not data.exists():
        raise FileNotFoundError(f"no file or folder {data}")
    return [data] if data.is_file() else list_clouds(data)


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if args.device in ("auto", "gpu") and torch.cuda.is_available() else "cpu")


def _label(model: PartSegmenter, path: Path, shape: str | None) -> int:
    name = path.resolve().parent.name if shape is None else shape
    if name in model.class_names:
        return model.class_names.index(name)
    where = f"the folder of {path}" if shape is None else "--shape"
    raise ValueError(
        f"{where} is {name!r}, which is no class of this model; say which it is: --shape, one of "
        f"{', '.join(model.class_names)}"
    )

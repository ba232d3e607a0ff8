"""Point clouds and meshes in files: reading, sampling of surfaces, normals, thinning, and folders of classes.

Meshes and most clouds are read by Open3D (the extra `points`), LAS by laspy; NumPy's own formats need neither.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = (".npy", ".npz", ".txt", ".xyz", ".pts")
MESHES = (".off", ".obj", ".stl", ".ply")
CLOUDS = (".pcd", ".ply")
LIDAR = (".las", ".laz")
ENDINGS = tuple(dict.fromkeys((*ARRAYS, *MESHES, *CLOUDS, *LIDAR)))
_FAR = 100  # distance in sizes of a cloud, up to which float32 tells points apart that are 1e-5 of the size apart


class BadCloudError(ValueError):
    """A file that is no point cloud or mesh; the message names it."""


@dataclass(frozen=True)
class Cloud:
    """Points of one file.

    Attributes:
        points: `(n, 3)` float32, in the units of the file, from `origin`.
        normals: `(n, 3)` float32 of unit length, zero where a file has zeros, or None.
        labels: A number for every point, `(n,)` int64, or None.
        origin: Where the points are counted from, `(3,)` float64: zeros, or the lowest corner of a cloud so far away
            that float32 would not tell its points apart.
    """

    points: np.ndarray
    normals: np.ndarray | None = None
    labels: np.ndarray | None = None
    origin: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def __len__(self) -> int:
        return len(self.points)

    def take(self, index: np.ndarray) -> Cloud:
        """The points of `index` with all that is known of them."""
        rest = {name: value[index] for name in ("normals", "labels") if (value := getattr(self, name)) is not None}
        return replace(self, points=self.points[index], **rest)


def read_cloud(path: str | Path, count: int = 2048, seed: int = 0) -> Cloud:
    """The points of a file; of a mesh, `count` points of its surface, as many on equal areas.

    Points of LiDAR, and of a cloud that is 100 times as far away as it is large, are counted from its lowest corner.

    Args:
        path: A mesh (`.off`, `.obj`, `.stl`, `.ply`), a cloud (`.pcd`, `.ply`, `.las`, `.laz`), or numbers
            (`.npy`, `.txt`, `.xyz`, `.pts`: a row a point, coordinates first, then normals if there are six columns;
            `.npz`: arrays "points", and "normals" and "labels" if there are any).
        count: Points on a mesh; clouds keep theirs.
        seed: Of the points on a mesh.

    Raises:
        BadCloudError: the file is none of these, damaged, or has no points.
        ModuleNotFoundError: the package that reads it is not installed.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no point cloud at {path}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise BadCloudError(f"{path} ends in {ending!r}; point clouds and meshes end in {', '.join(ENDINGS)}")
    if ending in ARRAYS:
        cloud = _read_arrays(path)
    elif ending in LIDAR:
        cloud = _read_las(path)
    else:
        cloud = _read_open3d(path, count, seed)
    points = cloud.points
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise BadCloudError(f"{path} holds an array of shape {points.shape}; points are rows of three coordinates")
    if not (np.abs(points) <= np.finfo(np.float32).max).all():
        raise BadCloudError(f"{path} holds coordinates that are not finite, or too large for float32")
    cloud = _from_corner(cloud, always=ending in LIDAR)
    if cloud.normals is None:
        return cloud
    length = np.linalg.norm(cloud.normals, axis=1, keepdims=True)
    return replace(cloud, normals=cloud.normals / np.maximum(length, 1e-12))


def estimate_normals(cloud: Cloud, neighbours: int = 30) -> Cloud:
    """The cloud with normals of planes through the nearest points; their sign is arbitrary (Open3D)."""
    found = _geometry(cloud)
    found.estimate_normals(_open3d().geometry.KDTreeSearchParamKNN(neighbours))
    return replace(cloud, normals=np.asarray(found.normals, dtype=np.float32))


def voxel_downsample(cloud: Cloud, voxel: float) -> Cloud:
    """One point, the mean, for every voxel of side `voxel` that holds any; labels are lost (Open3D).

    Raises:
        ValueError: `voxel` is not positive.
    """
    if voxel <= 0:
        raise ValueError(f"voxel={voxel} must be positive, in the units of the points")
    found = _geometry(cloud).voxel_down_sample(voxel)
    normals = np.asarray(found.normals, dtype=np.float32) if cloud.normals is not None else None
    return Cloud(np.asarray(found.points, dtype=np.float32), normals, origin=cloud.origin)


def resample(cloud: Cloud, count: int, seed: int = 0) -> Cloud:
    """`count` points drawn at random; all of them, and some again, where there are fewer."""
    draw = np.random.default_rng(seed)
    whole = [draw.permutation(len(cloud)) for _ in range(-(-count // len(cloud)))]
    return cloud.take(np.concatenate(whole)[:count])


def to_unit_sphere(points: np.ndarray) -> np.ndarray:
    """Points `(..., n, 3)` with their mean at the origin and the furthest one at distance 1."""
    points = points - points.mean(axis=-2, keepdims=True)
    far = np.linalg.norm(points, axis=-1).max(axis=-1)[..., None, None]
    return (points / np.maximum(far, 1e-12)).astype(np.float32)


def list_clouds(root: Path) -> list[Path]:
    """All files of known endings in a folder and its folders, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise FileNotFoundError(f"{root} holds no point cloud or mesh ({', '.join(ENDINGS)})")
    return found


def class_folders(root: Path, classes: Sequence[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Files of a folder with one folder a class.

    Args:
        root: The folder.
        classes: Names in the order of their numbers; None takes the folders in alphabetic order.

    Returns: Files, their class numbers, and the names.

    Raises:
        FileNotFoundError: no folders, or one without a file.
        ValueError: a folder that is none of `classes`.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{root} holds no folders; put the files of each class into a folder of its own")
    names = [path.name for path in folders] if classes is None else list(classes)
    if odd := [path.name for path in folders if path.name not in names]:
        raise ValueError(f"{root} holds a folder {odd[0]!r}, which is none of the classes {', '.join(names)}")
    paths: list[Path] = []
    targets: list[int] = []
    for folder in folders:
        found = list_clouds(folder)
        paths += found
        targets += [names.index(folder.name)] * len(found)
    return paths, targets, names


def _from_corner(cloud: Cloud, always: bool) -> Cloud:
    """The cloud as float32: surveyed coordinates are so large that their differences do not fit."""
    points = cloud.points.astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    far = max(np.abs(low).max(), np.abs(high).max()) > _FAR * (high - low).max()
    origin = low if far or always else np.zeros(3)
    return replace(cloud, points=(points - origin).astype(np.float32), origin=origin)


def _read_arrays(path: Path) -> Cloud:
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                if "points" not in file:
                    raise BadCloudError(f"{path} holds {', '.join(file.files) or 'nothing'}, but no array 'points'")
                normals = file["normals"].astype(np.float32) if "normals" in file else None
                labels = file["labels"].astype(np.int64) if "labels" in file else None
                return Cloud(file["points"].astype(np.float64), normals, labels)
        if path.suffix.lower() == ".npy":
            table = np.load(path, allow_pickle=False)
        else:
            first = path.read_text(encoding="utf-8").lstrip().partition("\n")[0]
            table = np.loadtxt(path, delimiter="," if "," in first else None, ndmin=2)
    except BadCloudError:
        raise
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise BadCloudError(f"{path} cannot be read: {error}") from error
    if table.ndim != 2 or table.shape[1] < 3:
        raise BadCloudError(f"{path} holds an array of shape {table.shape}; points are rows of three coordinates")
    normals = table[:, 3:6].astype(np.float32) if table.shape[1] == 6 else None
    return Cloud(table[:, :3].astype(np.float64), normals)


def _read_las(path: Path) -> Cloud:
    laspy = _package("laspy", path)
    try:
        return Cloud(np.asarray(laspy.read(path).xyz, dtype=np.float64))
    except Exception as error:  # whatever laspy and its decompressors raise
        raise BadCloudError(f"{path} cannot be read by laspy: {error}") from error


def _read_open3d(path: Path, count: int, seed: int) -> Cloud:
    o3d = _open3d(path)
    with o3d.utility.VerbosityContextManager(
        o3d.utility.VerbosityLevel.Error
    ):  # what it warns of ends in an error here
        if path.suffix.lower() in MESHES:
            mesh = o3d.io.read_triangle_mesh(str(path))
            if len(mesh.triangles):
                o3d.utility.random.seed(seed)
                mesh.compute_triangle_normals()
                return _cloud(mesh.sample_points_uniformly(count, use_triangle_normal=True))
        found = o3d.io.read_point_cloud(str(path)) if path.suffix.lower() in CLOUDS else None
    if found is None or not len(found.points):
        raise BadCloudError(f"{path} cannot be read by Open3D, or holds neither triangles nor points")
    return _cloud(found)


def _cloud(found: Any) -> Cloud:
    normals = np.asarray(found.normals, dtype=np.float32) if found.has_normals() else None
    return Cloud(np.array(found.points), normals)


def _geometry(cloud: Cloud) -> Any:
    o3d = _open3d()
    found = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.points.astype(np.float64)))
    if cloud.normals is not None:
        found.normals = o3d.utility.Vector3dVector(cloud.normals.astype(np.float64))
    return found


def _open3d(path: Path | None = None) -> Any:
    return _package("open3d", path)


def _package(name: str, path: Path | None) -> Any:
    what = f"{path} needs" if path is not None else "this needs"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} the package {name}: pip install 'mamba_zoo[points]'; without it, points come from "
            f"{', '.join(ARRAYS)}"
        ) from error
    except (ImportError, OSError) as error:  # Open3D needs libraries of the system
        raise ModuleNotFoundError(
            f"{what} the package {name}, which is installed but does not start ({error}); on Debian, "
            "apt install libusb-1.0-0 libgl1 libgomp1"
        ) from error

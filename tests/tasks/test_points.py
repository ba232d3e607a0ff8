"""Tasks of point clouds: files, data, augmentation, scores, training, prediction, comparison of orders."""

import argparse
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_zoo.tasks import compare
from mamba_zoo.tasks.point_augment import PointAugment, random_rotations, small_rotations
from mamba_zoo.tasks.point_data import PartData, PointData, UnlabelledData
from mamba_zoo.tasks.point_figures import write_viewer
from mamba_zoo.tasks.point_files import (
    BadCloudError,
    Cloud,
    class_folders,
    estimate_normals,
    read_cloud,
    resample,
    to_unit_sphere,
    voxel_downsample,
)
from mamba_zoo.tasks.point_predict import written
from mamba_zoo.tasks.point_pretraining import PointPretrainer
from mamba_zoo.tasks.points import PartSegmenter, PointClassifier, shape_iou
from mamba_zoo.tasks.registry import TASKS, load_task
from mamba_zoo.tasks.train import train_once

OPTIONS: dict[str, Any] = {"groups": 12, "group_size": 6, "dim": 32, "depth": 2, "d_state": 4}
CPU = {"accelerator": "cpu"}
PSB = Path(os.environ.get("MAMBA_ZOO_DATA", "data")) / "pointcloud" / "labeled_psb"


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Rods and balls, whose upper half is another part."""
    draw = np.random.default_rng(0)
    label = np.arange(48) % 2
    points = draw.normal(size=(48, 96, 3)) / 3
    points[label == 0] *= (0.1, 0.1, 2.0)
    part = (points[..., 2] > 0).astype(np.uint8)
    split = (np.arange(48) >= 36).astype(np.uint8)
    path = tmp_path / "shapes.npz"
    np.savez(path, points=points, label=label, part=part, split=split, class_names=["rod", "ball"],
             part_names=[["low", "high"], ["south", "north"]])  # fmt: skip
    return path


@pytest.fixture
def folder(tmp_path, bundle) -> Path:
    """The same as a folder of files, one folder a class."""
    with np.load(bundle) as file:
        for i, (points, label, part) in enumerate(zip(file["points"], file["label"], file["part"], strict=True)):
            where = tmp_path / "files" / ("rod", "ball")[label]
            where.mkdir(parents=True, exist_ok=True)
            np.savez(where / f"{i}.npz", points=points, labels=part)
    return tmp_path / "files"


def test_number_files(tmp_path):
    table = np.arange(30.0).reshape(5, 6)
    np.save(tmp_path / "a.npy", table)
    np.savetxt(tmp_path / "b.txt", table)
    np.savetxt(tmp_path / "c.xyz", table[:, :3], delimiter=",")
    np.savez(tmp_path / "d.npz", points=table[:, :3], labels=np.arange(5))
    for name in ("a.npy", "b.txt", "c.xyz", "d.npz"):
        cloud = read_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points, table[:, :3])
        assert cloud.points.dtype == np.float32
        assert (cloud.normals is not None) == (name in ("a.npy", "b.txt"))
    assert read_cloud(tmp_path / "d.npz").labels is not None
    np.save(tmp_path / "flat.npy", np.arange(6.0))
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    np.savez(tmp_path / "other.npz", xyz=table)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    (tmp_path / "words.txt").write_text("a b c\n")
    for name, message in {
        "flat.npy": "rows of three coordinates", "nan.npy": "not finite", "other.npz": "holds xyz, but no array",
        "broken.npy": "cannot be read", "words.txt": "cannot be read", "broken.doc": r"ends in '\.doc'",
    }.items():  # fmt: skip
        (tmp_path / "broken.doc").touch()
        with pytest.raises(BadCloudError, match=message):
            read_cloud(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_cloud(tmp_path / "none.npy")


FAR = np.array([500000.0, 5400000.0, 100.0])


def write_cloud(path: Path, points: np.ndarray) -> None:
    """Coordinates in a format of their own."""
    if path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".npz":
        np.savez(path, points=points)
    elif path.suffix == ".ply":
        o3d = pytest.importorskip("open3d")
        cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
        assert o3d.io.write_point_cloud(str(path), cloud)
    else:
        np.savetxt(path, points, fmt="%.4f")


@pytest.mark.parametrize("name", ["a.xyz", "a.txt", "a.pts", "a.npy", "a.npz", "a.ply"])
def test_clouds_far_away_keep_their_shape(tmp_path, name):
    if name == "a.ply" and importlib.util.find_spec("open3d") is None:
        pytest.skip("Open3D is not installed")
    points = (np.random.default_rng(0).normal(size=(200, 3)) * 0.3).round(4)
    write_cloud(tmp_path / name, points)
    near = read_cloud(tmp_path / name)
    assert not near.origin.any()
    np.testing.assert_array_equal(near.points, points.astype(np.float32))
    np.testing.assert_array_equal(written(near).astype(np.float32), near.points)
    write_cloud(tmp_path / name, points + FAR)
    far = read_cloud(tmp_path / name)
    np.testing.assert_allclose(to_unit_sphere(far.points), to_unit_sphere(near.points), atol=1e-6)
    np.testing.assert_allclose(far.origin, (points + FAR).min(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(written(far).astype(float), points + FAR, rtol=0, atol=2e-7)
    assert resample(far, 10).origin is far.origin


def test_coordinates_beyond_float32_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0.0, 0.0, 0.0], [1e40, 0.0, 0.0]]))
    with pytest.raises(BadCloudError, match="not finite, or too large for float32"):
        read_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize(("name", "package"), [("a.off", "open3d"), ("a.pcd", "open3d"), ("a.las", "laspy")])
def test_files_that_need_a_package_say_so(tmp_path, monkeypatch, name, package):
    def missing(wanted, *_):
        raise ModuleNotFoundError(f"No module named {wanted!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / name).write_text("OFF\n")
    with pytest.raises(
        ModuleNotFoundError, match=rf"{name} needs the package {package}: pip install 'mamba_zoo\[points\]'"
    ):
        read_cloud(tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("open3d") is None, reason="Open3D is not installed")
def test_meshes_are_sampled_by_area(tmp_path):
    path = tmp_path / "two.off"  # one triangle nine times as large as the other
    path.write_text("OFF\n6 2 0\n0 0 0\n3 0 0\n0 3 0\n10 0 0\n11 0 0\n10 1 0\n3 0 1 2\n3 3 4 5\n")
    cloud = read_cloud(path, 4000, seed=1)
    assert 0.87 < (cloud.points[:, 0] < 5).mean() < 0.93
    assert cloud.normals is not None
    np.testing.assert_allclose(np.abs(cloud.normals[:, 2]), 1, rtol=1e-6)
    np.testing.assert_array_equal(read_cloud(path, 4000, seed=1).points, cloud.points)


@pytest.mark.skipif(importlib.util.find_spec("open3d") is None, reason="Open3D is not installed")
def test_meshes_and_clouds_of_every_format_are_read(tmp_path):
    o3d = pytest.importorskip("open3d")
    box = o3d.geometry.TriangleMesh.create_box()
    box.compute_vertex_normals()
    cloud = box.sample_points_uniformly(500)
    for name in ("box.ply", "box.off", "box.obj", "box.stl"):
        assert o3d.io.write_triangle_mesh(str(tmp_path / name), box)
    for name in ("points.ply", "points.pcd"):
        assert o3d.io.write_point_cloud(str(tmp_path / name), cloud)
    for name in ("box.ply", "box.off", "box.obj", "box.stl", "points.ply", "points.pcd"):
        found = read_cloud(tmp_path / name, 300)
        assert len(found) == (500 if name.startswith("points") else 300)
        on_side = np.isclose(found.points, 0, atol=1e-5) | np.isclose(found.points, 1, atol=1e-5)
        assert on_side.any(axis=1).all(), name
        assert found.normals is not None
        np.testing.assert_allclose(np.linalg.norm(found.normals, axis=1), 1, rtol=1e-4)
    thin = voxel_downsample(found, 0.25)
    assert 50 < len(thin) < 200
    fresh = estimate_normals(Cloud(found.points), 10)
    assert fresh.normals is not None
    assert (np.abs(fresh.normals).max(axis=1) > 0.95).mean() > 0.6, "most points lie on a side"
    (tmp_path / "broken.ply").write_text("nothing")
    with pytest.raises(BadCloudError, match=r"broken\.ply cannot be read by Open3D"):
        read_cloud(tmp_path / "broken.ply")


@pytest.mark.skipif(importlib.util.find_spec("laspy") is None, reason="laspy is not installed")
def test_lidar_is_read_from_its_corner(tmp_path):
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=0, version="1.2")
    header.offsets, header.scales = [4e6, 5e6, 0], [0.001] * 3
    survey = laspy.LasData(header)
    survey.x, survey.y, survey.z = 4e6 + np.array([1.5, 2.25]), 5e6 + np.array([7.0, 7.5]), np.array([3.0, 1.0])
    survey.write(str(tmp_path / "a.las"))
    np.testing.assert_allclose(read_cloud(tmp_path / "a.las").points, [[0, 0, 2], [0.75, 0.5, 0]], atol=1e-6)


def test_resampling_and_scaling():
    cloud = Cloud(np.arange(30.0, dtype=np.float32).reshape(10, 3), labels=np.arange(10))
    more, fewer = resample(cloud, 25), resample(cloud, 4)
    assert len(more) == 25
    assert set(more.labels.tolist()) == set(range(10))  # type: ignore[union-attr]
    np.testing.assert_array_equal(fewer.points, cloud.points[fewer.labels])
    ball = to_unit_sphere(cloud.points)
    assert np.linalg.norm(ball, axis=1).max() == pytest.approx(1)
    assert np.abs(ball.mean(0)).max() < 1e-6


def test_class_folders(folder):
    paths, targets, names = class_folders(folder)
    assert names == ["ball", "rod"]
    assert [path.parent.name for path in paths] == [names[t] for t in targets]
    with pytest.raises(ValueError, match="a folder 'ball', which is none of the classes rod"):
        class_folders(folder, ["rod"])
    with pytest.raises(FileNotFoundError, match="holds no folders"):
        class_folders(folder / "rod")


@pytest.mark.parametrize("root", ["digits", "solids"])
def test_bundled_clouds(root):
    data = PointData(root)
    sizes = {name: len(data.split(name)) for name in ("train", "val", "test")}  # type: ignore[arg-type]
    assert sum(sizes.values()) == {"digits": 1797, "solids": 160}[root]
    points = data.split("train").tensors[0]
    assert points.norm(dim=-1).amax(1).sub(1).abs().max() < 1e-4
    again = PointData(root).split("train").tensors[0]
    assert torch.equal(points, again)


def test_bundles_and_folders_hold_the_same(bundle, folder):
    data = PartData(str(bundle), points=64, val_fraction=0.0)
    assert (len(data.split("train")), len(data.split("test"))) == (36, 12)
    assert data.split("val") is data.split("train")
    assert data.part_names == [["low", "high"], ["south", "north"]]
    points, label, part = data.split("train")[1]
    assert points.shape == (64, 3)
    assert set(part.tolist()) == {2, 3}, "numbered through the classes"
    assert label == 1
    files = PartData(str(folder), points=64)
    assert files.classes == ["ball", "rod"]
    assert files.part_names == [["0", "1"]] * 2
    assert sum(len(files.split(name)) for name in ("train", "val", "test")) == 48  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the clouds of digits have no parts"):
        PartData("digits").setup()
    with pytest.raises(ValueError, match=r"val_fraction=0\.7"):
        PointData(val_fraction=0.7)


def test_augmentation():
    torch.manual_seed(0)
    x = torch.randn(64, 40, 3)
    for around in ("any", "x", "y", "z"):
        turns = random_rotations(64, around, x.device)
        torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(64, 3, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.linalg.det(turns), torch.ones(64))
        if around != "any":
            axis = "xyz".index(around)
            torch.testing.assert_close((x @ turns)[..., axis], x[..., axis])
    angles = torch.acos(
        ((torch.diagonal(small_rotations(4000, 10.0, x.device), dim1=1, dim2=2).sum(-1) - 1) / 2).clamp(-1, 1)
    )
    assert angles.square().mean().sqrt() * 180 / torch.pi == pytest.approx(10, rel=0.1)
    cube = PointAugment(rotate="cube")(torch.eye(3).expand(2000, 3, 3))
    assert len({tuple(turn.flatten().int().tolist()) for turn in cube}) == 24
    turned = PointAugment(rotate="any", flip=True, tilt=5.0)(x)
    before, after = ((y[:, :, None] - y[:, None]).norm(dim=-1) for y in (x, turned))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(PointAugment()(x), x)
    outward = torch.nn.functional.normalize(x, dim=-1)  # of a ball, which stays one under turns
    both = PointAugment(rotate="any", flip=True, tilt=5.0, translate=0.1)(torch.cat([outward, outward], dim=-1))
    ball, normals = both.split(3, dim=-1)
    torch.testing.assert_close(ball - ball[:, :1], normals - normals[:, :1], rtol=0, atol=1e-5)
    plane = torch.cat([x * torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]).expand_as(x)], dim=-1)
    for cloud in PointAugment(scale=(0.5, 2.0), rotate="any")(plane):
        assert ((cloud[:, :3] - cloud[:1, :3]) @ cloud[0, 3:]).abs().max() < 1e-4, "normals stay upright on the plane"
    scaled = PointAugment(scale=(0.5, 2.0))(x) / x
    assert 0.5 <= scaled.min() < 0.6
    assert 1.8 < scaled.max() <= 2.0001
    assert (PointAugment(translate=0.2, jitter=0.01)(x) - x).abs().max() <= 0.241
    with pytest.raises(ValueError, match="rotate='w' is unknown"):
        PointAugment(rotate="w")  # type: ignore[arg-type]


def test_scores_of_parts():
    true = torch.tensor([[0, 0, 1, 1], [3, 3, 3, 3]])
    found = torch.tensor([[0, 1, 1, 1], [3, 3, 3, 3]])
    allowed = torch.tensor([[True, True, False, False, False], [False, False, True, True, True]])
    iou = shape_iou(found, true, allowed)
    torch.testing.assert_close(iou, torch.tensor([(1 / 2 + 2 / 3) / 2, 1.0]))


def test_a_classifier_learns_and_predicts(bundle, folder, tmp_path):
    model = {"options": OPTIONS, "num_points": 64, "lr": 4e-3, "rotate": "z", "votes": 3, "warmup_epochs": 1}
    data = PointData(str(bundle), batch_size=6, points=96)
    result = train_once("pointmamba_mini", data, tmp_path / "run", max_epochs=12, model=model, trainer=CPU)
    assert result["accuracy"] >= 0.9
    trained = load_task(tmp_path / "run" / "last.ckpt")
    assert isinstance(trained, PointClassifier)
    args = argparse.Namespace(
        data=folder, out=tmp_path / "p.csv", batch_size=16, num_workers=0, device="cpu", top=2, voxel=0.0
    )
    assert "48 clouds" in trained.predict_files(args)
    rows = (tmp_path / "p.csv").read_text().splitlines()
    right = sum(Path(row.split(",")[0]).parent.name == row.split(",")[1] for row in rows[1:])
    assert right >= 44
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(trained.predict_step(batch, 0), trained.predict_step(batch, 0)), "votes are the same each time"


def test_parts_are_learned_and_drawn(bundle, folder, tmp_path):
    model = {"options": {**OPTIONS, "taps": [0, 1], "widths": [32, 32, 32, 32]}, "num_points": 64, "lr": 4e-3}
    data = PartData(str(bundle), batch_size=6, points=96)
    result = train_once("pointmamba_mini_parts", data, tmp_path / "run", max_epochs=12, model=model, trainer=CPU)
    assert result["miou"] > 0.7
    assert set(result["test"]) >= {"miou", "class_miou", "accuracy"}
    items = np.load(tmp_path / "run" / "test_items.npy")
    assert items.shape == (12,)
    assert items.mean() == pytest.approx(result["miou"], abs=1e-5)
    trained: Any = load_task(tmp_path / "run" / "last.ckpt")
    with pytest.raises(ValueError, match="is no class of this model; say which it is: --shape"):
        trained.predict_files(argparse.Namespace(data=folder / "rod", out=tmp_path, shape="cube", device="cpu"))
    np.save(tmp_path / "few.npy", np.eye(3))
    with pytest.raises(ValueError, match=r"few\.npy: 12 points are to be chosen from clouds of 3"):
        trained.predict_files(argparse.Namespace(data=tmp_path / "few.npy", out=tmp_path, shape="rod", device="cpu"))
    some = folder / "rod" / "0.npz"
    args = argparse.Namespace(data=some, out=tmp_path / "out", shape=None, device="cpu")
    trained.predict_files(args)
    lines = (tmp_path / "out" / "0.csv").read_text().splitlines()
    assert len(lines) == 97
    assert {line.rpartition(",")[2] for line in lines[1:]} <= {"low", "high"}
    assert (tmp_path / "out" / "0.png").stat().st_size > 5000
    with np.load(some) as file:
        np.save(tmp_path / "out" / "1.npy", file["points"] + FAR)
        np.savetxt(tmp_path / "out" / "1.xyz", file["points"])
        np.savetxt(tmp_path / "out" / "2.b.xyz", file["points"])
        trained.predict_files(
            argparse.Namespace(data=tmp_path / "out", out=tmp_path / "far", shape="rod", device="cpu")
        )
        assert {path.name for path in (tmp_path / "far").glob("*.csv")} == {"1.npy.csv", "1.xyz.csv", "2.b.csv"}
        table = np.loadtxt(tmp_path / "far" / "1.npy.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2))
        np.testing.assert_allclose(table, file["points"] + FAR, rtol=0, atol=1e-6)
    page = (tmp_path / "out" / "parts.html").read_text()
    assert "http" not in page
    assert "0.npz: rod" in page


PCM: dict[str, Any] = {
    "dim": 16, "dim_expansion": [1, 2], "depths": [1, 1], "pre_blocks": [1, 1], "neighbours": [4, 4],
    "reducers": [2, 2], "prompt_dim": 8, "prompts": 1, "d_state": 2,
}  # fmt: skip


def test_pcm_reads_normals_and_height(tmp_path):
    draw = np.random.default_rng(0)
    label = np.arange(32) % 2
    normals = np.where(label[:, None, None] == 0, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]).repeat(64, 1)
    arrays = {"points": draw.normal(size=(32, 64, 3)), "label": label, "normals": normals}
    path = tmp_path / "b.npz"
    np.savez(path, **arrays)
    data = PointData(str(path), points=64, features=["height", "normals"], batch_size=8, repeats=4)
    model = {"options": PCM, "num_points": 64, "lr": 1e-2, "scale": [0.8, 1.2], "warmup_epochs": 0}
    result = train_once("pcm_tiny", data, tmp_path / "run", max_epochs=3, model=model, trainer=CPU)
    assert result["accuracy"] == 1, "the classes differ in their normals alone"
    trained: Any = load_task(tmp_path / "run" / "last.ckpt")
    assert trained.net.in_chans == 7
    (points, _) = data.split("test")[0]
    told: list[Any] = []
    trained.eval().net.register_forward_pre_hook(lambda _, x, more: told.append((x[0], more)), with_kwargs=True)
    trained.read(trained.net, points[None])
    features = told[0][1]["features"][0]
    assert torch.equal(features[:, :6], points)
    torch.testing.assert_close(features[:, 6], points[:, 1] - points[:, 1].min())
    np.savez(tmp_path / "0.npz", points=arrays["points"][0], normals=normals[0])
    args = argparse.Namespace(
        data=tmp_path / "0.npz", out=tmp_path / "p.csv", batch_size=4, device="cpu", top=1, voxel=0.0
    )
    trained.predict_files(args)
    assert (tmp_path / "p.csv").read_text().splitlines()[1].split(",")[1] == "0"
    with pytest.raises(ValueError, match=r"features of .* but the model was trained with"):
        PointData(str(path)).scored(trained, "test", other=True)
    with pytest.raises(ValueError, match=r"pointmamba_mini reads coordinates alone; leave data.features=\['height'\]"):
        PointClassifier(features=["height"])
    with pytest.raises(ValueError, match="'colour' is unknown; choose of normals, height"):
        PointData(features=["colour"])  # type: ignore[list-item]
    np.savez(path, **{**arrays, "normals": normals[:, :3]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normals \(32, 3, 3\) must be \(32, 64, 3\)"):
        PointData(str(path)).setup()


@pytest.mark.parametrize("name", ["pcm_tiny_parts", "pcm_s3dis"])
def test_pcm_names_parts(name, bundle, tmp_path):
    options = {**PCM, "decoder_dims": [16, 16]} | ({"windows": [16, 8]} if name == "pcm_s3dis" else {})
    data = PartData(str(bundle), batch_size=6, points=96, features=["height"])
    settings = {"options": options, "num_points": 64, "lr": 5e-3, "warmup_epochs": 1}
    result = train_once(name, data, tmp_path / "run", max_epochs=4, model=settings, trainer=CPU)
    assert result["miou"] > 0.45
    assert load_task(tmp_path / "run" / "last.ckpt").net.in_chans == 4
    alone = PartSegmenter(name, options=options)
    assert alone.label(torch.randn(2, 64, 3), torch.tensor([0, 1])).shape == (2, 64)


@pytest.mark.skipif(importlib.util.find_spec("open3d") is None, reason="Open3D is not installed")
def test_normals_are_estimated_where_files_have_none(bundle):
    points, *_ = PointData(str(bundle), points=64, features=["normals"]).split("train")[0]
    torch.testing.assert_close(points[:, 3:].norm(dim=-1), torch.ones(64))


def test_a_page_cannot_be_broken_by_names(tmp_path):
    points = np.zeros((3, 3))
    write_viewer([("</script><b>", points, np.array([0, 1, 0]), ["a", "</script>"])], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("</script>") == 1


def test_pretraining_then_fine_tuning(bundle, tmp_path):
    auto = UnlabelledData(str(bundle), batch_size=12, points=96)
    model: dict[str, Any] = {"options": {**OPTIONS, "decoder_depth": 1}, "num_points": 64, "warmup_epochs": 1}
    result = train_once("pointmamba_mini_pretraining", auto, tmp_path / "pre", max_epochs=4, model=model, trainer=CPU)
    curve = [row["val/chamfer"] for row in result["curve"]]
    assert curve[-1] < curve[0]
    tuned = PointClassifier(
        "pointmamba_mini", num_classes=2, options=OPTIONS, init_encoder=str(tmp_path / "pre" / "last.ckpt")
    )
    source: Any = load_task(tmp_path / "pre" / "last.ckpt")
    assert isinstance(source, PointPretrainer)
    assert torch.equal(tuned.net.norm.weight, source.net.encoder.norm.weight)  # type: ignore[union-attr]
    settings = {**model, "options": OPTIONS, "init_encoder": str(tmp_path / "pre" / "last.ckpt")}
    train_once("pointmamba_mini", PointData(str(bundle), points=96), tmp_path / "tuned", max_epochs=1, model=settings,
               trainer=CPU)  # fmt: skip
    (tmp_path / "pre" / "last.ckpt").unlink()
    assert load_task(tmp_path / "tuned" / "last.ckpt").name == "pointmamba_mini", "a run stands on its own"
    with pytest.raises(ValueError, match="goes with models of the PointMamba family"):
        PointClassifier("dgcnn", num_classes=2, init_encoder="x")


@pytest.mark.parametrize(("name", "parts"), [("dgcnn", False), ("pointnet2", False), ("dgcnn", True)])
def test_baselines(name, parts):
    pytest.importorskip("torch_geometric", reason="the baselines are PyG's layers")
    options = {"centres": [16, 8], "neighbours": 8} if name == "pointnet2" else {"widths": [8, 16], "neighbours": 6}
    x = torch.randn(4, 40, 3)
    if parts:
        net: Any = PartSegmenter(name, options=options, part_names=[["a"], ["b", "c"]]).net
        out = net(x, torch.tensor([0, 1, 0, 1]))
        assert out.shape == (4, 40, 3)
    else:
        net = PointClassifier(name, num_classes=3, options=options).net
        out = net(x)
        assert out.shape == (4, 3)
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    with torch.no_grad():
        shape = (torch.tensor([0, 1, 0, 1]),) if parts else ()
        together = net(x, *shape)
        torch.testing.assert_close(net(x[:1], *(s[:1] for s in shape)), together[:1], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="reads points in no order"):
        PointClassifier(name, scan="hilbert")


def test_wrong_settings_end_at_once():
    with pytest.raises(ValueError, match="is no model for parts of shapes"):
        PartSegmenter("mamba3d")
    with pytest.raises(ValueError, match="is no masked autoencoder"):
        PointPretrainer("pointmamba_mini")
    with pytest.raises(ValueError, match="num_points=0"):
        PointClassifier(num_points=0)
    with pytest.raises(FileNotFoundError, match="no folder nowhere; root is 'digits', 'solids'"):
        PointData("nowhere").setup()
    assert {"point-classification", "part-segmentation", "point-pretraining"} <= set(TASKS)


def test_orders_of_points_are_compared(bundle, tmp_path):
    found = compare.orders(
        "pointmamba_mini", str(bundle), ["join(hilbert, hilbert_trans)", "sort_z"], seeds=1, epochs=1, out=tmp_path,
        data_options={"points": 64}, model_options={"options": OPTIONS, "num_points": 64}, trainer_options=CPU,
        task="point-classification", progress=False,
    )  # fmt: skip
    assert [order.scan for order in found.orders] == ["join(hilbert, hilbert_trans)", "sort_z", "random", "none"]
    rows = (tmp_path / "results.csv").read_text()
    assert "sort_z" in rows
    assert (tmp_path / "report.html").exists()


@pytest.mark.skipif(not PSB.exists(), reason=f"no Labeled PSB at {PSB}")
def test_the_labeled_psb():
    data = PartData(str(PSB / "labeled_psb_2048.npz"), val_fraction=0.0)
    assert (len(data.split("train")), len(data.split("test")), len(data.classes)) == (228, 152, 19)
    _, label, part = data.split("test")[7]
    first = sum(map(len, data.part_names[:label]))
    assert part.min() >= first
    assert part.max() < first + len(data.part_names[label])

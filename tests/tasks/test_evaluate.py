"""`mamba-zoo test`: which items are scored, by whose scales, and where the scores are kept."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mamba_zoo
from mamba_zoo.__main__ import main
from mamba_zoo.tasks import ImageData, train_once
from mamba_zoo.tasks._data import Split
from mamba_zoo.tasks.audio_data import AudioData
from mamba_zoo.tasks.checkpoints import read_checkpoint
from mamba_zoo.tasks.detection_data import DetectionData
from mamba_zoo.tasks.graph_data import TargetData
from mamba_zoo.tasks.graph_edges import EdgeData
from mamba_zoo.tasks.graph_targets import EdgeTargetData
from mamba_zoo.tasks.labelled_series import LabelledSeries
from mamba_zoo.tasks.point_data import PointData
from mamba_zoo.tasks.registry import load_task
from mamba_zoo.tasks.segmentation_data import SegmentationData
from mamba_zoo.tasks.series_data import SeriesData
from mamba_zoo.tasks.series_windows import WatchedData
from mamba_zoo.tasks.sound_files import write_sound
from mamba_zoo.tasks.video_data import VideoData

CPU: dict[str, Any] = {"accelerator": "cpu"}
MINI = {"dim": 8, "depth": 1}


def scores_of(run: Path, *flags: str) -> dict[str, Any]:
    """The scores that `mamba-zoo test` keeps."""
    before = {path: path.stat().st_mtime_ns for path in run.glob("test*.json")}
    assert main(["test", "--checkpoint", str(run), "--device", "cpu", *flags]) == 0
    written = [path for path in run.glob("test*.json") if path.stat().st_mtime_ns != before.get(path)]
    assert len(written) == 1
    return {**json.loads(written[0].read_text()), "file": written[0].name}


def flat(table: str) -> str:
    """What a table on the terminal says, without its lines."""
    return " ".join(table.replace("│", " ").split())


def write_waves(path: Path, rows: int = 300, spikes: tuple[int, ...] = (), gain: float = 1.0) -> Path:
    """Two noisy waves, the second far from zero; if there are spikes, a column says so."""
    t, draw = np.arange(rows), np.random.default_rng(0)
    values = np.stack([np.sin(t / 4), 50 + 9 * np.cos(t / 4)], axis=1) + 0.05 * draw.standard_normal((rows, 2))
    values[list(spikes)] += 40
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", *(["label"] if spikes else [])])
        writer.writerows(
            [*(gain * row).tolist(), *([int(i in spikes)] if spikes else [])] for i, row in enumerate(values)
        )
    return path


def write_pictures(folder: Path, count: int = 12, first: int = 0) -> Path:
    """Grey pictures of two classes."""
    for label, level in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            pixels = np.full((16, 16, 3), level, np.uint8) + np.uint8(i)
            Image.fromarray(pixels).save(folder / label / f"{i:03}.png")
    return folder


def train_pictures(root: Path, run: Path) -> Path:
    data = ImageData(str(root), image_size=16, batch_size=8)
    train_once("test_vit", data, run, max_epochs=1, trainer=CPU)
    return run


def test_an_anomaly_detector_is_scored_on_a_table_with_labels(tmp_path):
    data = WatchedData(str(write_waves(tmp_path / "normal.csv")), seq_len=24)
    train_once(
        "series_mamba", data, tmp_path / "run", max_epochs=2, model={"net": MINI, "lr": 0.01}, trainer=CPU,
        task="anomaly",
    )  # fmt: skip
    labelled = write_waves(tmp_path / "labelled.csv", 150, (40, 90))
    found = scores_of(tmp_path / "run", "--data", str(labelled))
    assert found["auroc"] > 0.95
    assert found["windows"] == 12  # of 24 rows, half a window apart, over all 150
    with (tmp_path / "run" / "test-labelled.csv-all" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == [int(i in (40, 90)) for i in range(150)]


def test_other_tables_are_scaled_as_the_training_rows(tmp_path, capsys):
    data = SeriesData(str(write_waves(tmp_path / "waves.csv")), 24, 6)
    run, other = tmp_path / "run", write_waves(tmp_path / "doubled.csv", 100, gain=2.0)
    train_once("s_mamba", data, run, max_epochs=1, model={"net": MINI}, trainer=CPU)
    named = SeriesData(str(other), 24, 6)
    items: Any = named.scored(load_task(run), "test", other=True)
    assert len(items) == 100 - 30 + 1
    x = items[3][0].numpy()
    with other.open() as file:
        values = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    np.testing.assert_allclose(x, (values[3:27] - data.mean) / data.deviation, rtol=1e-4, atol=1e-4)
    assert scores_of(run, "--data", str(other))["windows"] == 71
    own = scores_of(run, "--data", str(tmp_path / "waves.csv"))
    assert (own["file"], own["windows"]) == ("test.json", len(data.split("test")))  # the rows it was not trained on
    lines = other.read_text().splitlines()
    other.write_text("\n".join(["a,c", *lines[1:]]))
    assert main(["test", "--checkpoint", str(run), "--data", str(other)]) == 2
    assert "columns of" in capsys.readouterr().err
    other.write_text("\n".join(lines[:20]))
    assert main(["test", "--checkpoint", str(run), "--data", str(other)]) == 2
    assert "has 19 rows, too few for a window of 30 steps" in capsys.readouterr().err


def write_slopes(folder: Path, gain: float, steps: int) -> Path:
    folder.mkdir()
    for part, count in (("TRAIN", 20), ("TEST", 10)):
        lines = ["@problemName Slopes", "@classLabel true down up", "@data"]
        for i in range(count):
            values = (1 if i % 2 else -1) * gain * np.arange(steps) + i % 3
            lines.append(",".join(f"{v:.4f}" for v in values) + f":{'up' if i % 2 else 'down'}")
        (folder / f"Slopes_{part}.ts").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(("name", "longer"), [("series_mamba", True), ("series_linear", False)])
def test_other_labelled_series_are_scaled_as_the_training_series(tmp_path, name, longer, capsys):
    run, data = tmp_path / "run", LabelledSeries(str(write_slopes(tmp_path / "slopes", 0.1, 12)), batch_size=8)
    net = MINI if name == "series_mamba" else {}
    train_once(name, data, run, max_epochs=1, model={"net": net}, trainer=CPU)
    other = write_slopes(tmp_path / "steeper", 0.3, 9)
    x = LabelledSeries(str(other)).scored(load_task(run), "test", other=True)[1][0].numpy()
    assert x.shape == (12, 1)
    np.testing.assert_allclose(x[:9, 0], (0.3 * np.arange(9) + 1 - data.mean[0]) / data.deviation[0], atol=1e-3)
    assert scores_of(run, "--data", str(other))["series"] == 10
    flags = ["--checkpoint", str(run), "--device", "cpu", "--data", str(write_slopes(tmp_path / "long", 0.1, 15))]
    assert main(["test", *flags]) == (0 if longer else 2)
    assert longer or "has a series of 15 steps, but the model was trained on 12" in capsys.readouterr().err


def write_paths(folder: Path, graphs: int, split: bool = False) -> Path:
    """Paths of three to six nodes, whose target is their length."""
    folder.mkdir()
    nodes, edges, targets = ["graph,one"], ["graph,source,target"], ["label,split" if split else "label"]
    for g in range(graphs):
        n = 3 + g % 4
        nodes += [f"{g},1"] * n
        edges += [f"{g},{a},{b}" for v in range(n - 1) for a, b in ((v, v + 1), (v + 1, v))]
        targets.append(f"{n + 0.5 * graphs}" + (f",{('train', 'val', 'test')[g % 3]}" if split else ""))
    for name, lines in (("nodes", nodes), ("edges", edges), ("graphs", targets)):
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return folder


def test_other_graphs_have_targets_of_other_means(tmp_path):
    data, run = TargetData(str(write_paths(tmp_path / "many", 24)), batch_size=8), tmp_path / "run"
    train_once("gin", data, run, max_epochs=1, model={"options": {"dim": 8}}, trainer=CPU, task="graph-regression")
    found = scores_of(run, "--data", str(write_paths(tmp_path / "few", 2)))
    assert (found["graphs"], found["split"]) == (2, "all")
    parts = str(write_paths(tmp_path / "parts", 9, split=True))
    found = scores_of(run, "--data", parts)
    assert (found["graphs"], found["split"], found["file"]) == (3, "test", "test-parts-test.json")


def test_other_recordings_keep_the_front_end_of_the_model(tmp_path):
    write_sounds(tmp_path / "few", range(1))
    data = AudioData(str(tmp_path / "few"), sample_rate=8000, seconds=0.1)
    told = {"num_classes": 2, "class_names": ["high", "low"]}
    trained = {**data.spectrogram, "mean": -3.0, "std": 7.0}
    items: Any = data.scored(SimpleNamespace(hparams={**told, "front_end": trained}), "test", other=True)
    assert (len(items), data.front_end) == (2, trained)
    other = AudioData(str(tmp_path / "few"), sample_rate=4000, seconds=0.1)
    with pytest.raises(ValueError, match=r"front_end of .* but the model was trained with"):
        other.scored(SimpleNamespace(hparams={**told, "front_end": trained}), "test", other=True)


@pytest.mark.parametrize(("make", "task"), [(EdgeData, "edge-classification"), (EdgeTargetData, "edge-regression")])
def test_runs_of_earlier_versions_are_scored(tmp_path, make, task):
    model = {"options": {"dim": 8, "depth": 1}}
    train_once("graph_mamba", make(steps_per_epoch=1), tmp_path, max_epochs=1, model=model, trainer=CPU, task=task)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    saved["datamodule_hyper_parameters"]["batch_size"] = 32  # of the parent's constructor
    torch.save(saved, tmp_path / "best.ckpt")
    assert scores_of(tmp_path)["split"] == "test"


def test_scores_say_what_was_scored_and_are_not_overwritten(tmp_path, capsys):
    root, run = write_pictures(tmp_path / "photos"), tmp_path / "run"
    train_pictures(root, run)
    own = scores_of(run)
    assert (own["data"], own["split"], own["checkpoint"]) == (str(root), "test", str(run))
    pictures = (run / "confusion.png").read_bytes()
    other = scores_of(run, "--data", str(write_pictures(tmp_path / "new photos", 3)))
    assert (other["images"], other["split"], other["file"]) == (6, "all", "test-new_photos-all.json")
    assert (run / "test-new_photos-all" / "confusion.png").stat().st_size > 100
    assert scores_of(run, "--split", "val")["file"] == "test-photos-val.json"
    assert json.loads((run / "test.json").read_text())["images"] == own["images"]
    assert (run / "confusion.png").read_bytes() == pictures
    flags = ["--checkpoint", str(run), "--data", str(tmp_path / "new photos"), "--split", "val"]
    assert main(["test", *flags]) == 2
    assert "--split val has no effect" in capsys.readouterr().err


def test_files_added_to_class_folders_do_not_move_those_of_a_run(tmp_path, capsys):
    root, run = write_pictures(tmp_path / "photos"), tmp_path / "run"
    names: tuple[Split, ...] = ("train", "val", "test")
    data = ImageData(str(root), image_size=16, batch_size=8)
    parts = {name: data.split(name).items for name in names}
    train_once("test_vit", data, run, max_epochs=1, trainer=CPU)
    write_pictures(root, 3, first=12)
    again = ImageData(str(root), image_size=16, batch_size=8)
    assert {name: again.split(name).items for name in names} != parts  # drawn anew
    again = ImageData(str(root), image_size=16, batch_size=8)
    again.restore(read_checkpoint(run))
    assert {name: again.split(name).items for name in names} == parts
    assert scores_of(run)["images"] == len(parts["test"])
    assert "6 files added since the run was split, the first is dark/012.png: left out" in flat(capsys.readouterr().out)
    (root / "dark" / "003.png").unlink()
    assert main(["test", "--checkpoint", str(run), "--device", "cpu"]) == 2
    assert "1 of the 24 files that this run was split from are not in" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_parts(tmp_path, capsys):
    root, run = write_pictures(tmp_path / "photos"), tmp_path / "run"
    flags = ["--data.root", str(root), "--data.image_size", "16", "--data.batch_size", "8"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.precision", "32"]
    assert main(["fit", "--model.name", "test_vit", "--out", str(run), "--data.num_workers", "0", *flags]) == 0
    kept = read_checkpoint(run / "last.ckpt")["ImageData"]
    assert sorted(map(len, kept["parts"].values())) == [4, 4, 16]
    write_pictures(root, 3, first=12)
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    shown = flat(capsys.readouterr().out)
    assert "16 train, 4 val, 4 test" in shown
    assert "6 files added since the run was split" in shown
    assert read_checkpoint(run / "last.ckpt")["ImageData"] == kept


def write_sounds(folder: Path, numbers: range) -> None:
    for label in ("low", "high"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            wave = np.sin(np.arange(800) * (0.1 if label == "low" else 0.5) + i)
            write_sound(folder / label / f"{i:03}.wav", torch.from_numpy(wave).float(), 8000)


def write_clips(folder: Path, numbers: range) -> None:
    for label in ("left", "right"):
        for i in numbers:
            (folder / label / f"{i:03}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / label / f"{i:03}" / "1.png")


def write_clouds(folder: Path, numbers: range) -> None:
    for label in ("ball", "box"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            np.save(folder / label / f"{i:03}.npy", np.random.default_rng(i).normal(size=(9, 3)))


def write_objects(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    names = [f"{i:03}.png" for i in range(numbers.stop)]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    content = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(reversed(names))],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4]} for i in range(len(names))],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def write_masks(folder: Path, numbers: range) -> None:
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            Image.new(mode, (8, 8)).save(folder / name / f"{i:03}.png")
    (folder / "classes.txt").write_text("background\nthing\n")


@pytest.mark.parametrize(
    ("write", "make", "per_number"),
    [
        (write_sounds, lambda root: AudioData(root, sample_rate=8000, seconds=0.1), 2),
        (write_clips, lambda root: VideoData(root, image_size=8), 2),
        (write_clouds, lambda root: PointData(root, points=8), 2),
        (write_objects, DetectionData, 1),
        (write_masks, lambda root: SegmentationData(root, image_size=8), 1),
    ],
    ids=["audio", "video", "points", "detection", "segmentation"],
)
def test_every_automatic_split_of_files_is_kept(tmp_path, write, make, per_number):
    root, names = tmp_path / "files", ("train", "val", "test")
    write(root, range(12))
    data = make(str(root))
    sizes = [len(data.split(name)) for name in names]
    kept = data.state_dict()
    assert [len(kept["parts"][name]) for name in names] == sizes
    assert len({file for part in kept["parts"].values() for file in part}) == sum(sizes) == 12 * per_number
    first = [str(data.split(name)[0][0]) for name in ("val", "test")]
    write(root, range(12, 16))
    anew = make(str(root))
    anew.setup()
    assert anew.state_dict() != kept
    again = make(str(root))
    again.load_state_dict(kept)
    assert [len(again.split(name)) for name in names] == sizes
    assert [str(again.split(name)[0][0]) for name in ("val", "test")] == first
    assert len(again.new_files) == 4 * per_number
    assert again.undivided()


def test_large_sets_keep_a_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_zoo.tasks._data._MOST_NAMES", 10)
    root = write_pictures(tmp_path / "photos")
    data = ImageData(str(root), image_size=16)
    data.setup()
    assert set(data.state_dict()) == {"digest"}
    again = ImageData(str(root), image_size=16)
    again.load_state_dict(data.state_dict())
    assert again.split("test").items == data.split("test").items
    write_pictures(root, 1, first=12)
    again = ImageData(str(root), image_size=16)
    again.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="are not those that this run was split from"):
        again.setup()


def test_validation_stands_for_a_test_that_is_not_there(tmp_path):
    root = tmp_path / "photos"
    for part, count in (("train", 8), ("val", 3)):
        write_pictures(root / part, count)
    data = ImageData(str(root), image_size=16)
    assert data.describe("images") == [("images", "16 train, 6 val, no test: test scores are those of val")]
    found = scores_of(train_pictures(root, tmp_path / "run"))
    assert (found["split"], found["images"], found["file"]) == ("val", 6, "test.json")


def test_a_run_says_what_it_started_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a long path would be cut off
    write_pictures(tmp_path / "photos")
    torch.save(mamba_zoo.create_model("vmamba_mini").state_dict(), tmp_path / "weights.pth")
    flags = ["--data.root", "photos", "--data.image_size", "16", "--model.name", "vmamba_mini"]
    flags += ["--trainer.max_epochs", "0", "--trainer.accelerator", "cpu", "--out", "run"]
    assert main(["fit", *flags, "--model.checkpoint_path", "weights.pth"]) == 0
    shown = flat(capsys.readouterr().out)
    assert re.search(r"started from \d+ weights from weights.pth; head.fc.weight, head.fc.bias left at init", shown)
    assert "next" not in shown  # nothing was saved that could be tested

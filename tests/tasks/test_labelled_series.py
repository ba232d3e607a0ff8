"""Classes of whole series: files of the UCR/UEA archive, how they are split and changed, and that they are learnt."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_zoo.tasks import evaluate, train_once
from mamba_zoo.tasks.labelled_series import LabelledSeries, split_classes
from mamba_zoo.tasks.series_files import read_ts

CPU: dict[str, Any] = {"accelerator": "cpu"}
TS = """# a comment
@problemName Toy
@timeStamps false
@missing true
@univariate false
@dimensions 2
@equalLength false
@classLabel true up down
@data
1,2,?:4,5,6:up
3,NaN:1,0:down
"""


def test_reads_ts_files_with_gaps_channels_and_several_lengths(tmp_path):
    path = tmp_path / "Toy_TRAIN.ts"
    path.write_text(TS)
    found = read_ts(path)
    assert (found.name, found.classes, found.labels, found.channels) == ("Toy", ["up", "down"], ["up", "down"], 2)
    assert [len(one) for one in found.series] == [3, 2]
    np.testing.assert_array_equal(found.series[0], [[1, 4], [2, 5], [np.nan, 6]])
    path.write_text(TS.replace("@classLabel true up down", "@classLabel false").replace(":up", "").replace(":down", ""))
    assert read_ts(path).labels == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("4,5,6:up", "4,5:up", "line 10: channels of"),
        ("4,5,6:up", "4,5,6:sideways", "'sideways' is none of up, down"),
        ("3,NaN:1,0:down", "3,4:down", "line 11: 1 channels, but the series before have 2"),
        ("4,5,6:up", "4,x,6:up", "line 10: could not convert"),
        ("@timeStamps false", "@timeStamps true", "time of every value"),
        ("@data\n", "", "expected a header line"),
        ("@classLabel true up down", "@targetLabel true", "a number for each series"),
    ],
)
def test_says_which_line_of_a_ts_file_is_wrong(tmp_path, old, new, message):
    path = tmp_path / "Toy.ts"
    path.write_text(TS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_ts(path)


def write_ts(folder: Path) -> Path:
    """Rising and falling series of 8 to 20 steps."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("TRAIN", 40), ("TEST", 30)):
        lines = ["@problemName Slopes", "@classLabel true down up", "@data"]
        for i in range(count):
            steps = np.arange(rng.integers(8, 21 if part == "TRAIN" else 25))
            values = (1 if i % 2 else -1) * 0.1 * steps + 0.2 * rng.standard_normal(len(steps))
            lines.append(",".join(f"{v:.4f}" for v in values) + f":{'up' if i % 2 else 'down'}")
        (folder / f"Slopes_{part}.ts").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ["series_mamba", "series_linear"])
def test_a_classifier_learns_and_names_new_series(tmp_path, name):
    folder = write_ts(tmp_path / "slopes")
    data = LabelledSeries(str(folder), noise=0.05, scaling=0.05, crop=0.9, batch_size=8)
    assert (data.classes, data.in_chans) == (["down", "up"], 1)
    net = {"dim": 8, "depth": 1} if name == "series_mamba" else {}
    result = train_once(name, data, tmp_path / "run", max_epochs=8, model={"lr": 0.02, "net": net}, trainer=CPU)
    assert result["accuracy"] >= 0.9
    device = ["--device", "cpu"]
    assert evaluate.test_main(["--checkpoint", str(tmp_path / "run"), *device]) == 0
    assert (tmp_path / "run" / "confusion.png").exists()
    file = folder / "Slopes_TEST.ts"
    given = ["--checkpoint", str(tmp_path / "run"), "--data", str(file), "--out", str(tmp_path / "classes.csv")]
    assert evaluate.predict_main([*given, *device]) == 0
    with (tmp_path / "classes.csv").open(newline="") as rows:
        named = list(csv.DictReader(rows))
    assert [row["series"] for row in named] == [str(i) for i in range(30)]
    found = [row["predicted"] for row in named]
    assert np.mean([a == b for a, b in zip(found, read_ts(file).labels, strict=True)]) >= 0.85


def test_a_channel_that_is_constant_in_training_is_not_divided_by_rounding_noise(tmp_path):
    for part, value in {"TRAIN": 0.1, "TEST": 0.3}.items():
        lines = [f"{','.join(str(i % 5) for i in range(99))}:{','.join([str(value)] * 99)}:{k % 2}" for k in range(9)]
        (tmp_path / f"Flag_{part}.ts").write_text("\n".join(["@classLabel true 0 1", "@data", *lines]))
    data = LabelledSeries(str(tmp_path))
    assert data.deviation[1] == 1
    assert float(data.split("test").values[..., 1].max()) == pytest.approx(0.2, abs=1e-4)


def test_series_are_padded_augmented_and_split_class_by_class(tmp_path):
    data = LabelledSeries(str(write_ts(tmp_path / "slopes")), val_fraction=0.2)
    x, _, lengths = data.split("test").__getitems__(range(30))
    assert x.shape == (30, 24, 1)
    for one, length in zip(x, lengths, strict=True):
        assert not one[length:].any()
    val = data.split("val")
    assert torch.bincount(val.targets).tolist() == [4, 4]
    kept, apart = split_classes(torch.tensor([0, 0, 1, 1, 1]), 0.0, 0)
    assert torch.equal(kept, apart)
    changed = LabelledSeries(str(tmp_path / "slopes"), noise=1.0, crop=0.5)
    one, _, cut = changed.split("train").__getitems__([0] * 50)
    assert one.std(0).max() > 0.5
    assert cut.min() < cut.max() <= changed.split("train").lengths[0]
    assert not one[torch.arange(one.shape[1])[None] >= cut[:, None]].any()

"""Clips: how they are read, that a VideoMamba learns motion from them, and what wrong ones say."""

import csv
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_zoo.__main__ import main
from mamba_zoo.tasks import load_task, train_once
from mamba_zoo.tasks.clips import COUNTS, MOTIONS, ClipError, Moving, list_clips, read_clip, sampled, to_clip
from mamba_zoo.tasks.draw import draw_strip
from mamba_zoo.tasks.video import VideoClassifier
from mamba_zoo.tasks.video_data import VideoData


def write_clip(folder, clip: Moving) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(read_clip(clip, 8)):
        frame.save(folder / f"{i + 5}.png")  # 5 to 12: their order as texts is another


@pytest.fixture
def clips(tmp_path):
    """Seven clips of each of two motions, as folders of frames."""
    for number in range(28):
        clip = Moving("train", 0, number)
        if clip.motion in (0, 2):
            write_clip(tmp_path / "clips" / MOTIONS[clip.motion] / str(number), clip)
    return tmp_path / "clips"


def test_digits_move_where_their_class_says():
    step = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}
    for number in range(8):
        clip = Moving("test", 0, number)
        frames = to_clip(read_clip(clip, 8)).float().mean(1)
        light = (frames - frames.amin((1, 2), keepdim=True)).square()
        places = torch.arange(frames.shape[-1]).float()
        x = (light.sum(1) * places).sum(-1) / light.sum((1, 2))
        y = (light.sum(2) * places).sum(-1) / light.sum((1, 2))
        moved = torch.stack([x[-1] - x[0], y[-1] - y[0]])
        along = torch.tensor(step[MOTIONS[clip.motion]]).float()
        assert float(moved @ along) > 2 > float(moved.abs() @ along.flip(0).abs())


def test_frames_are_spread_over_the_clip():
    assert sampled(16, 8, train=False) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert sampled(3, 6, train=False) == [0, 0, 1, 1, 2, 2]
    for _ in range(20):
        assert all(2 * i <= frame < 2 * i + 2 for i, frame in enumerate(sampled(16, 8, train=True)))


def test_learns_motion(tmp_path, monkeypatch, device):
    for split, count in (("train", 512), ("val", 16), ("test", 80)):
        monkeypatch.setitem(COUNTS, split, count)
    result = train_once(
        "videomamba_mini_video",
        VideoData(batch_size=32),
        tmp_path,
        max_epochs=2,
        model={"lr": 3e-3, "warmup_epochs": 0.5},
        trainer={"accelerator": "gpu" if device.type == "cuda" else "cpu"},
    )
    assert result["accuracy"] > 0.5  # chance: 0.25
    assert [row["clips"] for row in result["curve"]] == [512] * 2
    model = load_task(tmp_path)
    assert isinstance(model, VideoClassifier)
    assert model.net.input_shape(24, 24) == (3, 8, 24, 24)  # type: ignore[operator]


def test_folders_of_frames_train_and_predict(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = VideoData(str(clips), "videomamba_mini_video", image_size=16, num_frames=3)
    assert data.classes == ["left", "right"]
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [10, 2, 2]
    x, _ = data.split("test")[0]
    assert x.shape == (3, 3, 16, 16)
    flags = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--data.batch_size", "4", "--out", "run"]
    assert main(["fit", "--config", "video_digits", "--data.root", str(clips), "--data.image_size", "16", *flags]) == 0
    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    assert main(["predict", "--checkpoint", "run", "--data", str(clips), "--device", "cpu"]) == 0
    assert "14 clips -> predictions" in capsys.readouterr().out
    with (tmp_path / "predictions" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert {row["predicted"] for row in rows} <= {"left", "right"}
    with Image.open(tmp_path / "predictions" / "left" / "2.png") as picture:
        assert picture.width > 5 * picture.height


def test_a_strip_shows_every_frame_in_order():
    frames = [Image.new("RGB", (24, 24), (40 * i, 0, 0)) for i in range(4)]
    strip = np.asarray(draw_strip(frames, "left"))
    assert [int(strip[80, 48 + 98 * i, 0]) for i in range(4)] == [0, 40, 80, 120]


def test_video_files_are_decoded_where_torchcodec_is(tmp_path, monkeypatch):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"film")

    class Decoder:
        def __init__(self, path: str) -> None:
            if path.endswith("b.mp4"):
                raise RuntimeError("moov atom\nnot found")

        def __len__(self) -> int:
            return 10

        def get_frames_at(self, indices):
            frames = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 6)
            return types.SimpleNamespace(data=frames)

    module = types.ModuleType("torchcodec.decoders")
    vars(module)["VideoDecoder"] = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    assert to_clip(read_clip(file, 5))[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]
    with pytest.raises(ClipError, match=r"cannot read the clip .*b\.mp4: moov atom not found"):
        read_clip(tmp_path / "b.mp4", 5)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchcodec and ffmpeg.*ffmpeg -i clip\.mp4"):
        read_clip(file, 5)


def test_clips_that_cannot_be_read_are_named(clips, tmp_path):
    first = next((clips / "left").iterdir())
    (first / "7.png").write_text("no picture")
    with pytest.raises(ClipError, match=r"cannot read the clip .*left.*7\.png"):
        read_clip(first, 8)
    Image.new("RGB", (5, 5)).save(first / "7.png")
    with pytest.raises(ClipError, match=r"frames of the clip .* differ in size"):
        read_clip(first, 8)
    for frame in first.iterdir():
        frame.unlink()
    with pytest.raises(ClipError, match="holds no frames"):
        read_clip(first, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no clip in .*empty"):
        list_clips(tmp_path / "empty")


def test_folders_that_cannot_be_trained_on(clips, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        VideoData("nowhere").setup()
    with pytest.raises(FileNotFoundError, match="holds frames where clips were expected"):
        VideoData(str(clips / "left")).setup()
    (clips / "up").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no clip in .*up"):
        VideoData(str(clips)).setup()
    write_clip(clips / "up" / "a", Moving("train", 0, 3))
    with pytest.raises(ValueError, match="has 1 clips, too few to split"):
        VideoData(str(clips)).setup()
    for split, names in (("train", ("left", "right")), ("val", ("left",))):
        for name in names:
            write_clip(tmp_path / "splits" / split / name / "a", Moving("train", 0, 0))
    with pytest.raises(ValueError, match=r"\(left\) are not those trained on \(left, right\)"):
        VideoData(str(tmp_path / "splits")).setup()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoClassifier("vmamba_mini"), "vmamba_mini takes no clips; choose a video model"),
        (lambda: VideoClassifier(img_size=4), "cannot take images of 4x4|smaller than a patch"),
        (lambda: VideoData(num_frames=0), "num_frames=0"),
        (lambda: VideoData(hflip=2), "hflip=2"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("command", ["bench", "export"])
def test_clips_can_be_timed_and_exported(command, tmp_path, capsys):
    flags = [
        "--image-size",
        "16",
        *(["--seconds", "0.01", "--device", "cpu", "--no-train"] if command == "bench" else []),
    ]
    flags += ["--out", str(tmp_path / "clip.pt2")] if command == "export" else []
    assert main([command, "videomamba_mini_video", *flags]) == 0
    assert ("8x16x16" if command == "bench" else "(batch, 3, 8, 16, 16)") in capsys.readouterr().out

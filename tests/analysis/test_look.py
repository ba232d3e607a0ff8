"""`mamba-zoo look`, from its arguments to its pictures."""

from typing import Any

import pytest
import timm
import torch
from PIL import Image

from mamba_zoo.__main__ import main
from mamba_zoo.analysis import plot_receptive_fields
from mamba_zoo.analysis.look import query_of, read_images
from mamba_zoo.analysis.record import record_scans

SMALL = ["--model", "vmamba_mini", "--size", "8", "12", "--samples", "1"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p.png"
    Image.new("RGB", (20, 10), (255, 0, 51)).save(path)
    return str(path)


def test_writes_a_picture_for_each_scan(tmp_path, capsys, picture):
    assert (
        main(["look", *SMALL, "--scan", "cross", "first(hilbert, 1)", "--image", picture, "--out", str(tmp_path)]) == 0
    )
    names = {path.name for path in tmp_path.glob("*.png")} - {"p.png"}
    stems = ("cross", "first_hilbert__1")
    assert names == {"receptive_field.png"} | {f"{what}_{s}.png" for what in ("attention", "states") for s in stems}
    printed = capsys.readouterr().out
    assert "cross" in printed
    assert "receptive_field.png" in printed


@pytest.mark.parametrize("panels", [1, 2])
def test_titles_stay_within_their_pictures(panels):
    title = "Effective receptive field of local_vim_tiny_middle_cls_token, untrained: random weights; 4 images of noise"
    figure = plot_receptive_fields({str(i): torch.rand(4, 4) for i in range(panels)}, title=title)
    figure.canvas.draw()
    title_box, picture_box = figure.texts[0].get_window_extent(), figure.bbox
    assert picture_box.x0 <= title_box.x0 < title_box.x1 <= picture_box.x1


def test_uses_the_weights_it_is_given(tmp_path, capsys):
    model: Any = timm.create_model("vmamba_mini", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    arguments = [*SMALL, "--checkpoint", str(tmp_path / "w.pth"), "--out", str(tmp_path / "out")]
    assert main(["look", *arguments, "--num-classes", "3"]) == 0
    (tmp_path / "run").mkdir()  # of a run, the best weights
    (tmp_path / "w.pth").rename(tmp_path / "run" / "best.ckpt")
    arguments[arguments.index("--checkpoint") + 1] = str(tmp_path / "run")
    assert main(["look", *arguments, "--num-classes", "3"]) == 0
    assert main(["look", *arguments, "--num-classes", "3", "--scan", "raster"]) == 2
    assert "error:" in capsys.readouterr().err


def test_models_without_scans_have_a_receptive_field(tmp_path):
    assert main(["look", "--model", "test_convnext", "--size", "32", "32", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["receptive_field.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "6"], "--layer 6: the scans of this model are numbered 0 to 5"),
        (["--query", "class"], "--query class needs a class token"),
        (["--query", "2,0"], "--query '2,0' must be middle, class, or ROW,COLUMN between 0 and 1"),
        (["--query", "here"], "--query 'here' must be middle"),
        (["--checkpoint", "a", "b"], "--checkpoint needs one file, or one for each of the 1 scans"),
        (["--checkpoint", "a", "--pretrained"], "give either --checkpoint or --pretrained"),
        (["--image", __file__], "is no picture that Pillow can read"),
        (["--model", "vmamba_minni"], "did you mean 'vmamba_mini'"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, arguments, message):
    assert main(["look", *SMALL, *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_images_are_what_the_model_was_trained_on(picture):
    model: Any = timm.create_model("vmamba_mini")
    shown, x = read_images([picture, picture], model, (6, 4), 1)
    assert shown is not None
    assert x.shape == (2, 3, 6, 4)
    torch.testing.assert_close(shown[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    torch.testing.assert_close(x[1, :, 3, 2], (shown[:, 3, 2] - mean) / std)
    nothing, noise = read_images([], model, None, 2)
    assert nothing is None
    assert noise.shape == (2, 3, 32, 32)
    assert torch.equal(noise, read_images([], model, None, 2)[1])
    grey: Any = timm.create_model("vmamba_mini", in_chans=1, depths=(1,))
    assert read_images([picture], grey, None, 1)[1].shape == (1, 1, 32, 32)


def test_a_query_is_a_place_or_the_class_token():
    model: Any = timm.create_model("vim_mini", depth=1).eval()
    with torch.no_grad(), record_scans(model) as scans:
        model(torch.randn(1, 3, 8, 12))
    assert query_of(scans[0], "class") == (12, None)
    assert query_of(scans[0], "middle") == (16, (2, 3))
    assert query_of(scans[0], "0,1") == (5, (0, 5))

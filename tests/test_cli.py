"""The command line as a user meets it: help, one-line errors, and a run from training to predictions."""

import csv
import json
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_zoo.__main__ import COMMANDS, main, one_line

FAST = ["--model.name", "test_vit", "--data.image_size", "16", "--trainer.accelerator", "cpu"]


def run(*args: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-m", "mamba_zoo", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2


def test_list_and_info(capsys):
    assert main(["list", "vmamba_tiny*", "--modality", "image"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["model", "modality", "params", "GFLOPs", "top-1", "weights", "licence", "arXiv"]
    assert {"vmamba_tiny", "vmamba_tiny_v0"} <= {row.split()[0] for row in rows}
    assert main(["info", "vmamba_tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["license"] == "MIT"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "error: no command named 'fitt'; did you mean 'fit'?"),
        (["info", "vmamba_tinny"], "did you mean 'vmamba_tiny'"),
        (["list", "nothing_like_it"], "no model matches 'nothing_like_it'"),
        (["fit", "--data.root", "nowhere"], "no folder nowhere"),
        (["fit", "--model.nmae", "vmamba_mini"], "nmae"),
        (["fit", "--model.lr", "fast"], "model.lr"),
        (["fit", "--config", "nothing.yaml"], "no recipe nothing.yaml; give a YAML file, or one of "),
        (["fit", "--config", "digts"], "did you mean 'digits'?"),
        (["fit", "--resume"], "no run to resume"),
        (["fit", "--model.name", "vmamba_mino"], "did you mean 'vmamba_mini'"),
        (["fit", "--model.name", "test_vit"], "smaller than its patch of 16 pixels"),
        (["fit", "--model.name", "vmamba_mini", "--model.scan", "no_such_scan"], "no_such_scan"),
        (["fit", "--model.name", "pointmamba_mini"], "pointmamba_mini takes no images; choose an image model"),
        (["fit", *FAST, "--trainer.devices", "0"], "(--trainer.accelerator cpu, --trainer.devices 0)"),
        (["fit", *FAST, "--data.auto_augment", "nonsense"], "auto_augment='nonsense' is no policy of timm"),
        (["fit", *FAST, "--model.mixup", "-3"], "mixup=-3.0 must be at least 0"),
        (["fit", *FAST, "--model.drop_path_rate", "2"], "drop_path_rate=2.0 must lie in [0, 1)"),
        (["fit", *FAST, "--model.opt", "adamv"], "opt='adamv' is no optimizer of timm; did you mean 'adam'?"),
        (["bench", "vmamba_mini", "--device", "foo"], "--device foo cannot be used here"),
        (["bench", "vmamba_mini", "--device", "cuda:97"], "--device cuda:97 cannot be used here"),
        (["export", "pointmamba_mini"], "pointmamba_mini takes no images; choose an image model"),
        (["test", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["export"], "give the name of a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line(args, message, here, capsys):
    assert main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (here / "runs").exists()


def test_traceback_on_request():
    with pytest.raises(ValueError, match="no model named"):
        main(["info", "nothing", "--traceback"])


def test_error_of_a_data_worker_is_its_own_message():
    error = ValueError(
        "Caught BadImageError in DataLoader worker process 0.\nTraceback:\n  line\nx.BadImageError: bad a.jpg"
    )
    assert one_line(error) == "bad a.jpg"


def test_fit_interrupt_resume_test_predict(here, capsys):
    process = run("fit", *FAST, "--trainer.max_epochs", "40", "--out", "run")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch 1/40")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.strip().endswith("mamba-zoo fit --resume run")
    assert "Traceback" not in stderr
    done = len((here / "run" / "history.csv").read_text().splitlines()) - 1

    assert main(["fit", "--resume", "run", "--trainer.max_epochs", str(done + 2)]) == 0
    out = capsys.readouterr().out
    assert f"epoch {done + 1}/{done + 2}" in out
    assert "epoch 1/" not in out
    with (here / "run" / "history.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, done + 3))
    for name in ("best.ckpt", "last.ckpt", "config.yaml", "curves.png"):
        assert (here / "run" / name).stat().st_size > 100
    assert list((here / "run").glob("events.out.tfevents*"))
    assert main(["fit", "--out", "run"]) == 2
    assert "continue it with --resume run" in capsys.readouterr().err

    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    scores = json.loads((here / "run" / "test.json").read_text())
    assert scores["images"] == 347
    assert 0 <= scores["top1"] <= scores["top5"] <= 1
    with Image.open(here / "run" / "confusion.png") as picture:
        assert min(picture.size) > 300

    (here / "pictures" / "more").mkdir(parents=True)
    for i, where in enumerate(("a.png", "more/b.png")):
        pixels = np.full((9, 12), 40 * i, np.uint8)
        Image.fromarray(pixels).save(here / "pictures" / where)
    (here / "pictures" / "bad.png").write_text("no picture")
    predict = ["predict", "--checkpoint", "run/best.ckpt", "--data", "pictures", "--device", "cpu", "--top", "3"]
    assert main(predict) == 2
    assert "pictures/bad.png" in capsys.readouterr().err
    assert main([*predict, "--on-bad-image", "skip", "--out", "out.csv"]) == 0
    assert "1 unreadable" in capsys.readouterr().out
    (here / "results").mkdir()
    assert main([*predict, "--on-bad-image", "skip", "--out", "results"]) == 0
    assert (here / "results" / "predictions.csv").read_bytes() == (here / "out.csv").read_bytes()
    with (here / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["pictures/a.png", "pictures/more/b.png"]
    for row in rows:
        assert row["predicted"] in map(str, range(10))
        assert float(row["probability"]) >= float(row["probability_2"]) >= float(row["probability_3"])


def test_bench_and_export(here, capsys):
    small = ["--device", "cpu", "--seconds", "0.01", "--image-size", "16", "--json"]
    assert main(["bench", "vmamba_mini", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 1
    assert found["inference"]["images_per_second"] > 0
    assert found["training"]["milliseconds"] > 0
    assert main(["export", "vmamba_mini", "--image-size", "16", "--out", "model.pt2"]) == 0
    assert "largest relative difference" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch.export.load's own
        program = torch.export.load("model.pt2").module()
    assert program(torch.zeros(5, 3, 16, 16)).shape == (5, 1000)

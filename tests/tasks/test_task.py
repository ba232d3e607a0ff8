"""The contract of a task: one file and one line make `fit`, `test`, `predict`, `compare` and `train_once` work."""

import csv
import inspect
import json
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch

from mamba_zoo import compare, model_card
from mamba_zoo.__main__ import main
from mamba_zoo.scans import list_scans
from mamba_zoo.tasks import ImageClassifier, ImageData, load_task, train_once
from mamba_zoo.tasks.checkpoints import read_checkpoint
from mamba_zoo.tasks.recipes import CONFIGS, shipped
from mamba_zoo.tasks.registry import TASKS, TaskEntry, find_task, task_for, task_of

from . import toy_task
from .toy_task import LineData, SlopeReader

CPU = {"accelerator": "cpu"}


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The toy task, registered by one line."""
    module = toy_task.__name__
    entry = TaskEntry(f"{module}:SlopeReader", f"{module}:LineData", "read slopes", ((".*", "toy"),))
    monkeypatch.setitem(TASKS, "slopes", entry)
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("task: slopes\nseed_everything: 3\ntrainer:\n  max_epochs: 5\nmodel:\n  lr: 0.3\n")
    monkeypatch.setattr("mamba_zoo.tasks.recipes.CONFIGS", tmp_path)
    monkeypatch.chdir(tmp_path)
    return recipe


def test_every_registered_task_keeps_the_contract():
    known = shipped()
    for name, entry in TASKS.items():
        model, data = entry.model_class, entry.data_class
        assert task_of(model) == name
        assert find_task(task_for(data)).data_class is data
        assert model.monitor.startswith("val/")
        assert model.metric().name == model.score_name
        for _, recipe in entry.recipes:
            assert known[recipe].parent == CONFIGS
        modality = model_card(inspect.signature(model).parameters["name"].default).modality
        for order in model.orders:
            assert set(re.findall(r"\w+", order)) <= {*list_scans(modality=modality), "reverse"}, (name, order)
        missing = set(data.tells) - set(model.__init__.__code__.co_varnames)
        assert not missing, f"{name}: the data tell the model {missing}, which it does not take"


def test_the_backward_pass_runs_in_the_calling_thread(device):
    task = SlopeReader(points=8).to(device)
    seen: list[Any] = []
    weight = next(task.net.parameters())
    weight.register_hook(lambda _: seen.extend((threading.get_ident(), torch.autograd.is_multithreading_enabled())))
    task.backward(task.net(torch.randn(4, 8, device=device)).sum())
    assert seen == [threading.get_ident(), False]
    assert torch.autograd.is_multithreading_enabled()
    assert weight.grad is not None


@pytest.mark.parametrize("name", TASKS)
def test_stored_settings_rebuild_the_data(name):
    kind: Any = TASKS[name].data_class
    data = kind(batch_size=3) if "batch_size" in inspect.signature(kind).parameters else kind()
    again = kind(**data.hparams)
    assert dict(again.hparams) == dict(data.hparams)
    assert set(data.hparams) == set(inspect.signature(kind).parameters)


def test_trains_scores_and_stores_what_any_task_does(toy, tmp_path):
    data = LineData(points=6)
    result = train_once("linear", data, tmp_path / "run", max_epochs=6, model={"lr": 0.3}, trainer=CPU)
    assert result["mse"] == result["test"]["mse"] < 0.05
    assert result["lines_per_second"] == pytest.approx(6 * 64 / result["seconds"])
    assert [row["lines"] for row in result["curve"]] == [64] * 6
    assert np.load(tmp_path / "run" / "test_items.npy").mean() == pytest.approx(result["mse"], rel=1e-5)
    assert not (tmp_path / "run" / "test_predictions.npz").exists()
    model = load_task(tmp_path / "run")
    assert isinstance(model, SlopeReader)
    assert model.hparams["points"] == 6
    with pytest.raises(ValueError, match=r"holds a model for slopes, not for image-classification.*load_task"):
        ImageClassifier.from_checkpoint(tmp_path / "run")


def test_the_best_epoch_of_an_error_is_the_smallest(toy, tmp_path):
    # The rate is far too high at first: the error is smallest at the end.
    train_once("linear", LineData(), tmp_path, max_epochs=5, model={"lr": 0.5}, trainer=CPU)
    with (tmp_path / "history.csv").open() as file:
        errors = [float(row["val/mse"]) for row in csv.DictReader(file)]
    best = read_checkpoint(tmp_path / "best.ckpt")["global_step"] // 4  # steps an epoch
    assert errors[best - 1] == min(errors) != max(errors)


def test_command_line_fits_resumes_tests_and_predicts(toy, tmp_path, capsys):
    flags = ["--trainer.accelerator", "cpu"]
    assert main(["fit", "--task", "slopes", "--out", "run", *flags]) == 0
    shown = capsys.readouterr().out
    assert "epoch 5/5" in shown
    assert "64 train, 16 val, 24 test" in shown
    assert "on the validation lines" in shown
    assert "task: slopes" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["fit", "--resume", "run", "--trainer.max_epochs", "7"]) == 0
    assert "epoch 6/7" in capsys.readouterr().out
    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    scores = json.loads((tmp_path / "run" / "test.json").read_text())
    assert scores["lines"] == 24
    assert scores["mse"] < 0.05
    np.savetxt("line.txt", 0.5 * np.linspace(-1, 1, 8))
    predict = ["predict", "--checkpoint", "run", "--data", "line.txt"]
    assert main([*predict, "--digits", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("slope 0.")
    with pytest.raises(SystemExit):
        main([*predict, "--help"])
    assert "--digits" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.*could not find the monitored key:UserWarning")
def test_a_run_that_ends_before_it_is_scored(toy, tmp_path, capsys):
    limits = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--task", "slopes", "--out", "short", *limits]) == 0
    shown = capsys.readouterr().out
    files = [path.name for path in (tmp_path / "short").iterdir()]
    assert "curves.png" in files
    assert all((name in shown) == (name in files) for name in ("best.ckpt", "last.ckpt", "curves.png"))


def test_a_recipe_names_its_task(toy, capsys):
    assert main(["fit", "--config", "toy", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]) == 0
    assert "val/mse" in capsys.readouterr().out
    assert main(["fit", "--config", str(toy), "--task", "image-classification"]) == 2
    assert "toy.yaml says slopes; --task says image-classification" in capsys.readouterr().err
    toy.write_text("task: sloping\n")
    assert main(["fit", "--config", str(toy)]) == 2
    assert "no task named 'sloping'; did you mean 'slopes'?" in capsys.readouterr().err


def test_help_is_that_of_the_task(toy, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--task", "slopes", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in TASKS)
    assert "--data.points" in shown
    assert "--model.points" not in shown  # the data say so
    assert "--model.mixup" not in shown
    assert "Highest learning rate" in shown  # the help of `Task`, which the task only hands on to


def test_data_that_do_not_fit_the_model_are_refused(toy, tmp_path, capsys):
    train_once("linear", LineData(points=6), tmp_path / "run", max_epochs=1, trainer=CPU)
    other = LineData(points=7)
    with pytest.raises(ValueError, match="points of lines is 7, but the model was trained with 6"):
        other.scored(load_task(tmp_path / "run"), "test", other=True)
    assert main(["test", "--checkpoint", str(tmp_path / "run"), "--data", "nowhere"]) == 2
    assert "no lines at nowhere" in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        LineData(batch_size=0)


def test_compares_orders_by_the_score_of_the_task(toy, tmp_path):
    result = compare.orders(
        task="slopes", scans=("raster",), controls=("none",), seeds=2, epochs=2, out=tmp_path / "compare",
        model_options={"lr": 0.3}, trainer_options=CPU, progress=False,
    )  # fmt: skip
    assert result.metric == SlopeReader.metric()
    assert not result.metric.higher_is_better
    blind = result["none"]
    assert blind.seeds is not None
    assert blind.seeds.mean < -0.1  # a larger error is a worse order
    assert blind.items is not None
    assert blind.items.examples == 24
    assert all(run.train_rate and run.inference_rate for run in result.runs)
    assert "no one picture" in (tmp_path / "compare" / "report.html").read_text()


def test_data_of_no_task_are_refused():
    class Other(ImageData):
        pass

    assert task_for(Other) == "image-classification"
    with pytest.raises(ValueError, match="no task trains on LineData"):
        task_for(LineData)


def test_checkpoints_older_than_the_tasks_are_images(tmp_path):
    data = ImageData(image_size=16, batch_size=600)
    train_once("test_vit", data, tmp_path, max_epochs=1, trainer=CPU)
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert old.pop("task") == "image-classification"
    torch.save(old, tmp_path / "old.ckpt")
    assert isinstance(load_task(tmp_path / "old.ckpt"), ImageClassifier)

"""Tasks on series: tables, windows, forecasts, gaps, anomalies; each through its public way in."""

import argparse
import csv
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamba_zoo.__main__ import main
from mamba_zoo.tasks import evaluate, load_task, train_once
from mamba_zoo.tasks._gaps import interpolate, random_gaps, turn_gaps
from mamba_zoo.tasks.anomaly import AnomalyDetector
from mamba_zoo.tasks.forecasting import Forecaster
from mamba_zoo.tasks.labelled_series import read_parts
from mamba_zoo.tasks.series_data import SeriesData, fill_forward, split_rows
from mamba_zoo.tasks.series_files import find_table, read_table
from mamba_zoo.tasks.series_predict import spread_of
from mamba_zoo.tasks.series_windows import WatchedData, WindowData, laid_together, overlapping, side_by_side

ETTH1 = Path(os.environ.get("MAMBA_ZOO_DATA", "data")) / "timeseries" / "ett" / "ETT-small" / "ETTh1.csv"

CPU: dict[str, Any] = {"accelerator": "cpu"}


def write_table(path: Path, rows: int = 400, dates: bool = True, spikes: tuple[int, ...] = ()) -> Path:
    """Three series of period 24 with noise, hourly; spikes in all of them, and a column that says so."""
    t = np.arange(rows)
    rng = np.random.default_rng(0)
    values = np.stack(
        [np.sin(2 * np.pi * t / 24), np.cos(2 * np.pi * t / 24), 5 + 2 * np.sin(2 * np.pi * t / 12)], axis=1
    )
    values += 0.05 * rng.standard_normal(values.shape)
    for at in spikes:
        values[at] += 3
    start = np.datetime64("2020-01-01T00:00:00")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(["date"] if dates else []), "a", "b", "c", *(["label"] if spikes else [])])
        for i, row in enumerate(values):
            date = [str(start + np.timedelta64(i, "h")).replace("T", " ")] if dates else []
            writer.writerow([*date, *map(repr, row.tolist()), *([int(i in spikes)] if spikes else [])])
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "waves.csv")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def score(run: Path) -> None:
    assert evaluate.test_main(["--checkpoint", str(run), "--device", "cpu"]) == 0


def predict(run: Path, data: Path, out: Path, *flags: str) -> list[dict[str, str]]:
    """The rows that `mamba-zoo predict` writes."""
    given = ["--checkpoint", str(run), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert evaluate.predict_main([*given, *flags]) == 0
    return rows_of(out)


def test_splits_as_published():
    assert split_rows(17_420, "auto", "ETTh1.csv") == (8640, 2880, 2880)
    assert split_rows(69_680, "auto", "ETTm2.csv") == (34_560, 11_520, 11_520)
    assert split_rows(7588, "auto", "exchange_rate.csv") == (5311, 760, 1517)
    assert split_rows(100, "50/20/30", "x") == (50, 20, 30)
    assert split_rows(1000, "500/100/200", "x") == (500, 100, 200)
    for wrong in ("60/40", "a/b/c", "900/100/200", "0/50/50"):
        with pytest.raises(ValueError, match="split="):
            split_rows(1000, wrong, "x")


def test_windows_are_scaled_by_training_rows_and_none_is_left_out(table):
    data = SeriesData(str(table), 24, 12, batch_size=50)
    values = read_table(table).values
    train = values[:280]
    scaled = (values - train.mean(0)) / train.std(0)
    assert (data.in_chans, data.column_names, data.seasonal_steps) == (3, ["a", "b", "c"], 24)
    np.testing.assert_allclose(data.mean, train.mean(0))
    np.testing.assert_allclose(data.deviation, train.std(0))
    assert [len(data.split(part)) for part in ("train", "val", "test")] == [245, 29, 69]
    batches = list(data.test_dataloader())
    assert [len(batch[0]) for batch in batches] == [50, 19]
    x, y, marks, first = (torch.cat(part) for part in zip(*batches, strict=True))
    assert first.tolist() == list(range(320 - 24, 400 - 36 + 1))
    np.testing.assert_allclose(x[-1], scaled[364:388], atol=1e-5)
    np.testing.assert_allclose(y[-1], scaled[388:], atol=1e-5)
    assert marks.shape == (69, 24, 4)
    assert data.split("train")[3][0].shape == (24, 3)
    assert data.correlation.startswith("permuted((")


def test_a_column_that_is_constant_in_training_is_not_divided_by_rounding_noise(tmp_path):
    rows = [f"{i % 7 / 1e6 + 1000:.6f},0.1,{0.1 + 0.2 if i % 2 else 0.3!r},{'' if i < 9 else 5}" for i in range(420)]
    rows += [f"{i % 7 / 1e6 + 1000:.6f},7,0.3,5" for i in range(180)]
    (tmp_path / "t.csv").write_text("\n".join(["x,flag,added,late", *rows]))
    data = SeriesData(str(tmp_path / "t.csv"), 24, 6, missing="previous")
    assert data.deviation == [pytest.approx(2e-6, rel=1e-4), 1, 1, 1]
    assert float(data.split("test")[-1][1][:, 1:].abs().max()) == pytest.approx(6.9)


def test_missing_values_stop_or_are_read_as_the_one_before(tmp_path, table):
    rows = table.read_text().splitlines()
    rows[40] = ",".join([*rows[40].split(",")[:2], "", "nan"])
    path = tmp_path / "gaps.csv"
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match="lacks 2 of 1,200 values, the first in column 'b', row 41"):
        SeriesData(str(path), 24, 12).setup()
    data = SeriesData(str(path), 24, 12, missing="previous")
    x, y = data.split("train").__getitems__([20])[:2]
    assert not x.isnan().any()
    assert y.isnan().sum() == 0
    assert data.split("train").__getitems__([10])[1].isnan().sum() == 2
    path.write_text("\n".join(["x,late", *(f"{i % 5},{i if i > 300 else ''}" for i in range(400))]))
    with pytest.raises(ValueError, match="no value in column 'late' in its 280 training rows"):
        SeriesData(str(path), 24, 12, missing="previous").setup()
    assert fill_forward(torch.tensor([[torch.nan], [2.0], [torch.nan]])).flatten().tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 390}, "too few for windows of 390"),
        ({"columns": ["a", "z"]}, "no column 'z'"),
        ({"split": "1/2"}, "split="),
        ({"seq_len": 1}, "seq_len=1"),
    ],
)
def test_refuses_settings_that_cannot_work(table, options, message):
    with pytest.raises(ValueError, match=message):
        SeriesData(str(table), **{"pred_len": 12, **options}).setup()


def test_a_forecaster_beats_the_simple_forecasts_and_writes_what_it_found(table, tmp_path):
    data = SeriesData(str(table), 48, 12, batch_size=32)
    result = train_once(
        "dlinear", data, tmp_path / "run", max_epochs=8, model={"lr": 0.01, "schedule": "constant"}, trainer=CPU
    )
    test = result["test"]
    assert result["MSE"] == test["mse"] < 0.02 * test["repeat_mse"]
    assert test["mse"] < 1.2 * test["season_mse"] < 0.02 * test["repeat_mse"]
    model: Any = load_task(tmp_path / "run")
    with torch.no_grad():
        errors = torch.cat([(model.predictions(batch) - batch[1]).square() for batch in data.test_dataloader()])
    best = min(result["curve"], key=lambda row: row["val/mse"])
    if best["epoch"] == 8:
        assert float(errors.mean()) == pytest.approx(test["mse"], rel=1e-5)
    score(tmp_path / "run")
    by_step = rows_of(tmp_path / "run" / "horizon.csv")
    assert [float(row["model_mse"]) for row in by_step] == pytest.approx(errors.mean((0, 2)).tolist(), rel=1e-4)
    for picture in ("horizon.png", "forecasts.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 5000
    out = tmp_path / "forecast.csv"
    rows = predict(tmp_path / "run", table, out)
    assert len(rows) == 12
    assert rows[0]["date"] == "2020-01-17T16:00:00"
    truth = np.sin(2 * np.pi * np.arange(400, 412) / 24)
    assert np.abs(np.array([float(row["a"]) for row in rows]) - truth).mean() < 0.25
    assert out.with_suffix(".png").exists()
    rows = predict(tmp_path / "run", table, out, "--every", "100")
    assert len(rows) == 4 * 12
    values = read_table(table).values
    assert [float(row["c (truth)"]) for row in rows[:12]] == values[100:112, 2].tolist()
    assert rows[-1]["a (truth)"] == ""
    scaled = model.scaled(torch.from_numpy(values[52:100])).float()
    with torch.no_grad():
        found = model.predict_step((scaled[None], None, torch.zeros(1, 48, 0), None), 0)[0]
    written = np.array([[row[name] for name in "abc"] for row in rows[:12]]).astype(np.float32)
    np.testing.assert_allclose(written, found, rtol=5e-7, atol=1e-7)
    later = write_table(tmp_path / "later.csv", 700)
    rows = predict(tmp_path / "run", later, out, "--every", "1", "--interval", "0.8", "--calibrate", str(table))
    for name in "abc":
        inside = [
            float(row[f"{name} (low)"]) <= float(row[f"{name} (truth)"]) <= float(row[f"{name} (high)"])
            for row in rows
            if row[f"{name} (truth)"]
        ]
        assert 0.75 < np.mean(inside) < 0.85
    with pytest.raises(ValueError, match=r"holds 341 windows of 48 steps .* interval=0.999 needs at least 999"):
        spread_of(model, table, 0.999)
    with pytest.raises(ValueError, match="interval=90 must lie between 0 and 1"):
        spread_of(model, table, 90)


def test_columns_of_a_table_do_not_take_the_place_of_those_of_a_result(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["step,score", *(f"{i % 5},{i % 3}" for i in range(60))]))
    given = {"in_chans": 2, "seq_len": 24, "columns": ["step", "score"]}
    for model, wanted in [
        (Forecaster("series_linear", pred_len=2, **given), ["origin", "step", "step (table)", "score"]),
        (AnomalyDetector("series_linear", **given), ["step", "score", "threshold", "alarm"]),
    ]:
        parser = argparse.ArgumentParser()
        model.predict_arguments(parser)
        args = parser.parse_args([], argparse.Namespace(data=tmp_path / "t.csv", out=None, device="cpu", batch_size=4))
        args.out = tmp_path / "out.csv"
        model.predict_files(args)
        rows = rows_of(args.out)
        assert list(rows[0])[:4] == wanted
        assert rows[1]["step"] == ("2" if "origin" in wanted else "1")


def test_the_best_epoch_is_what_remains(table, tmp_path):
    data = SeriesData(str(table), 24, 6)
    settings = {"lr": 1.0, "schedule": "constant"}  # so high that the last epoch is not the best
    kept, last = (
        train_once(
            "series_linear", data, tmp_path / str(keep), max_epochs=8, model={**settings, "keep_best": keep},
            trainer=CPU,
        )
        for keep in (True, False)
    )  # fmt: skip
    scores = [row["val/mse"] for row in kept["curve"]]
    assert scores == [row["val/mse"] for row in last["curve"]]
    module: Any = load_task(tmp_path / "True")  # best.ckpt
    with torch.no_grad():
        errors = torch.cat([(module.predictions(batch) - batch[1]).square() for batch in data.test_dataloader()])
    assert kept["MSE"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert min(scores) < scores[-1]
    assert kept["MSE"] != last["MSE"]


def test_patience_ends_a_run_that_gets_no_better(table, tmp_path):
    settings = {"lr": 1e-30, "schedule": "constant", "patience": 2}
    data = SeriesData(str(table), 24, 6)
    result = train_once("series_linear", data, tmp_path, max_epochs=9, model=settings, trainer=CPU)
    assert 3 <= len(result["curve"]) < 9


def test_rates_follow_the_published_schedules(table, tmp_path):
    data = SeriesData(str(table), 24, 6, batch_size=128)
    # The rate of the epoch that follows each row.
    for schedule, factors in {"halving": [1, 0.5, 0.25, 0.125], "decay": [1, 1, 1, 0.9]}.items():
        settings = {"lr": 1e-3, "schedule": schedule}
        result = train_once("series_linear", data, tmp_path / schedule, max_epochs=4, model=settings, trainer=CPU)
        assert [row["lr"] for row in result["curve"]] == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("s_mamba", {"scan": "both_ways(correlation)", "net": {"dim": 8, "depth": 1}}),
        ("timemachine", {"net": {"n1": 8, "n2": 4, "d_state": 2}}),
        ("mambats", {"net": {"dim": 8, "depth": 1, "patch_size": 12}}),
        (
            "series_mamba",
            {"net": {"dim": 8, "depth": 1}, "weighting": "arctan", "mask_frequencies": 0.2, "spectral_loss": 0.9},
        ),
    ],
)
def test_every_model_trains_and_comes_back_from_its_checkpoint(table, tmp_path, name, options):
    data = SeriesData(str(table), 24, 6, batch_size=128)
    train_once(name, data, tmp_path, max_epochs=1, model=options, trainer=CPU)
    model: Any = load_task(tmp_path)
    assert model.name == name
    if name == "s_mamba":
        assert model.net.scan == f"both_ways({data.correlation})"
    if name == "mambats":
        assert model.net.count.sum() == 128 * 3  # one batch, three variates each
        assert sorted(model.net.visit.tolist()) == [0, 1, 2]
    batch = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        forecast = model.predict_step(batch, 0)
    assert forecast.shape == (75, 6, 3)
    assert forecast.isfinite().all()


def test_another_model_than_the_recipes_is_not_given_its_arguments(table, tmp_path):
    sizes = ["--data.seq_len=24", "--data.pred_len=6", "--data.batch_size=128", "--trainer.max_epochs=1"]
    flags = ["--task=forecasting", f"--data.root={table}", *sizes, "--trainer.accelerator=cpu"]
    assert main(["fit", *flags, "--model.name=dlinear", f"--out={tmp_path / 'linear'}"]) == 0
    net = ["--model.name=timemachine", "--model.net.n1=8", "--model.net.n2=4", "--model.net.d_state=2"]
    assert main(["fit", *flags, *net, f"--out={tmp_path / 'machine'}"]) == 0
    model: Any = load_task(tmp_path / "machine")
    assert model.net.lin1.out_features == 8


def test_unknown_models_and_settings_are_refused(table):
    with pytest.raises(ValueError, match="no model of series named 'vim_tiny'"):
        Forecaster("vim_tiny")
    with pytest.raises(ValueError, match="takes no argument 'widht'"):
        Forecaster("s_mamba", net={"widht": 3})
    with pytest.raises(ValueError, match="pred_len=0"):
        Forecaster("s_mamba", pred_len=0)
    with pytest.raises(ValueError, match="only mamba-zoo fit and compare know"):
        Forecaster("s_mamba", scan="correlation")
    with pytest.raises(ValueError, match="weighting='far' is unknown; choose even, root, arctan"):
        Forecaster("s_mamba", weighting="far")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask_frequencies=1 must be at least 0 and below 1"):
        Forecaster("s_mamba", mask_frequencies=1)
    for part in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"spectral_loss={part} must be from 0 to 1"):
            Forecaster("s_mamba", spectral_loss=part)


def test_the_loss_mixes_errors_of_steps_and_of_spectra(table, tmp_path):
    data = SeriesData(str(table), 24, 6, batch_size=512)
    over_time, spectral, mixed = (
        train_once(
            "series_linear", data, tmp_path / str(part), max_epochs=1, trainer=CPU,
            model={"loss": "mae", "weighting": "root", "spectral_loss": part},
        )["curve"][0]["train/loss"]
        for part in (0.0, 1.0, 0.9)
    )  # fmt: skip
    assert abs(over_time - spectral) > 0.01
    assert mixed == pytest.approx(0.1 * over_time + 0.9 * spectral, rel=1e-5)


def test_gaps_cover_what_they_should_and_lines_close_them():
    x = torch.randn(50, 60, 4)
    for length, together in [(1, False), (5, False), (3, True)]:
        hidden = random_gaps(x, 0.25, length, together)
        assert hidden.float().mean() == pytest.approx(0.25, abs=0.03)
        if together:
            assert torch.equal(hidden, hidden[..., :1].expand_as(hidden))
    generator = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(random_gaps(x, 0.3, 4, False, generator[0]), random_gaps(x, 0.3, 4, False, generator[1]))
    turns = turn_gaps(x, 3, 4)
    assert torch.equal(torch.stack(turns).sum(0), torch.ones(50, 60, 4, dtype=torch.int64))
    hidden = random_gaps(x, 0.5, 6, False)
    hidden[0, :, 0] = True
    closed = interpolate(x, hidden)
    steps = np.arange(60)
    for b in range(3):
        for v in range(4):
            known = ~hidden[b, :, v].numpy()
            want = np.interp(steps, steps[known], x[b, :, v].numpy()[known]) if known.any() else np.zeros(60)
            np.testing.assert_allclose(closed[b, :, v], want, atol=1e-5)


def test_windows_cover_every_row_and_the_one_around_it_is_heard():
    for cut in (side_by_side, overlapping):
        for rows, length in [(10, 5), (11, 5), (5, 5), (33, 8), (3, 2)]:
            starts = cut(rows, length)
            parts = torch.arange(rows).float()[starts[:, None] + torch.arange(length)]
            assert laid_together(rows, starts, parts).tolist() == list(range(rows))
    assert laid_together(4, torch.tensor([0]), torch.ones(1, 2)).isnan().tolist() == [False, False, True, True]
    # What windows say of their ends is heard at the ends of the table alone.
    starts = overlapping(32, 8)
    parts = torch.zeros(len(starts), 8)
    parts[:, [0, 1, 6, 7]] = 1.0
    assert laid_together(32, starts, parts).nonzero().flatten().tolist() == [0, 1, 30, 31]


def test_an_imputer_beats_straight_lines_and_fills_a_table(table, tmp_path):
    data = WindowData(str(table), 36, batch_size=16)
    result = train_once(
        "series_mamba", data, tmp_path / "run", max_epochs=10,
        model={"lr": 0.01, "gap_length": 6, "net": {"dim": 16, "depth": 2}}, trainer=CPU, task="imputation",
    )  # fmt: skip
    assert result["test"]["mse"] < 0.6 * result["test"]["line_mse"]
    values = read_table(table).values
    lines = [f"{line},{'ok' if i else 'note'}" for i, line in enumerate(table.read_text().splitlines())]
    whole = [line.split(",") for line in lines]
    for i in range(101, 107):
        lines[i] = ",".join([whole[i][0], "", *whole[i][2:]])
    gappy, out = tmp_path / "gappy.csv", tmp_path / "filled.csv"
    gappy.write_text("\n".join(lines))
    predict(tmp_path / "run", gappy, out)
    written = [line.split(",") for line in out.read_text().splitlines()]
    assert [row[2:] for row in written] == [row[2:] for row in whole]
    assert [row[:2] for row in [*written[:101], *written[107:]]] == [row[:2] for row in [*whole[:101], *whole[107:]]]
    filled = read_table(out, ["a", "b", "c"])
    found, truth = filled.values[100:106, 0], values[100:106, 0]
    assert np.abs(found - truth).max() < 0.5
    score(tmp_path / "run")
    assert (tmp_path / "run" / "gaps.png").stat().st_size > 5000


def test_anomalies_score_higher_than_the_rest(tmp_path):
    table = write_table(tmp_path / "spikes.csv", spikes=(330, 361, 390))
    data = WatchedData(str(table), 32, batch_size=16)
    assert data.column_names == ["a", "b", "c"]
    result = train_once(
        "series_mamba", data, tmp_path / "run", max_epochs=6, model={"lr": 0.01, "net": {"dim": 16, "depth": 2}},
        trainer=CPU, task="anomaly",
    )  # fmt: skip
    assert result["test"]["auroc"] > 0.95
    assert result["test"]["recall"] == 1.0
    model: Any = load_task(tmp_path / "run")
    assert 0 < float(model.threshold) < float(model.end_threshold)
    known = next(iter(data.val_dataloader()))
    model._scored.clear()
    model.validation_step((*known[:4], torch.ones_like(known[4])), 0)  # were all steps anomalies, none would count
    assert model._scored[0][0].isnan().all()
    limits = model.limits(400)
    assert np.flatnonzero(limits != limits[200]).tolist() == [0, 1, 2, 3, 396, 397, 398, 399]
    rows = predict(tmp_path / "run", table, tmp_path / "scores.csv")
    assert len(rows) == 400
    highest = sorted(range(400), key=lambda i: -float(rows[i]["score"]))[:3]
    assert set(highest) <= {i + d for i in (330, 361, 390) for d in (-1, 0, 1)}
    assert {int(rows[i]["alarm"]) for i in (330, 361, 390)} == {1}
    score(tmp_path / "run")
    assert len(rows_of(tmp_path / "run" / "scores.csv")) == 80
    assert (tmp_path / "run" / "scores.png").stat().st_size > 5000


def test_steps_are_found_from_both_sides():
    with pytest.raises(ValueError, match="gap_length=8 must be less than half of seq_len=16"):
        AnomalyDetector(seq_len=16, gap_length=8)


def test_labels_must_be_zero_or_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,anomaly\n" + "\n".join(f"{i},{i % 3}" for i in range(300)))
    with pytest.raises(ValueError, match="labels in column 'anomaly' must be 0 or 1"):
        WatchedData(str(path), 32).setup()


def test_bundled_data_need_nothing_else():
    assert find_table("eeg").values.shape == (800, 4)
    train, test = read_parts("digits")
    assert (len(train.series), len(test.series), train.channels) == (1450, 347, 8)


def test_data_of_sktime_are_read_as_they_come():
    if importlib.util.find_spec("sktime") is None:
        pytest.skip("sktime is not installed")
    train, test = read_parts("sktime:JapaneseVowels")
    assert (len(train.series), len(test.series), train.channels, len(train.classes)) == (270, 370, 12, 9)
    assert {len(one) for one in train.series} == {7, *range(9, 27)}
    train, test = read_parts("sktime:BasicMotions")
    assert (len(train.series), len(test.series), train.channels, train.series[0].shape) == (40, 40, 6, (100, 6))
    tables = {"Airline": (["Passengers"], 144), "Lynx": (["0"], None), "PBS_dataset": (["Scripts"], 204)}
    for name, (columns, dates) in tables.items():
        table = find_table(f"sktime:{name}")
        assert table.names == columns
        assert (None if table.dates is None else len(table.dates)) == dates
    with pytest.raises(ValueError, match="is no table of series; classify it"):
        find_table("sktime:GunPoint")


def test_data_of_sktime_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"mamba_zoo\[series\]"):
        find_table("sktime:Airline")


def test_orders_of_variates_are_compared_with_a_recipe(table, tmp_path, capsys):
    command = [
        "compare", "--config", "forecast", "--data", str(table), "--data.seq_len", "24", "--data.pred_len=6",
        "--data.batch_size", "64", "--model.net", "{dim: 8, depth: 1}", "--trainer.accelerator", "cpu",
        "--scans", "bidirectional,correlation", "--controls", "", "--seeds", "1", "--epochs", "1",
        "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(command) == 0
    assert (tmp_path / "report.html").exists()
    settings = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert (settings["model"], settings["task"], settings["epochs"]) == ("s_mamba", "forecasting", 1)
    assert settings["data"]["seq_len"] == 24
    assert settings["model_options"] == {
        "lr": 0.0003, "schedule": "halving", "patience": 3, "net": {"dim": 8, "depth": 1}
    }  # fmt: skip
    for wrong, message in (
        (["--data.seqlen", "24"], "did you mean --data.seq_len"),
        (["--model.net", "{dim"], "cannot be read"),
        (["--task", "anomaly"], "the recipe says forecasting"),
        (["--data.seq_len"], "--data.seq_len needs a value"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.skipif(not ETTH1.exists(), reason="no ETTh1.csv in $MAMBA_ZOO_DATA/timeseries/ett/ETT-small")
def test_etth1_is_split_and_scaled_as_published():
    data = SeriesData(str(ETTH1), 96, 96, batch_size=512)
    assert [len(data.split(part)) for part in ("train", "val", "test")] == [8449, 2785, 2785]
    squared = torch.cat([(x[:, -1:] - y).square() for x, y, *_ in data.test_dataloader()])
    assert float(squared.mean()) == pytest.approx(1.2944, abs=1e-3)  # published for the repeated last value: 1.295


def test_flags_of_predict():
    from mamba_zoo.tasks.forecasting import Forecaster

    parser = argparse.ArgumentParser()
    Forecaster.predict_arguments(parser)
    assert parser.parse_args(["--every", "5"]).every == 5

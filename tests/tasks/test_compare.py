"""The comparison of scan orders with a trainer whose truth is known, and once with a real one."""

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mamba_zoo import compare
from mamba_zoo.__main__ import main as cli
from mamba_zoo.tasks._compare_flags import take_settings
from mamba_zoo.tasks.compare import schedule, split_specs

SCANS = ("cross", "hilbert", "snake")


class Synthetic:
    """Trains nothing: scores with a known effect of each order, and a record of what was asked for."""

    def __init__(self, effects=None, noise=0.004, examples=500, fail_at=None, error=RuntimeError):
        self.effects, self.noise, self.examples = effects or {}, noise, examples
        self.fail_at, self.error, self.calls = fail_at, error, []

    def __call__(self, scan: str, seed: int, out: Path) -> dict:
        if self.fail_at == len(self.calls):
            raise self.error("the trainer broke")
        self.calls.append((scan, seed))
        name = scan.split("(")[0]
        draw = np.random.default_rng([seed, *map(ord, name)])
        share = 0.8 + self.effects.get(name, 0.0) + self.noise * draw.normal()
        difficulty = (np.random.default_rng(9).permutation(self.examples) + 0.5) / self.examples
        items = difficulty + 0.05 * draw.normal(size=self.examples) < share
        return {
            "accuracy": float(items.mean()),
            "items": items,
            "curve": [(1, 0.5), (2, 0.7), (3, share)],
            "parameters": 900 if name == "none" else 1000,
            "images_per_second": 100.0 + len(name),
            "inference_images_per_second": 500.0,
        }


def run(out, trainer, **options):
    options = {
        "scans": SCANS,
        "seeds": 3,
        "progress": False,
        "data": "synthetic",
        "grid": (4, 4),
        "report": False,
        **options,
    }
    return compare.orders(out=out, train=trainer, **options)


def test_an_effect_is_found_and_noise_is_called_noise(tmp_path):
    result = run(tmp_path, Synthetic({"hilbert": 0.08, "none": -0.3}), seeds=5)
    assert result.complete
    hilbert, snake, none = result["hilbert"], result["snake"], result["none"]
    assert hilbert.seeds is not None
    assert hilbert.seeds.mean == pytest.approx(0.08, abs=0.02)
    assert max(hilbert.seeds_p, hilbert.items_p, none.seeds_p, none.items_p) < 0.01
    assert snake.seeds_p > 0.05
    headline, *rest = result.verdict
    assert headline.startswith("hilbert is better than cross and none is worse than cross")
    assert any(s.startswith("snake and cross do not differ measurably") for s in rest)
    assert any("1,000" in note and "none 900" in note for note in result.notes)


def test_numbers_are_those_of_the_runs(tmp_path):
    trainer = Synthetic()
    result = run(tmp_path, trainer, controls=())
    by_hand = [trainer(scan, seed, tmp_path)["accuracy"] for scan in ("hilbert", "cross") for seed in range(3)]
    hilbert = result["hilbert"]
    assert hilbert.mean == pytest.approx(np.mean(by_hand[:3]))
    assert hilbert.std == pytest.approx(np.std(by_hand[:3], ddof=1))
    assert hilbert.seeds is not None
    assert hilbert.seeds.mean == pytest.approx(np.mean(by_hand[:3]) - np.mean(by_hand[3:]))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["accuracy"]) for r in rows if r["order"] == "hilbert"] == by_hand[:3]
    with (tmp_path / "summary.csv").open() as file:
        summary = {r["order"]: r for r in csv.DictReader(file)}
    assert float(summary["hilbert"]["difference"]) == pytest.approx(hilbert.seeds.mean)
    assert summary["cross"]["difference"] == ""


def test_errors_are_better_when_lower(tmp_path):
    def train(scan, seed, out):
        return {"mse": (0.5 + 0.01 * seed if scan == "hilbert" else 1.0) + 0.01 * (seed % 2)}

    metric = compare.Metric("mse", higher_is_better=False, percent=False)
    result = run(tmp_path, train, seeds=4, controls=(), metric=metric)
    hilbert = result["hilbert"]
    assert hilbert.seeds is not None
    assert hilbert.seeds.mean == pytest.approx(0.485)
    assert result.verdict[0].startswith("hilbert is better than cross")


def test_runs_are_interleaved_and_controls_follow_the_seed(tmp_path):
    trainer = Synthetic()
    run(tmp_path, trainer, seeds=[4, 7])
    assert [seed for _, seed in trainer.calls] == [4] * 5 + [7] * 5
    assert [scan for scan, seed in trainer.calls if seed == 4] == [*SCANS, "random(seed=4, k=4)", "none"]
    assert ("random(seed=7, k=4)", 7) in trainer.calls
    firsts = [schedule("abc", [0, 1, 2])[3 * i][0] for i in range(3)]
    assert firsts == ["a", "b", "c"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, error):
    first = Synthetic(fail_at=4, error=error)
    with pytest.raises(error, match="broke"):
        run(tmp_path, first, controls=(), report=True)
    partial = compare.load(tmp_path)
    assert len(partial.runs) == 4
    assert partial.verdict[0].startswith("Partial: 4 of 9 runs")
    assert (tmp_path / "report.html").exists()
    second = Synthetic()
    result = run(tmp_path, second, controls=())
    assert len(second.calls) == 5
    assert not set(first.calls) & set(second.calls)
    assert result.verdict == run(tmp_path.with_name("whole"), Synthetic(), controls=()).verdict
    third = Synthetic()
    run(tmp_path, third, controls=())
    assert third.calls == []


def test_orders_and_seeds_can_be_added(tmp_path):
    run(tmp_path, Synthetic(), seeds=2, controls=())
    more = Synthetic()
    result = run(tmp_path, more, scans=(*SCANS, "diagonal"), seeds=3, controls=())
    assert len(more.calls) == 3 + 3
    assert result.planned == len(result.runs) == 12


def test_changed_settings_never_mix(tmp_path):
    run(tmp_path, Synthetic(), epochs=5)
    trainer = Synthetic()
    with pytest.raises(ValueError, match=r"epochs was 5, now 6; model_options.lr was not set, now 0.1.*--out"):
        run(tmp_path, trainer, epochs=6, model_options={"lr": 0.1})
    assert trainer.calls == []


def test_a_run_smuggled_in_from_elsewhere_is_refused(tmp_path):
    run(tmp_path / "a", Synthetic(), epochs=5)
    run(tmp_path / "b", Synthetic(), epochs=6)
    record = Path("runs/hilbert/seed_1/run.json")
    (tmp_path / "b" / record).write_bytes((tmp_path / "a" / record).read_bytes())
    with pytest.raises(ValueError, match="made with other settings"):
        compare.load(tmp_path / "b")


def test_match_directions_repeats_them(tmp_path):
    trainer = Synthetic()
    result = run(tmp_path, trainer, scans=("raster", "bidirectional", "cross"), seeds=2, match_directions=True)
    assert {scan for scan, _ in trainer.calls} == {
        "join(raster, raster, raster, raster)", "join(bidirectional, bidirectional)", "cross", "none",
        "random(seed=0, k=4)", "random(seed=1, k=4)",
    }  # fmt: skip
    assert {o.cost("directions") for o in result.orders if o.scan != "none"} == {4}


def test_a_diverged_run_is_left_out_and_said(tmp_path):
    trainer = Synthetic()

    def train(scan, seed, out):
        found = trainer(scan, seed, out)
        return {**found, "accuracy": math.nan} if (scan, seed) == ("snake", 1) else found

    result = run(tmp_path, train, controls=())
    snake = result["snake"]
    assert snake.seeds is not None
    assert snake.seeds.blocks == 2
    assert math.isfinite(snake.mean)
    assert any("snake diverged with seed 1" in note for note in result.notes)


def test_one_seed_is_no_evidence(tmp_path):
    result = run(tmp_path, Synthetic({"hilbert": 0.1}), seeds=1)
    assert result.verdict[0].startswith("One seed for each order")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scans": ("cross", "hilbrt")}, "did you mean 'hilbert'"),
        ({"scans": ("cross",), "controls": ()}, "two orders or more"),
        ({"reference": "spiral"}, "not among the orders"),
        ({"controls": ("noise",)}, "'noise' is unknown"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": 0}, "at least one seed"),
    ],
    ids=str,
)
def test_wrong_arguments_end_before_any_run(tmp_path, options, message):
    trainer = Synthetic()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, trainer, **options)
    assert trainer.calls == []


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_with_everything(tmp_path):
    run(tmp_path, Synthetic({"hilbert": 0.08}), scans=(*SCANS, "window(2)"), seeds=5, report=True)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert "<script" not in text
    assert "url(" not in text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 20 for image in images)
    assert len(images) == 6 + 5  # the figures, and every order but "none"
    for scan in (*SCANS, "window(2)", "random", "none"):
        assert scan in page.text
    assert page.text.index("hilbert is better than cross") < page.text.index("Scores")
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe")]


def test_names_are_escaped_in_the_report(tmp_path):
    run(tmp_path, Synthetic(), data="<b>bold</b>", seeds=2, controls=(), report=True)
    assert "<b>bold" not in (tmp_path / "report.html").read_text()


def test_scan_specs_keep_their_commas():
    assert split_specs("cross, window(2),join(hilbert, snake)") == ["cross", "window(2)", "join(hilbert, snake)"]
    assert split_specs("") == []


def test_command_line_trains_for_real_and_reports(tmp_path, capsys):
    out = tmp_path / "real"
    settings = ["--scans", "cross", "--controls", "none", "--seeds", "1", "--epochs", "1"]
    arguments = ["compare", *settings, "--out", str(out)]
    assert cli([*arguments, "--batch-size", "256"]) == 0
    shown = capsys.readouterr().out
    assert "Results" in shown
    assert "One seed for each order" in shown
    record = json.loads((out / "runs" / "cross" / "seed_0" / "run.json").read_text())["run"]
    assert 0.1 < record["score"] < 1
    assert record["directions"] == 4
    assert record["inference_rate"] > 0
    assert not list(out.rglob("*.ckpt"))
    items = np.load(out / "runs" / "cross" / "seed_0" / "items.npy")
    assert items.mean() == pytest.approx(record["score"], abs=1e-6)
    assert cli(["compare", "--report-only", "--out", str(out)]) == 0
    assert cli([*arguments, "--batch-size", "128"]) == 2
    assert "batch_size was 256, now 128" in capsys.readouterr().err


def test_settings_are_read_as_fit_reads_them():
    flags = ["--config", "forecast", "--model.net.depth", "3", "--model.scan=forward", "--data.split", "60/20/20"]
    given, rest = take_settings([*flags, "--model.options.a.b=[1]", "--seeds", "2"])
    assert given.task == "forecasting"
    assert given.model["net"] == {"dim": 128, "depth": 3}
    assert given.model["options"] == {"a": {"b": [1]}}
    assert "scan" not in given.model  # which is what is compared
    assert given.data["split"] == "60/20/20"
    assert rest == ["--seeds", "2"]
    with pytest.raises(ValueError, match=r"--model\.net\.dim needs a value"):
        take_settings(["--model.net.dim"])

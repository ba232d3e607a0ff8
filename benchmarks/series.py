"""Train and score models of series: `python -m benchmarks.series etth1|exchange|ucr_uea --data DIR [--seeds 3]`.

`--data` holds `ETTh1.csv`, `exchange_rate.csv`, or one folder of `.ts` files a data set, at any depth. Every run is
one model, one horizon or data set, and one seed; `--jobs` run at once, each in a process of its own, and finished ones
are kept in `--runs`, so that the same command goes on where it was interrupted. Forecasters end with the weights of the
epoch with the best validation error, classifiers with those of the last epoch, without a validation part. No test
window is left out of `mse`; `mse_full_batches` is that of TimeMachine's published test, which leaves out the last
windows that fill no batch.

S-Mamba and TimeMachine have their published architectures. `etth1 --as-published` trains them as published too, and
without it as `CHOSEN`. `etth1 --choose` trains all `CANDIDATES` on seeds of their own and reports validation errors
alone, from which to choose. `etth1 --evidence` trains TimeMachine as published, but tests it after every epoch, to show
what its published settings can give: see `evidence.py`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEAVY = 2  # runs that take some 15 GB of GPU memory
HORIZONS = (96, 192, 336, 720)
UCR_UEA = ("JapaneseVowels", "BasicMotions", "ItalyPowerDemand", "ArrowHead", "GunPoint")

# Test errors that the papers state, with 96 steps read; TimeMachine's leave out the windows that fill no batch.
PUBLISHED = {
    ("etth1", "s_mamba"): (0.386, 0.443, 0.489, 0.502),
    ("etth1", "timemachine"): (0.364, 0.415, 0.429, 0.458),
}
# Ways to train the published architectures on ETTh1.
# Besides the published training: absolute errors, slower rates with averaged weights, more dropout, and, on top of
# these, less weight for far steps (as arXiv:2412.17323 trains), random frequencies taken out (arXiv:2302.09292) or
# errors of the spectrum (arXiv:2402.02399).
_S_MAMBA = {"loss": "mae", "ema_decay": 0.99, "lr": 1e-4, "net": {"dropout": 0.3}}
_SLOW = {"ema_decay": 0.95, "lr": 3e-4}
_TIMEMACHINE = {"loss": "mae", **_SLOW}
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "s_mamba": {
        "published": {},
        "absolute": {"loss": "mae"},
        "dropout": _S_MAMBA,
        "weighted": {**_S_MAMBA, "weighting": "arctan"},
        "frequencies": {**_S_MAMBA, "mask_frequencies": 0.2},
    },
    "timemachine": {
        "published": {},
        "absolute": {"loss": "mae"},
        "slow": _SLOW,
        "slow-weighted": {**_SLOW, "weighting": "arctan"},
        "absolute-slow": _TIMEMACHINE,
        "weighted": {**_TIMEMACHINE, "weighting": "arctan"},
        "frequencies": {**_TIMEMACHINE, "mask_frequencies": 0.2},
        "spectral": {**_SLOW, "spectral_loss": 0.9},
        "absolute-spectral": {**_TIMEMACHINE, "spectral_loss": 0.5},
        "spectral-frequencies": {**_SLOW, "spectral_loss": 0.9, "mask_frequencies": 0.2},
    },
}
# By the lowest validation error of `--choose` (results/etth1_choice.csv).
CHOSEN = {
    "s_mamba": {96: "weighted", 192: "weighted", 336: "weighted", 720: "frequencies"},
    "timemachine": {96: "absolute-spectral", 192: "slow-weighted", 336: "spectral", 720: "frequencies"},
}
EVIDENCE_EPOCHS = 20  # the published rates depend on the epoch alone: these are the first of the published 100
CHOICE_SEED = 100  # the first seed of the runs that choose; results have seeds from 0
PUBLISHED_BATCH = 512  # windows in a test batch of TimeMachine
LINEAR: dict[str, Any] = {"model": {"lr": 1e-3, "schedule": "halving", "patience": 3}, "epochs": 10, "batch": 32}


@dataclass
class Run:
    """One training run.

    Attributes:
        task: "forecasting" or "series-classification", or "rocket".
        data: File or folder.
        dataset: Its name.
        model: Registered name.
        horizon: Steps to forecast, 0 for classes.
        seed: Of the run.
        epochs: At most.
        batch: Windows or series a step.
        options: Arguments of the task.
        data_options: Arguments of its data.
        heavy: How much of a GPU it needs; heavier runs start first.
        settings: How a published architecture is trained.
    """

    task: str
    data: str
    dataset: str
    model: str
    horizon: int
    seed: int
    epochs: int
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    heavy: int = 0
    settings: str = ""

    @property
    def folder(self) -> str:
        """Where the run is kept."""
        parts = (self.dataset, self.model, str(self.horizon or ""), str(self.seed), self.settings)
        return "-".join(part for part in parts if part)


def etth1(data: Path, seeds: int, as_published: bool = False, choose: bool = False) -> list[Run]:
    """S-Mamba and TimeMachine beside linear models at four horizons; or, to `choose`, all candidates of the former."""
    source = str(find(data, "ETTh1.csv"))
    if not choose:
        return [
            run for seed in range(seeds) for h in HORIZONS for run in _forecasts("etth1", source, h, seed, as_published)
        ]
    return [
        _published("etth1", source, model, h, CHOICE_SEED + seed, way)
        for seed in range(seeds) for h in HORIZONS for model, ways in CANDIDATES.items() for way in ways
    ]  # fmt: skip


def exchange(data: Path, seeds: int, as_published: bool = False, choose: bool = False) -> list[Run]:
    """S-Mamba with its published settings, TimeMachine and linear models; every row has the repeated last value."""
    source = str(find(data, "exchange_rate.csv"))
    return [run for seed in range(seeds) for h in HORIZONS for run in _forecasts("exchange", source, h, seed, True)]


def evidence_runs(data: Path, seeds: int) -> list[Run]:
    """TimeMachine as published, but for fewer epochs."""
    source = str(find(data, "ETTh1.csv"))
    runs = [_published("etth1", source, "timemachine", h, s, "published") for s in range(seeds) for h in HORIZONS]
    return [replace(run, epochs=EVIDENCE_EPOCHS) for run in runs]


def _forecasts(dataset: str, source: str, horizon: int, seed: int, as_published: bool) -> list[Run]:
    ways = {name: "published" if as_published else CHOSEN[name][horizon] for name in CANDIDATES}
    common = ("forecasting", source, dataset)
    return [
        *(_published(dataset, source, name, horizon, seed, way) for name, way in ways.items()),
        *(Run(*common, name, horizon, seed, LINEAR["epochs"], LINEAR["batch"], LINEAR["model"]) for name in
          ("series_linear", "dlinear", "nlinear")),
    ]  # fmt: skip


def _published(dataset: str, source: str, model: str, horizon: int, seed: int, settings: str) -> Run:
    """A run of a published architecture; 100 epochs of TimeMachine if it is trained as published, else 40 at most."""
    from mamba_zoo.backbones._series_published import PUBLISHED as SETTINGS

    key = f"{dataset}_96_{horizon}"
    # TimeMachine has no published settings for the exchange rates.
    known = SETTINGS[model].get(key)
    training = known["training"] if known else {"lr": 1e-3, "batch_size": PUBLISHED_BATCH, "max_epochs": 100}
    options: dict[str, Any] = {"published": key} if known else {"net": {"n1": 128, "n2": 16}}
    options["lr"], epochs = training["lr"], training["max_epochs"]
    if model == "s_mamba":
        options |= {"schedule": "halving", "patience": 3}
    else:
        as_published = settings == "published" and known is not None
        options |= {"schedule": "decay", "patience": 100 if as_published else 10}
        epochs = epochs if as_published else 40
    options |= CANDIDATES[model][settings]
    return Run(
        "forecasting", source, dataset, model, horizon, seed, epochs, training["batch_size"], options,
        heavy=HEAVY if model == "timemachine" else 1, settings=settings if known else "",
    )  # fmt: skip


def ucr_uea(data: Path, seeds: int, as_published: bool = False, choose: bool = False) -> list[Run]:
    """A bidirectional Mamba over the steps beside a linear model and ROCKET, on five data sets of the archives."""
    runs = []
    for name in UCR_UEA:
        source = str(find(data, f"{name}_TRAIN.ts").parent)
        epochs = {"JapaneseVowels": 100, "ItalyPowerDemand": 200}.get(name, 400)
        for seed in range(seeds):
            net = {"dim": 64, "depth": 3, "drop_rate": 0.2, "drop_path_rate": 0.1}
            mamba = {"lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 5.0, "net": net}
            linear = {"lr": 1e-2, "weight_decay": 0.1}
            given = {"val_fraction": 0, "noise": 0.1, "scaling": 0.1}
            common = ("series-classification", source, name)
            runs += [
                Run(*common, "series_mamba", 0, seed, epochs, 16, mamba, given, heavy=1),
                Run(*common, "series_linear", 0, seed, 100, 16, linear, given),
                Run("rocket", source, name, "rocket", 0, seed, 0, 0),
            ]
    return runs


SETS = {"etth1": etth1, "exchange": exchange, "ucr_uea": ucr_uea}


def find(data: Path, name: str) -> Path:
    """The file `name` in `data` or below it.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(data.rglob(name))
    if not found:
        raise FileNotFoundError(f"{data} holds no file {name}")
    return found[0]


def perform(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score; a finished run is read from its folder."""
    started = time.perf_counter()
    row: dict[str, Any] = {key: getattr(run, key) for key in ("dataset", "model", "horizon", "settings", "seed")}
    if run.task == "rocket":
        return {**row, "accuracy": _rocket(run), "seconds": time.perf_counter() - started}
    import numpy as np
    import torch

    from mamba_zoo.tasks.registry import find_task
    from mamba_zoo.tasks.train import train_once

    torch.set_num_threads(1)
    sizes = {"seq_len": 96, "pred_len": run.horizon} if run.horizon else {}
    kind: Any = find_task(run.task).data_class
    data = kind(run.data, batch_size=run.batch, **sizes, **run.data_options)
    trainer = {"accelerator": options.accelerator, "precision": options.precision}
    if options.evidence:
        from .evidence import tested_each_epoch

        folder = options.runs / f"{run.folder}-evidence"
        return {**row, **tested_each_epoch(run.model, data, folder, run.seed, run.epochs, run.options, trainer)}
    trainer["gradient_clip_val"] = None if run.horizon else 1.0
    result = train_once(
        run.model, data, options.runs / run.folder, seed=run.seed, max_epochs=run.epochs, model=run.options,
        trainer=trainer, task=run.task,
    )  # fmt: skip
    if run.horizon:
        row["val_mse"] = min(epoch["val/mse"] for epoch in result["curve"])
    test = {} if options.choose else result["test"]
    if run.horizon and not options.choose:
        test["mse_full_batches"] = full_batches(
            np.load(options.runs / run.folder / "test_predictions.npz")["windows_mse"]
        )
    errors = ("mse", "mae", "mse_full_batches", "repeat_mse", "repeat_mae", "season_mse")
    kept = errors if run.horizon else ("top1", "f1")
    scores = {"accuracy" if key == "top1" else key: test[key] for key in kept if key in test}
    return {
        **row,
        **scores,
        "epochs": len(result["curve"]),
        "seconds": result["seconds"],
        "parameters": result["parameters"],
        "peak_memory_mb": None if result["peak_memory_bytes"] is None else result["peak_memory_bytes"] / 2**20,
    }


def full_batches(errors: Any) -> float:
    """The mean of the errors of windows without the last, which fill no batch of the published size."""
    return float(errors[: len(errors) // PUBLISHED_BATCH * PUBLISHED_BATCH].mean())


def _rocket(run: Run) -> float:
    from mamba_zoo.tasks.labelled_series import read_parts

    from .rocket import rocket_accuracy

    train, test = read_parts(run.data)
    return rocket_accuracy(train.series, train.labels, test.series, test.labels, run.seed)


def performed(todo: list[Run], options: argparse.Namespace) -> Iterator[tuple[Run, Any]]:
    """Each run with its row, or with what went wrong, as they end; the heaviest start first, but few at a time."""
    waiting, active = sorted(todo, key=lambda run: -run.heavy), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(options.jobs, len(todo)), mp_context=context) as pool:
        while waiting or active:
            for run in list(waiting):
                heavy = sum(other.heavy == HEAVY for other in active.values())
                if len(active) < options.jobs and (run.heavy < HEAVY or heavy < options.heavy_jobs):
                    waiting.remove(run)
                    active[pool.submit(perform, run, options)] = run
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                run = active.pop(future)
                yield run, future.exception() or future.result()


def summary(rows: list[dict[str, Any]], dataset: str) -> Table:
    """Mean and deviation over the seeds, and what the papers state."""
    score = next(name for name in ("mse", "accuracy", "val_mse") if name in rows[0])
    table = Table("data", "steps", "model", "settings", f"{score}, mean ± deviation", "full batches", "published",
                  "last value repeated", "seeds")  # fmt: skip
    for key in dict.fromkeys(_order(row)[:-1] for row in rows):
        found = [row for row in rows if _order(row)[:-1] == key]
        stated = PUBLISHED.get((dataset, found[0]["model"])) if score == "mse" else None
        full = [row["mse_full_batches"] for row in found if "mse_full_batches" in row]
        repeat = found[0].get("repeat_mse")
        table.add_row(
            found[0]["dataset"], str(found[0]["horizon"] or ""), found[0]["model"], found[0]["settings"],
            _spread([row[score] for row in found]), _spread(full) if full else "",
            f"{stated[HORIZONS.index(found[0]['horizon'])]:.3f}" if stated else "",
            f"{repeat:.4f}" if repeat is not None else "", str(len(found)),
        )  # fmt: skip
    return table


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Run, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time (default: %(default)s)")
    parser.add_argument("--heavy-jobs", type=int, default=3, help="of these, TimeMachine (default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="as in Lightning, such as bf16-mixed")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--horizons", type=int, nargs="+", help="only these")
    parser.add_argument("--datasets", nargs="+", help="only these")
    parser.add_argument("--epochs", type=int, help="at most as many, for a trial")
    parser.add_argument("--as-published", action="store_true", help="etth1: train as published, not as chosen")
    parser.add_argument("--choose", action="store_true", help="etth1: train all candidates, report validation errors")
    parser.add_argument("--evidence", action="store_true", help="etth1: TimeMachine as published, tested every epoch")
    parser.add_argument("--accelerator", default="auto", help="as in Lightning: cpu, gpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/series"), help="folder of the runs")
    parser.add_argument(
        "--out", type=Path, help="CSV file; default benchmarks/results/SET[_published, _choice, _evidence].csv"
    )
    options = parser.parse_args(arguments)
    ways = [way for way in ("as_published", "choose", "evidence") if getattr(options, way)]
    if ways and (options.set != "etth1" or len(ways) > 1):
        parser.error("--as-published, --choose and --evidence are for etth1, one at a time")
    runs = (
        evidence_runs(options.data, options.seeds)
        if options.evidence
        else SETS[options.set](options.data, options.seeds, options.as_published, options.choose)
    )
    todo = [
        run
        for run in runs
        if (not options.models or run.model in options.models)
        and (not options.horizons or run.horizon in options.horizons)
        and (not options.datasets or run.dataset in options.datasets)
    ]
    for run in todo:
        run.epochs = min(run.epochs, options.epochs or run.epochs)
    console = Console(width=140)
    name = options.set + "".join(
        {"as_published": "_published", "choose": "_choice", "evidence": "_evidence"}[way] for way in ways
    )
    out = options.out or Path(__file__).parent / "results" / f"{name}.csv"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, rows = time.perf_counter(), []
    for run, result in performed(todo, options):
        if isinstance(result, Exception):
            console.print(f"{run.folder} failed: {type(result).__name__}: {result}", style="red")
            continue
        rows.append(result)
        write(out, rows, options)
        score = result.get("mse", result.get("accuracy", result.get("val_mse")))
        console.print(f"{len(rows)}/{len(todo)} {run.folder}: {score:.4f}, {result['seconds']:.1f} s")
    if not rows:
        sys.exit("every run failed")
    console.print(summary(sorted(rows, key=_order), options.set))
    console.print(f"{time.perf_counter() - started:.0f} s in all; {out}")
    if len(rows) < len(todo):
        sys.exit(f"{len(todo) - len(rows)} runs failed")


def write(out: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All rows so far, below a line that says where, with what and by which command they were measured."""
    import torch

    import mamba_zoo

    gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    where = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, python {platform.python_version()}, mamba_zoo {mamba_zoo.__version__}"
    command = f"python -m benchmarks.series {options.set} --data DIR --seeds {options.seeds} --jobs {options.jobs}"
    command += " --as-published" if options.as_published else ""
    command += " --choose" if options.choose else ""
    command += " --evidence" if options.evidence else ""
    command += "" if options.precision == "32-true" else f" --precision {options.precision}"
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with out.open("w", newline="") as file:
        file.write(f"# {where}; {versions}; {datetime.date.today()}; {command}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=_order):
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["dataset"], row["horizon"], row["model"], row["settings"], row["seed"]


if __name__ == "__main__":
    main()

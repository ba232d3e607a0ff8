"""Graph models on real data: `python -m benchmarks.graphs [--only cora,mutag] [--data DIR] [--processes 16]`.

Trains Graph-Mamba under several orders, with a random order and a model without a scan as controls, and GCN, GIN and
GPS with attention in the same harness, on Cora, CiteSeer, MUTAG, ENZYMES and ESOL. Runs are independent processes of
one thread; the citation networks use the GPU if there is one. Finished runs are kept in `--out`, so that a stopped
benchmark goes on. Writes `graph_runs.csv` (a row a run), `graph_summary.csv` (a row a model and order) and, for each
data set, `graph_orders_NAME.csv`, the paired comparison of orders.

Settings of Cora, CiteSeer and MUTAG are chosen among a few trials on validation data, with seeds that are not used
again and with as many trials for each baseline; those of ENZYMES and ESOL are fixed. Where there is a validation set
(Cora, CiteSeer, ESOL), the score of a run is that of the epoch with the best validation score. The ten folds of MUTAG
and ENZYMES are trained on nine and scored with the last weights; "best epoch" rows show what the same runs give by the
protocol of Xu et al. (arXiv:1810.00826), who take the best epoch of the average test curve. That flatters, and
published numbers were made like this.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
ORDERS = ("degree", "rcm", "bfs", "pagerank", "fiedler", "clusters")
CONTROLS = ("random", "none")


@dataclass(frozen=True)
class Benchmark:
    """What is trained on one data set."""

    task: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]  # of the task, for all networks
    options: Mapping[str, Any]  # of all networks
    mamba: Mapping[str, Any]  # of Graph-Mamba besides
    epochs: int
    seeds: int
    folds: int = 1
    orders: tuple[str, ...] = ORDERS
    baselines: tuple[str, ...] = ("gcn", "gin", "gps")
    trials: tuple[Mapping[str, Any], ...] = ()
    trial_seeds: tuple[int, ...] = (100, 101)
    gpu: bool = False
    baseline_options: Mapping[str, Any] = field(default_factory=dict)


def _trial(lr: float, decay: float, drop: float, **options: Any) -> dict[str, Any]:
    return {
        "model": {"lr": lr, "weight_decay": decay},
        "options": {"drop_rate": drop, "input_drop": drop, **options},
    }


_CITATIONS = Benchmark(
    "node-classification",
    {"root": "planetoid:Cora", "row_normalize": False, "steps_per_epoch": 5},
    {"lr": 0.01, "opt": "adam", "warmup_epochs": 2, "min_lr": 0.1},
    {"dim": 64, "smooth": 10},
    {"depth": 1, "local": "gcn", "norm": "none"},
    epochs=40,
    seeds=5,
    trials=(
        _trial(0.01, 0.005, 0.5),
        _trial(0.01, 0.005, 0.8),
        _trial(0.005, 0.01, 0.6),
        _trial(0.005, 0.02, 0.6),
        _trial(0.01, 0.001, 0.7),
        _trial(0.005, 0.01, 0.6, smooth=0),
    ),
    gpu=True,
    baseline_options={"depth": 2},
)
_MOLECULES = Benchmark(
    "graph-classification",
    {"root": "tu:MUTAG", "batch_size": 32},
    {"lr": 0.003, "weight_decay": 0.01, "warmup_epochs": 5},
    {"dim": 32, "depth": 3, "drop_rate": 0.2, "global_pool": "add"},
    {"local": "gin"},
    epochs=40,
    seeds=3,
    folds=10,
    orders=("degree", "rcm", "bfs", "pagerank"),
    trials=(
        {"options": {"drop_rate": 0.2}},
        {"options": {"drop_rate": 0.5, "depth": 2}},
        {"options": {"drop_rate": 0.5, "depth": 2, "global_pool": "mean"}},
        {"options": {"drop_rate": 0.5, "depth": 2, "global_pool": "mean", "dim": 64}},
        {"options": {"drop_rate": 0.5, "depth": 2}, "model": {"ema_decay": 0.95}},
        {"options": {"drop_rate": 0.2, "dim": 16}, "model": {"ema_decay": 0.95}},
        {"options": {"drop_rate": 0.3, "pe_dim": 8}, "model": {"ema_decay": 0.95}, "data": {"pe": "rwse"}},
        {"options": {"drop_rate": 0.5, "depth": 2, "pe_dim": 8}, "model": {"ema_decay": 0.95}, "data": {"pe": "rwse"}},
        {"options": {"drop_rate": 0.2}, "model": {"ema_decay": 0.95, "label_smoothing": 0.1}},
        {"options": {"drop_rate": 0.5, "head_layers": 2}, "model": {"ema_decay": 0.98, "lr": 0.005}},
        {
            "options": {"drop_rate": 0.3},
            "model": {"ema_decay": 0.95, "label_smoothing": 0.1, "lr": 0.01},
            "mamba": {"ties": "random", "num_order_samples": 5},
        },
        {
            "options": {"drop_rate": 0.5, "depth": 2, "global_pool": "mean", "dim": 64},
            "model": {"ema_decay": 0.95, "label_smoothing": 0.1, "lr": 0.005},
        },
    ),
)
BENCHMARKS = {
    "cora": _CITATIONS,
    "citeseer": replace(_CITATIONS, data={**_CITATIONS.data, "root": "planetoid:CiteSeer"}, orders=ORDERS[:4]),
    "mutag": _MOLECULES,
    "enzymes": replace(
        _MOLECULES,
        data={"root": "tu:ENZYMES", "batch_size": 32},
        options={"dim": 64, "depth": 3, "drop_rate": 0.2},
        epochs=60,
        orders=("degree", "rcm"),
        trials=(),
    ),
    "esol": replace(
        _MOLECULES,
        task="graph-regression",
        data={"root": "moleculenet:ESOL", "batch_size": 64},
        model={"lr": 0.002, "weight_decay": 0.01, "warmup_epochs": 5},
        options={"dim": 64, "depth": 3, "drop_rate": 0.1, "global_pool": "add"},
        epochs=60,
        seeds=3,
        folds=1,
        trials=(),
    ),
}
FIRST_TRIAL_SEED = 100


@dataclass(frozen=True)
class Job:
    """One training run."""

    benchmark: str
    model: str
    scan: str | None
    seed: int
    fold: int
    trial: int | None = None  # of its benchmark

    @property
    def is_trial(self) -> bool:
        """Whether it only helps to choose settings."""
        return self.seed >= FIRST_TRIAL_SEED

    @property
    def name(self) -> str:
        """Folder of the run."""
        scan = "own" if self.scan is None else self.scan.partition("(")[0]
        kind = "trial" if self.is_trial else "run"
        return f"{kind}/{self.benchmark}/{self.model}-{scan}/{self.seed}-{self.fold}-{self.trial}"


def settings(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the task, and of the data."""
    b = BENCHMARKS[job.benchmark]
    own = b.mamba if job.model == "graph_mamba" else {**b.baseline_options, **_gps(b, job.model)}
    options, model, data = {**b.options, **own}, dict(b.model), dict(b.data)
    if job.trial is not None:
        trial = b.trials[job.trial]
        options |= trial["options"] | (trial.get("mamba", {}) if job.model == "graph_mamba" else {})
        model |= trial.get("model", {})
        data |= trial.get("data", {})
    if b.folds > 1:
        data |= {"folds": 10, "fold": job.fold, "validate_on_test": not job.is_trial}
    elif b.task == "graph-regression":
        data |= {"split_seed": job.seed}
    return {**model, "options": options}, data


def _gps(b: Benchmark, model: str) -> dict[str, Any]:
    """Beside attention stands what Graph-Mamba has beside its scan."""
    return {"local": b.mamba["local"]} if model == "gps" else {}


@lru_cache(maxsize=16)  # as many as folds
def _data(task: str, values: str) -> Any:
    from mamba_zoo.tasks.registry import find_task

    kind: Any = find_task(task).data_class
    return kind(**json.loads(values))


def run(job: Job, out: str, data_dir: str, gpu: bool, epochs: int) -> dict[str, Any]:
    """Train once; returns a row."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    import warnings

    from pytorch_lightning import Trainer

    from mamba_zoo.tasks.registry import find_task
    from mamba_zoo.tasks.running import quiet
    from mamba_zoo.tasks.train import train_once

    b = BENCHMARKS[job.benchmark]
    folder = Path(out) / job.name
    done = folder / "row.json"
    if done.exists():
        return json.loads(done.read_text())
    model, values = settings(job)
    values["download_dir"] = str(Path(data_dir) / _library(b))
    data = _data(b.task, json.dumps(values, sort_keys=True))
    trainer: dict[str, Any] = {"accelerator": "gpu" if gpu else "cpu"}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train_once(job.model, data, folder, job.scan, job.seed, epochs, model, trainer, b.task)
        module: Any = find_task(b.task).model_class
        key, items = module.monitor.partition("/")[2], np.load(folder / "test_items.npy")
        score = found["test"][key]
        if b.folds == 1:
            best = module.from_checkpoint(folder / "best.ckpt")
            with quiet():
                tester = Trainer(
                    logger=False, enable_progress_bar=False, enable_model_summary=False, devices=1, **trainer
                )
                score = tester.test(best, datamodule=data, verbose=False)[0][f"test/{key}"]
            items = best.test_items
    curve = [row[module.monitor] for row in found["curve"]]
    last = curve[-1] if b.folds > 1 else max(curve) if module.monitor_mode == "max" else min(curve)
    row = {
        "benchmark": job.benchmark, "model": job.model, "order": job.scan or "", "seed": job.seed, "fold": job.fold,
        "trial": "" if job.trial is None else job.trial, "protocol": "last epoch" if b.folds > 1 else "validation",
        "score": score, "metric": module.score_name, "last": found["test"][key], "validation": last,
        "parameters": found["parameters"], "seconds": round(time.perf_counter() - started, 2),
        "train_seconds": round(found["seconds"], 2), "device": "gpu" if gpu else "cpu",
        "curve": curve, "items": np.asarray(items).tolist(),
    }  # fmt: skip
    for path in folder.glob("*.ckpt"):
        path.unlink()
    done.write_text(json.dumps(row))
    return row


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all jobs, in their order, trained by `--processes` processes."""
    gpu = torch.cuda.is_available() and not args.cpu
    rows: dict[Job, dict[str, Any]] = {}
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        waiting = {
            pool.submit(
                run,
                job,
                str(args.out),
                str(args.out / "data"),
                gpu and BENCHMARKS[job.benchmark].gpu,
                BENCHMARKS[job.benchmark].epochs,
            ): job
            for job in jobs
        }
        for count, future in enumerate(as_completed(waiting), start=1):
            rows[waiting[future]] = future.result()
            if count % 20 == 0 or count == len(jobs):
                sys.stdout.write(f"{count} of {len(jobs)} runs, {time.perf_counter() - started:.0f} s\n")
                sys.stdout.flush()
    return [rows[job] for job in jobs]


def chosen(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """For each model, the trial with the best mean score on the validation nodes."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["benchmark"] == name:
            found[row["model"], row["trial"]].append(row["validation"])
    models = {model for model, _ in found}
    return {
        model: -max((float(np.mean(scores)), -trial) for (m, trial), scores in found.items() if m == model)[1]
        for model in models
    }


def trial_jobs(names: Sequence[str]) -> Iterator[Job]:
    """Trials of the benchmarks that have any; those of folds keep a part of the other nine for validation."""
    for name in names:
        b = BENCHMARKS[name]
        models = ("graph_mamba", *b.baselines)
        for model, trial, seed, fold in itertools.product(models, range(len(b.trials)), b.trial_seeds, range(b.folds)):
            yield Job(name, model, b.orders[0] if model == "graph_mamba" else None, seed, fold, trial)


def final_jobs(name: str, trials: Mapping[str, int]) -> Iterator[Job]:
    """The runs that are reported."""
    b = BENCHMARKS[name]
    for seed, fold in itertools.product(range(b.seeds), range(b.folds)):
        for order in (*b.orders, *CONTROLS):
            yield Job(name, "graph_mamba", _spec(order, seed), seed, fold, trials.get("graph_mamba"))
        for model in b.baselines:
            yield Job(name, model, None, seed, fold, trials.get(model))


def _spec(order: str, seed: int) -> str:
    return f"random(seed={seed}, k=1)" if order == "random" else order


def compare(name: str, jobs: Sequence[Job], rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The orders of one benchmark with the statistics of `mamba-zoo compare`, from runs that are done."""
    from mamba_zoo import compare as comparisons
    from mamba_zoo.tasks.registry import find_task

    b = BENCHMARKS[name]
    by_run: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for job, row in zip(jobs, rows, strict=True):
        if job.model == "graph_mamba":
            by_run[job.scan or "", job.seed].append(row)

    def trained(scan: str, seed: int, folder: Path) -> dict[str, Any]:
        found = by_run[scan, seed]
        return {
            found[0]["metric"]: float(np.mean([row["score"] for row in found])),
            "items": np.concatenate([row["items"] for row in found]),
            "parameters": found[0]["parameters"],
            "seconds": sum(row["train_seconds"] for row in found),
        }

    folder = out / "orders" / name
    shutil.rmtree(folder, ignore_errors=True)
    comparison = comparisons.orders(
        "graph_mamba", name, list(b.orders), b.seeds, b.epochs, folder, CONTROLS, train=trained, grid=(8, 8),
        metric=find_task(b.task).model_class.metric(), progress=False,
    )  # fmt: skip
    shutil.copy(folder / "summary.csv", out / f"graph_orders_{name}.csv")
    for sentence in comparison.verdict:
        sys.stdout.write(f"{name}: {sentence}\n")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each benchmark, model, order and protocol; spread is over seeds, and over folds within a seed."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        order = str(row["order"]).partition("(")[0]
        for protocol in (row["protocol"], *(("best epoch",) if row["protocol"] == "last epoch" else ())):
            groups[row["benchmark"], protocol, row["model"], order].append(row)
    found = []
    for (benchmark, protocol, model, order), members in groups.items():
        seeds = sorted({row["seed"] for row in members})
        if protocol == "best epoch":
            per_seed = []
            spreads = []
            for seed in seeds:
                curves = np.array([row["curve"] for row in members if row["seed"] == seed])
                best = int(curves.mean(0).argmax())
                per_seed.append(float(curves[:, best].mean()))
                spreads.append(float(curves[:, best].std()))
        else:
            per_seed = [float(np.mean([row["score"] for row in members if row["seed"] == seed])) for seed in seeds]
            spreads = [float(np.std([row["score"] for row in members if row["seed"] == seed])) for seed in seeds]
        found.append({
            "benchmark": benchmark, "protocol": protocol, "model": model, "order": order,
            "metric": members[0]["metric"], "mean": round(float(np.mean(per_seed)), 4),
            "std_over_seeds": round(float(np.std(per_seed, ddof=1)), 4) if len(seeds) > 1 else "",
            "std_over_folds": round(float(np.mean(spreads)), 4) if len(members) > len(seeds) else "",
            "runs": len(members), "trial": members[0]["trial"], "parameters": members[0]["parameters"],
            "validation": round(float(np.mean([row["validation"] for row in members])), 4),
            "seconds_a_run": round(float(np.mean([row["train_seconds"] for row in members])), 1),
        })  # fmt: skip
    return found


def write(path: Path, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    """CSV, its first line saying where it was made."""
    import torch_geometric

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    where = (
        f"# {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}; torch {torch.__version__}, "
        f"torch_geometric {torch_geometric.__version__}; {command}"
    )
    keys = [key for key in rows[0] if key not in ("curve", "items")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(where + "\n")
        writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def prepare(names: Sequence[str], given: Path | None, data: Path) -> list[str]:
    """Have every data set read once, before many processes do it; returns the benchmarks that can be run."""
    ready = []
    for name in names:
        b = BENCHMARKS[name]
        library, _, dataset = _library(b), *b.data["root"].partition(":")[1:]
        folder = dataset.lower() if library == "moleculenet" else dataset
        source, target = (given or data) / library / folder, data / library / folder
        if given is not None and not target.exists() and source.exists():
            shutil.copytree(source, target, copy_function=shutil.copyfile)
            for path in (target, *target.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            values = {**b.data, "download_dir": str(data / library)}
            _data(b.task, json.dumps(values, sort_keys=True)).setup()
        except ImportError as error:
            sys.stdout.write(f"{name} is left out: {error}\n")
            continue
        ready.append(name)
    return ready


def _library(b: Benchmark) -> str:
    return {"planetoid": "planetoid", "tu": "tudataset", "moleculenet": "moleculenet"}[b.data["root"].partition(":")[0]]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="benchmarks, separated by commas")
    parser.add_argument(
        "--data", type=Path, help="folder with planetoid/, tudataset/ and moleculenet/; else downloaded"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/graphs"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="two epochs, seeds and folds: whether it works at all")
    args = parser.parse_args()
    if args.quick:
        for name, b in BENCHMARKS.items():
            BENCHMARKS[name] = replace(
                b, epochs=2, seeds=2, folds=min(b.folds, 2), trials=b.trials[:1], orders=b.orders[:2]
            )
    names = args.only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    names = prepare(names, args.data, args.out / "data")
    trials = list(trial_jobs(names))
    tuning = run_all(trials, args) if trials else []
    picked = {name: chosen(name, tuning) for name in names}
    jobs = [job for name in names for job in final_jobs(name, picked[name])]
    rows = run_all(jobs, args)
    command = "python -m benchmarks.graphs " + " ".join(f"--only {args.only}".split())
    write(args.results / f"graph_runs_{'_'.join(names)}.csv", [*tuning, *rows], command)
    table = summary(rows)
    write(args.results / f"graph_summary_{'_'.join(names)}.csv", table, command)
    for row in table:
        sys.stdout.write("  ".join(f"{key}={row[key]}" for key in row if row[key] != "") + "\n")
    for name in names:
        compare(name, *_of(name, jobs, rows), out=args.out)
        shutil.copy(args.out / f"graph_orders_{name}.csv", args.results)
    return 0


def _of(name: str, jobs: Sequence[Job], rows: Sequence[Any]) -> tuple[list[Job], list[Any]]:
    pairs = [(job, row) for job, row in zip(jobs, rows, strict=True) if job.benchmark == name]
    return [job for job, _ in pairs], [row for _, row in pairs]


if __name__ == "__main__":
    sys.exit(main())

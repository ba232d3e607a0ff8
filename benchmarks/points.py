"""Point models on the Labeled PSB: `python -m benchmarks.points --data labeled_psb_2048.npz [--processes 16]`.

Classification of 380 shapes in 19 classes (228 for training): `pointmamba_mini` along several orders, all of two
directions, with a random order and a model without a scan as controls; DGCNN and PointNet++ from PyG's layers in the
same harness; and the model started from its own masked pre-training on the training shapes. Then parts, told the class
of each shape: `pointmamba_mini_parts` and DGCNN. Every run has the settings of the recipes points_psb and parts_psb,
and is scored once, with its last weights: no test shape decides anything. Runs are independent processes that share the
GPU; finished ones are kept in `--out`, so that a stopped benchmark goes on. Writes points_runs.csv (a row a run),
points_summary.csv (a row a model and order), and the paired comparison of orders, points_orders.csv for shapes and
points_orders_parts.csv for parts.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mamba_zoo.tasks.recipes import shipped

RESULTS = Path(__file__).parent / "results"
REFERENCE = "join(hilbert, hilbert_trans)"
ORDERS = (
    REFERENCE,
    "join(zcurve, zcurve_trans)",
    "join(cts('xyz'), cts('zyx'))",
    "join(sort_x, sort_y)",
    "both_ways(spectral)",
    "both_ways(given)",
)
CONTROLS = ("random", "none")
BASELINES = {"dgcnn": {"neighbours": 20}, "pointnet2": {}}


@dataclass(frozen=True)
class Job:
    """One training run; `start` is "scratch", or "pretrained" with a pre-training of its own before."""

    what: str  # "shapes" or "parts"
    model: str
    order: str
    seed: int
    start: str = "scratch"

    @property
    def folder(self) -> str:
        """Name of its folder."""
        text = "".join(c if c.isalnum() else "_" for c in self.order)
        return f"{self.what}-{self.model}-{text}-{self.start}-{self.seed}"


def plan(seeds: int, baselines: bool) -> list[Job]:
    """All runs, the long ones first."""
    every = range(seeds)
    jobs = [Job("parts", "pointmamba_mini_parts", REFERENCE, s) for s in every]
    jobs += [Job("parts", "pointmamba_mini_parts", "join(sort_x, sort_y)", s) for s in every]
    jobs += [Job("parts", "dgcnn", "", s) for s in every] if baselines else []
    jobs += [Job("shapes", "pointmamba_mini", REFERENCE, s, "pretrained") for s in every]
    jobs += [Job("shapes", name, "", s) for name in BASELINES for s in every] if baselines else []
    return jobs + [Job("shapes", "pointmamba_mini", order, s) for s in every for order in (*ORDERS, *CONTROLS)]


def run(job: Job, data: str, out: str, device: str, epochs: Mapping[str, int], small: bool) -> dict[str, Any]:
    """Train and score one job, in a process of its own."""
    from mamba_zoo.tasks.point_data import PartData, PointData, UnlabelledData
    from mamba_zoo.tasks.train import train_once

    torch.set_num_threads(1)
    folder = Path(out) / job.folder
    recipe = yaml.safe_load(shipped()[f"{'points' if job.what == 'shapes' else 'parts'}_psb"].read_text())
    settings = {key: value for key, value in recipe["model"].items() if key != "name"}
    loader = {key: value for key, value in recipe["data"].items() if key != "root"}
    trainer = {"accelerator": device}
    passes = epochs[job.what]
    if job.model in BASELINES:
        settings["options"] = dict(BASELINES[job.model])
        if job.what == "parts":
            settings["options"]["neighbours"] = 20
    elif small:
        settings["options"] = {**settings.get("options", {}), "groups": 16, "group_size": 8, "dim": 32, "depth": 6}
    if small:
        settings |= {"num_points": 128, "votes": 1} if job.what == "shapes" else {"num_points": 128}
        loader |= {"points": 128, "repeats": 1}
        if job.model == "pointnet2":
            settings["options"] = {"centres": [64, 16]}
    started = time.perf_counter()
    if job.start == "pretrained":
        auto = {key: settings[key] for key in ("num_points", "scale", "translate", "rotate", "tilt", "flip", "lr")}
        options = {k: v for k, v in settings.get("options", {}).items() if k != "drop_rate"}
        train_once(
            "pointmamba_mini_pretraining", UnlabelledData(data, **loader), folder / "pretraining", scan=job.order,
            seed=job.seed, max_epochs=epochs["pretraining"], model={**auto, "options": options, "warmup_epochs": 2},
            trainer={**trainer, "check_val_every_n_epoch": epochs["pretraining"]},
        )  # fmt: skip
        settings["init_encoder"] = str(folder / "pretraining" / "last.ckpt")
    order = f"random(seed={job.seed}, k=2)" if job.order == "random" else job.order or None
    source = (PointData if job.what == "shapes" else PartData)(data, **loader)
    # Validation repeats the training shapes here: once, at the end, is enough.
    result = train_once(
        job.model, source, folder, scan=order, seed=job.seed, max_epochs=passes, model=settings,
        trainer={**trainer, "check_val_every_n_epoch": passes},
    )  # fmt: skip
    metric = "accuracy" if job.what == "shapes" else "miou"
    return {
        **asdict(job), "metric": metric, "score": result[metric], "class_miou": result["test"].get("class_miou", ""),
        "macro_f1": result["test"].get("f1", ""), "loss": result["test"]["loss"], "parameters": result["parameters"],
        "train_seconds": round(result["seconds"], 1), "wall_seconds": round(time.perf_counter() - started, 1),
        "epochs": passes, "items": np.load(folder / "test_items.npy"),
    }  # fmt: skip


def run_all(jobs: Sequence[Job], args: argparse.Namespace, epochs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every job, `args.processes` at a time; one that fails is reported and left out."""
    device = "gpu" if torch.cuda.is_available() and not args.cpu else "cpu"
    rows: dict[Job, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.processes, len(jobs)), spawn) as pool:
        waiting = {
            pool.submit(run, job, str(args.data), str(args.out), device, epochs, args.quick): job for job in jobs
        }
        for done in as_completed(waiting):
            job = waiting[done]
            try:
                rows[job] = row = done.result()
            except Exception as error:  # a run that fails must not take the others with it
                sys.stdout.write(f"{job.folder} failed: {type(error).__name__}: {error}\n")
                continue
            sys.stdout.write(f"[{len(rows)}/{len(jobs)}] {job.folder}: {row['score']:.4f} {row['wall_seconds']} s\n")
            sys.stdout.flush()
    return [rows[job] for job in jobs if job in rows]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model, order and start."""
    keys = ("what", "model", "order", "start")
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for group, members in groups.items():
        scores = np.array([row["score"] for row in members])
        classes = [row["class_miou"] for row in members if row["class_miou"] != ""]
        found.append({
            **dict(zip(keys, group, strict=True)), "metric": members[0]["metric"],
            "mean": round(float(scores.mean()), 4),
            "std": round(float(scores.std(ddof=1)), 4) if len(scores) > 1 else "",
            "class_miou": round(float(np.mean(classes)), 4) if classes else "", "seeds": len(scores),
            "parameters": members[0]["parameters"], "epochs": members[0]["epochs"],
            "train_seconds": round(float(np.mean([row["train_seconds"] for row in members])), 1),
        })  # fmt: skip
    return found


def compare_orders(what: str, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, epochs: int) -> Path | None:
    """The paired comparison of the orders that have all their seeds, of shapes or parts: the path of its CSV file."""
    from mamba_zoo.tasks import compare
    from mamba_zoo.tasks.registry import find_task

    model, task = {
        "shapes": ("pointmamba_mini", "point-classification"),
        "parts": ("pointmamba_mini_parts", "part-segmentation"),
    }[what]
    mine = {
        (row["order"], row["seed"]): row
        for row in rows
        if (row["what"], row["model"], row["start"]) == (what, model, "scratch")
    }
    whole = [order for order in (*ORDERS, *CONTROLS) if all((order, s) in mine for s in range(args.seeds))]
    if REFERENCE not in whole or len(whole) < 2:
        return None

    def trained(spec: str, seed: int, folder: Path) -> dict[str, Any]:
        row = mine["random" if spec.startswith("random(") else spec, seed]
        return {row["metric"]: row["score"], "items": row["items"], "parameters": row["parameters"],
                "seconds": row["train_seconds"]}  # fmt: skip

    folder = args.out / "orders" / what
    shutil.rmtree(folder, ignore_errors=True)
    comparison = compare.orders(
        model, str(args.data.name), [o for o in whole if o not in CONTROLS], args.seeds, epochs, folder,
        [o for o in whole if o in CONTROLS], metric=find_task(task).model_class.metric(), train=trained, task=task,
        progress=False,
    )  # fmt: skip
    for sentence in comparison.verdict:
        sys.stdout.write(f"{what}: {sentence}\n")
    return folder / "summary.csv"


def write(path: Path, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    """CSV, its first line saying where it was made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    where = f"# {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}; torch {torch.__version__}; {command}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(where + "\n")
        keys = [key for key in rows[0] if key != "items"]
        writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="labeled_psb_2048.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/points"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60, help="of classification; each is 5 passes")
    parser.add_argument("--part-epochs", type=int, default=50, help="of part segmentation; each is 4 passes")
    parser.add_argument("--pretraining-epochs", type=int, default=40)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="runs whose name holds this text, such as shapes or dgcnn")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--quick", action="store_true", help="tiny models and one epoch: whether it works at all")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    epochs = {"shapes": args.epochs, "parts": args.part_epochs, "pretraining": args.pretraining_epochs}
    if args.quick:
        args.seeds, epochs = 1, dict.fromkeys(epochs, 1)
    try:
        import torch_geometric  # noqa: F401
    except ModuleNotFoundError:
        sys.stdout.write("without torch_geometric there are no baselines\n")
        baselines = False
    else:
        baselines = True
    jobs = [job for job in plan(args.seeds, baselines) if args.only is None or args.only in job.folder]
    if not jobs:
        parser.error(f"no run holds {args.only!r}")
    rows = run_all(jobs, args, epochs)
    if not rows:
        return 1
    command = "python -m benchmarks.points " + " ".join(a for a in sys.argv[1:] if not a.startswith("/"))
    suffix = f"_{args.only}" if args.only else ""
    write(args.results / f"points_runs{suffix}.csv", rows, command)
    table = summary(rows)
    write(args.results / f"points_summary{suffix}.csv", table, command)
    for row in table:
        sys.stdout.write("  ".join(f"{key}={value}" for key, value in row.items() if value != "") + "\n")
    for what, name in (("shapes", "points_orders.csv"), ("parts", "points_orders_parts.csv")):
        orders = compare_orders(what, rows, args, epochs[what])
        if orders is not None:
            shutil.copy(orders, args.results / name)
    return 0 if len(rows) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())

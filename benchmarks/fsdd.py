"""Train on spoken digits: `python -m benchmarks.fsdd --root free-spoken-digit-dataset [--jobs 8] [--minutes 9]`.

Every model, with the recipe `fsdd`, on the official split and on each of the six speakers, who then is heard in no
training recording; three seeds each. Test accuracy is that of the weights after the last epoch (their average, as the
recipe says): nothing is chosen by the test recordings, and validation uses none of them. Runs are stored one by one and
are not repeated; the tables are written again after each. With --jobs, so many processes train side by side.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
OFFICIAL = "official"
# Width of the plain network so that it has as many parameters as the others.
OPTIONS: dict[str, dict[str, Any]] = {
    "aum_mini": {},
    "spectrogram_cnn": {"options": {"dim": 24}, "drop_path_rate": None},
    "spectrogram_transformer": {},
}
MACHINE = "machine.json"  # where a run was trained, which need not be where the tables are written
RUNS_CSV, SUMMARY_CSV = "fsdd_runs.csv", "fsdd_summary.csv"


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    split: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model}-{self.split}-{self.seed}"


def main() -> int:
    """Do what is missing, side by side if asked."""
    args = _arguments()
    if args.only:
        _in_turn([Run(*_parts(name)) for name in args.only], args)
        return 0
    runs = [Run(model, split, seed) for model in args.models for seed in args.seeds for split in args.splits]
    left = [run for run in runs if not (args.runs / run.name / "metrics.json").exists()]
    sys.stdout.write(f"{len(runs)} runs, {len(left)} to do, {args.jobs} at a time\n")
    sys.stdout.flush()
    failed = _side_by_side(left, args) if args.jobs > 1 else _in_turn(left, args)
    write_tables(args)
    return 1 if failed else 0


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test one model; a finished run is read."""
    from mamba_zoo.tasks.audio_data import AudioData
    from mamba_zoo.tasks.train import train_once

    recipe = _recipe()
    data_options = {**recipe["data"], "root": str(args.root)}
    data_options["test_speaker"] = None if run.split == OFFICIAL else run.split
    given = {**recipe["model"], **OPTIONS.get(run.model, {})}
    model = {key: value for key, value in given.items() if key != "name" and value is not None}
    trainer = {key: value for key, value in recipe["trainer"].items() if key != "max_epochs"}
    result = train_once(
        run.model,
        AudioData(**data_options),
        args.runs / run.name,
        seed=run.seed,
        max_epochs=args.epochs or recipe["trainer"]["max_epochs"],
        model=model,
        trainer={**trainer, **({"precision": args.precision} if args.precision else {})},
    )
    for path in (args.runs / run.name).glob("*.ckpt"):
        path.unlink()
    trained_on = args.runs / run.name / MACHINE
    if not trained_on.exists():
        trained_on.write_text(json.dumps(_versions()))
    sys.stdout.write(f"{run.name}: {result['accuracy']:.4f} in {result['seconds']:.0f} s\n")
    sys.stdout.flush()
    return result


def write_tables(args: argparse.Namespace) -> None:
    """One row a run, and one row a model and kind of split with mean and deviation over seeds."""
    rows = []
    for path in sorted(args.runs.glob("*/metrics.json")):
        result = json.loads(path.read_text())
        settings, trained_on = result["settings"], path.with_name(MACHINE)
        rows.append(
            {
                "model": settings["name"],
                "split": settings["data"]["test_speaker"] or OFFICIAL,
                "seed": settings["seed"],
                "accuracy": round(result["accuracy"], 4),
                "epochs": settings["max_epochs"],
                "parameters": result["parameters"],
                "seconds": round(result["seconds"], 1),
                **(json.loads(trained_on.read_text()) if trained_on.exists() else dict.fromkeys(_versions(), "")),
            }
        )
    if not rows:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    _write(args.out / RUNS_CSV, rows)
    summary = []
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        for kind, splits in ((OFFICIAL, (OFFICIAL,)), ("leave-one-speaker-out", SPEAKERS)):
            # The score of a seed is the mean over all speakers; a seed that lacks one has none.
            by_seed = {
                seed: [row["accuracy"] for row in own if row["seed"] == seed and row["split"] in splits]
                for seed in sorted({row["seed"] for row in own})
            }
            complete = [statistics.fmean(found) for found in by_seed.values() if len(found) == len(splits)]
            if complete:
                summary.append(
                    {
                        "model": model,
                        "split": kind,
                        "seeds": len(complete),
                        "accuracy": round(statistics.fmean(complete), 4),
                        "deviation": round(statistics.stdev(complete), 4) if len(complete) > 1 else "",
                        "lowest": round(min(complete), 4),
                        "parameters": own[0]["parameters"],
                    }
                )
    if summary:
        _write(args.out / SUMMARY_CSV, summary)
        for row in summary:
            sys.stdout.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")


def _in_turn(runs: list[Run], args: argparse.Namespace) -> int:
    """Train one after another, as far as the time reaches."""
    started = time.monotonic()
    for run in runs:
        if args.minutes and time.monotonic() - started > args.minutes * 60:
            break
        train(run, args)
        if not args.only:
            write_tables(args)
    return 0


def _side_by_side(runs: list[Run], args: argparse.Namespace) -> int:
    """Share the runs among processes; returns how many of these failed. What was cut off goes on the next time."""
    flags = ["--root", str(args.root), "--runs", str(args.runs)]
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    flags += ["--precision", args.precision] if args.precision else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fsdd", *flags, "--only", *(run.name for run in share)], env=environment
        )
        for i in range(args.jobs)
        if (share := runs[i :: args.jobs])
    ]
    until = time.monotonic() + (args.minutes or math.inf) * 60
    while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
        time.sleep(1)
    late = [worker for worker in workers if worker.poll() is None]
    for worker in late:
        worker.terminate()
    for worker in late:
        worker.wait()
    if late:
        sys.stdout.write("out of time; the same command goes on where this ended\n")
    return sum(worker.returncode != 0 for worker in workers if worker not in late)


def _parts(name: str) -> tuple[str, str, int]:
    model, split, seed = name.rsplit("-", 2)
    return model, split, int(seed)


def _recipe() -> dict[str, Any]:
    import yaml

    from mamba_zoo.tasks.recipes import shipped

    return yaml.safe_load(shipped()["fsdd"].read_text(encoding="utf-8"))


def _versions() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.fsdd", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the Free Spoken Digit Dataset")
    parser.add_argument("--models", type=_words, default=tuple(OPTIONS), help="with commas (default: all)")
    parser.add_argument("--splits", type=_words, default=(OFFICIAL, *SPEAKERS), help="official and speakers")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--precision", help="as for Lightning's Trainer, such as bf16-mixed (default: float32)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--runs", type=Path, default=Path("runs/fsdd"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the tables")
    parser.add_argument("--only", nargs="+", metavar="MODEL-SPLIT-SEED", help="train these and write no table")
    return parser.parse_args()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())

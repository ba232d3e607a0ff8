"""Train on mixtures of spoken digits: `python -m benchmarks.speech --root free-spoken-digit-dataset [--jobs 4]`.

Enhancement and separation with the recipes `enhancement_fsdd` and `separation_fsdd`, the small models of the zoo beside
a network of convolutions and one of attention of about the same number of parameters, three seeds each. The score is
the improvement of SI-SDR over the mixture, of the weights after the last epoch, on test mixtures that are always the
same. Runs are stored one by one and are not repeated; the tables are written again after each.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One line of the tables."""

    task: str
    label: str
    model: str
    options: dict[str, Any]
    lr: float


# Widths chosen for about as many parameters as the model above; rates by the usual values of each architecture.
ENTRIES = [
    Entry("enhancement", "semamba_mini", "semamba_mini", {}, 3e-3),
    Entry("enhancement", "semamba_mini, causal", "semamba_mini", {"causal": True}, 3e-3),
    Entry("enhancement", "convolutions", "conv_mask", {"dim": 40, "depth": 6}, 3e-3),
    Entry("enhancement", "attention", "transformer_mask", {"dim": 44, "depth": 3}, 2e-3),
    Entry("separation", "spmamba_mini", "spmamba_mini", {}, 2e-3),
    Entry("separation", "convolutions", "conv_mask", {"dim": 48, "depth": 8}, 3e-3),
    Entry("separation", "attention", "transformer_mask", {"dim": 60, "depth": 3}, 2e-3),
]
RUNS_CSV, SUMMARY_CSV = "speech_fsdd_runs.csv", "speech_fsdd_summary.csv"


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet, and write the tables."""
    args = _arguments(arguments)
    entries = [e for e in ENTRIES if e.task in args.tasks and (not args.only or args.only in e.label)]
    left = [(e, s) for s in args.seeds for e in entries if not (folder(args.runs, e, s) / "metrics.json").exists()]
    sys.stdout.write(f"{len(entries) * len(args.seeds)} runs, {len(left)} to do, {args.jobs} at a time\n")
    started, failed = time.monotonic(), 0
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(train, entry, seed, args): (entry, seed) for entry, seed in left}
        for done in as_completed(waiting):
            entry, seed = waiting[done]
            if error := done.exception():
                failed += 1
                sys.stdout.write(f"{entry.task} {entry.label} {seed}: {error}\n")
            else:
                result = done.result()
                sys.stdout.write(f"{entry.task} {entry.label} {seed}: {result['si_sdri']:.2f} dB, ")
                sys.stdout.write(f"{result['seconds']:.0f} s of {time.monotonic() - started:.0f}\n")
            sys.stdout.flush()
            write_tables(entries, args)
    write_tables(entries, args)
    if args.pictures and not failed:
        for task in args.tasks:
            picture(next(e for e in entries if e.task == task), args)
    return 1 if failed else 0


def folder(runs: Path, entry: Entry, seed: int) -> Path:
    """Of a run."""
    return runs / f"{entry.task}-{entry.label.replace(', ', '_')}-{seed}"


def train(entry: Entry, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test one model."""
    import torch

    from mamba_zoo.tasks.train import train_once

    torch.set_float32_matmul_precision("high")
    recipe = _recipe(entry.task)
    trainer = {key: value for key, value in recipe["trainer"].items() if key != "max_epochs"}
    model = {key: value for key, value in recipe["model"].items() if key != "name"}
    return train_once(
        entry.model,
        _data(entry.task, args),
        folder(args.runs, entry, seed),
        seed=seed,
        max_epochs=args.epochs or recipe["trainer"]["max_epochs"],
        model={**model, "lr": entry.lr, "options": entry.options},
        trainer=trainer,
        task=f"speech-{entry.task}",
    )


def picture(entry: Entry, args: argparse.Namespace) -> None:
    """The first test mixture before and after the model of the first seed, as spectrograms."""
    import torch
    from torchmetrics.functional.audio import permutation_invariant_training
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as best

    from mamba_zoo.tasks.registry import load_task
    from mamba_zoo.tasks.speech_figures import plot_spectrograms

    model: Any = load_task(folder(args.runs, entry, args.seeds[0]) / "last.ckpt")
    mixture, voices = _data(entry.task, args).split("test")[0]
    with torch.inference_mode():
        out = model.inference_net(mixture[None]).view(-1, len(mixture))
    order = permutation_invariant_training(out[None], voices[None], best, "speaker-wise")[1][0].tolist()
    signals = {"mixture": mixture.numpy()}
    for i, (j, voice) in enumerate(zip(order, voices, strict=True)):
        signals |= {f"{entry.label}, voice {i + 1}": out[j].numpy(), f"voice {i + 1}, clean": voice.numpy()}
    plot_spectrograms(signals, model.sample_rate, args.out / f"speech_{entry.task}.png")


def write_tables(entries: list[Entry], args: argparse.Namespace) -> None:
    """One row a run, and one a model with mean and deviation over seeds."""
    from mamba_zoo.tasks.environment import machine

    rows, summary = [], []
    for entry in entries:
        own = []
        for seed in args.seeds:
            path = folder(args.runs, entry, seed) / "metrics.json"
            if not path.exists():
                continue
            result = json.loads(path.read_text())
            own.append(
                {
                    "task": entry.task,
                    "model": entry.label,
                    "seed": seed,
                    "si_sdri": round(result["si_sdri"], 3),
                    "si_sdr": round(result["test"]["si_sdr"], 3),
                    "parameters": result["parameters"],
                    "epochs": result["settings"]["max_epochs"],
                    "mixtures_an_epoch": result["settings"]["data"]["train_mixtures"],
                    "seconds": round(result["seconds"], 1),
                    "peak_memory_mb": round((result["peak_memory_bytes"] or 0) / 2**20) or "",
                }
            )
        rows += own
        if own:
            scores = [row["si_sdri"] for row in own]
            summary.append(
                {
                    "task": entry.task,
                    "model": entry.label,
                    "seeds": len(own),
                    "si_sdri": round(statistics.fmean(scores), 2),
                    "deviation": round(statistics.stdev(scores), 2) if len(own) > 1 else "",
                    "lowest": min(scores),
                    "parameters": own[0]["parameters"],
                    "seconds": round(statistics.fmean(row["seconds"] for row in own), 1),
                }
            )
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    command = f"python -m benchmarks.speech --root DIR --jobs {args.jobs}"
    for name, table in ((RUNS_CSV, rows), (SUMMARY_CSV, summary)):
        if table:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / name).open("w", newline="") as file:
                file.write(f"# {where} ({args.jobs} runs at once); {command}\n")
                writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(table)


def _data(task: str, args: argparse.Namespace) -> Any:
    from mamba_zoo.tasks.speech_data import EnhancementData, SeparationData

    settings = {**_recipe(task)["data"], "root": str(_recordings(args.root)), "num_workers": args.workers}
    if args.mixtures:
        settings["train_mixtures"] = args.mixtures
    return (EnhancementData if task == "enhancement" else SeparationData)(**settings)


def _recordings(root: Path) -> Path:
    inner = root / "recordings"
    return inner if inner.is_dir() else root


def _recipe(task: str) -> dict[str, Any]:
    import yaml

    from mamba_zoo.tasks.recipes import shipped

    return yaml.safe_load(shipped()[f"{task}_fsdd"].read_text(encoding="utf-8"))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the Free Spoken Digit Dataset")
    parser.add_argument(
        "--tasks", nargs="+", choices=("enhancement", "separation"), default=["enhancement", "separation"]
    )
    parser.add_argument("--only", help="part of a label")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--mixtures", type=int, help="training mixtures an epoch; default: the recipe's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    # A mixture takes 0.3 to 0.7 ms; starting a process for every pass over the data took 13 s on a host of four GPUs.
    parser.add_argument("--workers", type=int, default=0, help="processes that make mixtures; 0: the training itself")
    parser.add_argument("--runs", type=Path, default=Path("runs/speech"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

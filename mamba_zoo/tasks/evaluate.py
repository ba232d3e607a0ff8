"""`mamba-zoo test` and `mamba-zoo predict`: a trained model of any task on labelled and on new data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .checkpoints import read_checkpoint, write_atomically
from .registry import find_task, load_task, task_of
from .running import quiet, quiet_trainer


def test_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo test`."""
    parser = argparse.ArgumentParser("mamba-zoo test", description="Score a trained model on labelled data.")
    _common(parser)
    parser.add_argument(
        "--data",
        help="data as in fit (for images also a folder of class folders, of which every image is scored); default: "
        "those it was trained on",
    )
    parser.add_argument("--split", choices=("test", "val"), default="test", help="part to score (default: test)")
    parser.add_argument("--out", type=Path, help="folder of test.json and pictures; default: that of the checkpoint")
    args = parser.parse_args(argv)
    model = load_task(args.checkpoint)
    settings = dict(read_checkpoint(args.checkpoint).get("datamodule_hyper_parameters", {}))
    if not settings and not args.data:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on; give --data")
    kind = find_task(task_of(type(model)) or "").data_class
    # Runs of earlier versions stored arguments that only a parent of their class takes.
    data = kind(**kind.own_settings(settings | ({"root": args.data} if args.data else {})))
    items = data.scored(model, args.split, other=args.data is not None)
    with quiet():
        loader = data.loader(items, args.batch_size, args.num_workers)
        scores = quiet_trainer(args.device).test(model, loader, verbose=False)[0]
    count = data.count(items)
    metrics = {key.partition("/")[2]: value for key, value in scores.items()} | {model.unit: count}
    out = args.out or _run_folder(args.checkpoint)
    write_atomically(out / "test.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    files = ["test.json", *model.write_test_artifacts(out)]
    table = Table(title=f"{model.name}: {count:,} {model.unit}", show_header=False, title_justify="left")
    named = [key for key in model.metric_names if key in metrics]
    for key in (*named, *(key for key in metrics if key not in named and key != model.unit)):
        table.add_row(model.metric_names.get(key, key), f"{metrics[key]:.4f}")
    table.add_row("files", f"{out}: {', '.join(files)}")
    Console().print(table, soft_wrap=True)
    return 0


def predict_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo predict`."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    first.add_argument("--checkpoint", type=Path)
    found = first.parse_known_args(argv)[0].checkpoint
    parser = argparse.ArgumentParser(
        "mamba-zoo predict",
        description="Apply a trained model to new data.",
        epilog=None
        if found
        else "With --checkpoint RUN, --help also shows the flags of the task that RUN was trained for.",
    )
    _common(parser, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a file, or a folder searched for files")
    parser.add_argument(
        "--out", type=Path, help="file or folder of the result; default: predictions.csv or predictions/"
    )
    model = load_task(found) if found else None
    if model is not None:
        model.predict_arguments(parser)
    args = parser.parse_args(argv)
    assert model is not None  # the parser ends without --checkpoint
    with torch.no_grad():
        done = model.predict_files(args)
    Console().print(done, soft_wrap=True, highlight=False)
    return 0


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _common(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=required,
        help="best.ckpt or last.ckpt of a run, or its folder for the best one",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="items at a time (default: 64)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read files (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "mps"), default="auto", help="default: auto")

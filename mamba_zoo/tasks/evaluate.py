"""`mamba-zoo test` and `mamba-zoo predict`: a trained model of any task on labelled and on new data."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        help="other data, as in fit, scaled as the training data were; of a table, class folders or graphs without "
        "parts of their own, all is scored; default: the data it was trained on",
    )
    parser.add_argument("--split", choices=("test", "val"), help="part to score (default: test)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of test.json and pictures, called test-DATA-SPLIT for other data or splits; default: that of the "
        "checkpoint",
    )
    args = parser.parse_args(argv)
    model = load_task(args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint)
    settings = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    if not settings and not args.data:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on; give --data")
    other = args.data is not None and not _same(args.data, settings.get("root"))
    kind = find_task(task_of(type(model)) or "").data_class
    # Runs of earlier versions stored arguments that only a parent of their class takes.
    data = kind(**kind.own_settings(settings | ({"root": args.data} if other else {})))
    if not other:
        data.restore(checkpoint)
    if args.split and other and data.undivided():
        raise ValueError(
            f"--split {args.split} has no effect: {args.data} comes without parts, and all of it is scored; leave "
            "--split out"
        )
    items = data.scored(model, args.split or "test", other)
    with quiet():
        loader = data.loader(items, args.batch_size, args.num_workers)
        scores = quiet_trainer(args.device).test(model, loader, verbose=False)[0]
    count = data.count(items)
    metrics = {key.partition("/")[2]: value for key, value in scores.items()} | {model.unit: count}
    split = "all" if other and data.undivided() else data.scored_part(args.split or "test")
    source = {"data": data.root, "split": split, "checkpoint": str(args.checkpoint)}
    out = args.out or _run_folder(args.checkpoint)
    name = "test"
    if other or args.split == "val":
        name = f"test-{re.sub(r'[^A-Za-z0-9_.-]+', '_', Path(data.root).name)}-{split}"
    write_atomically(out / f"{name}.json", lambda f: f.write(json.dumps(metrics | source, indent=1).encode()))
    pictures = out if name == "test" else out / name
    pictures.mkdir(exist_ok=True)
    within = "" if name == "test" else f"{name}/"
    files = [f"{name}.json", *(within + file for file in model.write_test_artifacts(pictures))]
    title = f"{model.name}: {count:,} {model.unit} of {data.root} ({split})"
    table = Table(title=title, show_header=False, title_justify="left")
    named = [key for key in model.metric_names if key in metrics]
    for key in (*named, *(key for key in metrics if key not in named and key != model.unit)):
        table.add_row(model.metric_names.get(key, key), f"{metrics[key]:.4f}")
    for row in data.notes():
        table.add_row(*row)
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


def _same(root: str, trained: Any) -> bool:
    """Whether two names of data mean the same, files by whatever path."""
    paths = [Path(name).expanduser() for name in (root, str(trained))]
    return root == trained or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


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

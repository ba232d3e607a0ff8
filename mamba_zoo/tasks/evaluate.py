"""`mamba-zoo test` and `mamba-zoo predict`: a trained model on labelled and on unlabelled images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from .checkpoints import read_checkpoint, write_atomically
from .classification import ImageClassifier
from .image_data import ImageData
from .image_files import BadImageError, Images, list_images, read_classes, split_folders
from .image_transforms import Preprocess, eval_transform
from .running import quiet, write_csv
from .summary import plot_confusion

_TOP = 5


def test_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo test`."""
    parser = argparse.ArgumentParser("mamba-zoo test", description="Score a trained model on labelled images.")
    _common(parser)
    parser.add_argument(
        "--data",
        help="data set as in fit, or a folder of class folders, of which every image is scored; default: the data it "
        "was trained on",
    )
    parser.add_argument("--split", choices=("test", "val"), default="test", help="part to score (default: test)")
    parser.add_argument(
        "--out", type=Path, help="folder of test.json and confusion.png; default: that of the checkpoint"
    )
    args = parser.parse_args(argv)
    model = ImageClassifier.from_checkpoint(args.checkpoint)
    images = _labelled(model, args)
    with quiet():
        trainer = Trainer(
            accelerator=args.device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        scores = trainer.test(model, _loader(images, args), verbose=False)[0]
    metrics = {key.partition("/")[2]: value for key, value in scores.items()} | {"images": len(images)}
    out = args.out or _run_folder(args.checkpoint)
    write_atomically(out / "test.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    plot_confusion(model.confusion.compute().cpu().numpy(), model.class_names, out / "confusion.png")
    table = Table(title=f"{model.name}: {len(images):,} images", show_header=False, title_justify="left")
    for key, meaning in _MEANING.items():
        if key in metrics:
            table.add_row(meaning, f"{metrics[key]:.4f}")
    table.add_row("files", f"{out}: test.json, confusion.png")
    Console().print(table, soft_wrap=True)
    return 0


def predict_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo predict`."""
    parser = argparse.ArgumentParser("mamba-zoo predict", description="Classify images into a CSV file.")
    _common(parser)
    parser.add_argument("--data", type=Path, required=True, help="an image, or a folder searched for images")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="default: predictions.csv")
    parser.add_argument("--top", type=int, default=_TOP, help=f"classes to list for each image (default: {_TOP})")
    parser.add_argument(
        "--on-bad-image", choices=("error", "skip"), default="error", help="what an unreadable file does"
    )
    args = parser.parse_args(argv)
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    model = ImageClassifier.from_checkpoint(args.checkpoint)
    paths = [args.data] if args.data.is_file() else list_images(args.data)
    skipped: list[Path] = []
    if args.on_bad_image == "skip":
        from .image_files import drop_unreadable

        paths, _, skipped = drop_unreadable(paths, [0] * len(paths))
        if not paths:
            raise BadImageError(f"none of the {len(skipped)} images of {args.data} can be read")
    probabilities = predict_files(model, paths, args.batch_size, args.num_workers, args.device)
    rows = [_row(path, p, model.class_names, args.top) for path, p in zip(paths, probabilities, strict=True)]
    write_csv(args.out, rows)
    left_out = f"; {len(skipped)} unreadable files left out, the first is {skipped[0]}" if skipped else ""
    Console().print(f"{len(rows):,} images -> {args.out}{left_out}", soft_wrap=True, highlight=False)
    return 0


def predict_files(
    model: ImageClassifier, paths: Sequence[Path], batch_size: int = 64, num_workers: int = 0, device: str = "auto"
) -> Tensor:
    """Class probabilities `(images, classes)` of image files, float32 on the CPU.

    Args:
        model: From `ImageClassifier.from_checkpoint`.
        paths: Files.
        batch_size: Images at a time.
        num_workers: Reading processes.
        device: "auto", "cpu" or "gpu".

    Raises:
        BadImageError: a file that cannot be read.
    """
    images = _images(model, paths, [0] * len(paths))
    with quiet():
        trainer = Trainer(
            accelerator=device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers)
        batches: Any = trainer.predict(model, loader)
    return torch.cat(batches)


def _row(path: Path, probabilities: Tensor, names: Sequence[str], top: int) -> dict[str, Any]:
    values, indices = probabilities.topk(min(top, len(names)))
    row: dict[str, Any] = {"file": str(path)}
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True), start=1):
        suffix = "" if rank == 1 else f"_{rank}"
        row |= {f"predicted{suffix}": names[index], f"probability{suffix}": f"{value:.6f}"}
    return row


def _images(model: ImageClassifier, items: Sequence[Any], targets: Sequence[int]) -> Images:
    stored = model.hparams["preprocess"]
    if stored is None:
        raise ValueError(
            "the checkpoint does not say how its images were prepared; train with ImageClassifier(preprocess=)"
        )
    preprocess = Preprocess.from_dict(stored)
    return Images(items, targets, "L" if preprocess.in_chans == 1 else "RGB", eval_transform(preprocess))


def _labelled(model: ImageClassifier, args: argparse.Namespace) -> Images:
    """The images to score, prepared as the checkpoint says, with classes that agree."""
    if args.data and Path(args.data).is_dir() and not split_folders(Path(args.data)):
        paths, targets, _ = read_classes(Path(args.data), model.class_names)
        return _images(model, paths, targets)
    settings = dict(read_checkpoint(args.checkpoint).get("datamodule_hyper_parameters", {}))
    if not settings and not args.data:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on; give --data")
    data = ImageData(**(settings | ({"root": args.data} if args.data else {})))
    if data.classes != model.class_names:
        raise ValueError(
            f"the classes of {data.root} ({', '.join(data.classes[:5])} ...) are not those of the checkpoint "
            f"({', '.join(model.class_names[:5])} ...)"
        )
    part = data.split(args.split)
    return _images(model, part.items, part.targets)


def _loader(images: Images, args: argparse.Namespace) -> DataLoader:
    return DataLoader(images, batch_size=args.batch_size, num_workers=args.num_workers)


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="best.ckpt or last.ckpt of a run, or its folder for the best one"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu", "mps"), default="auto", help="default: auto")


_MEANING = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "f1": "macro F1",
    "ece": "calibration error",
    "loss": "cross-entropy",
}

"""`mamba-zoo predict` for images: the classes of files, as CSV."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ._classifier import write_classes
from .image_data import prepared
from .image_files import BadImageError, drop_unreadable, list_images
from .running import quiet, quiet_trainer

if TYPE_CHECKING:
    from .classification import ImageClassifier

_TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this task."""
    parser.add_argument("--top", type=int, default=_TOP, help=f"classes to list for each image (default: {_TOP})")
    parser.add_argument(
        "--on-bad-image", choices=("error", "skip"), default="error", help="what an unreadable file does"
    )


def predict_csv(model: ImageClassifier, args: argparse.Namespace) -> str:
    """Write the likeliest classes of each image, by default into `predictions.csv`, here or in the folder `out`.

    Raises:
        ValueError: `top` below 1.
        BadImageError: a file that cannot be read, or none that can.
        FileNotFoundError: no such folder, or no image in it.
    """
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    out = args.out or Path("predictions.csv")
    if out.is_dir():
        out /= "predictions.csv"
    paths = [args.data] if args.data.is_file() else list_images(args.data)
    skipped: list[Path] = []
    if args.on_bad_image == "skip":
        paths, _, skipped = drop_unreadable(paths, [0] * len(paths))
        if not paths:
            raise BadImageError(f"none of the {len(skipped)} images of {args.data} can be read")
    probabilities = predict_files(model, paths, args.batch_size, args.num_workers, args.device)
    write_classes(out, paths, probabilities, model.class_names, args.top)
    left_out = f"; {len(skipped)} unreadable files left out, the first is {skipped[0]}" if skipped else ""
    return f"{len(paths):,} images -> {out}{left_out}"


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
    images = prepared(model, paths, [0] * len(paths))
    with quiet():
        loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers)
        batches: Any = quiet_trainer(device).predict(model, loader)
    return torch.cat(batches)

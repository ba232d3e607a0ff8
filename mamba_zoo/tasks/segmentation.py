"""A class for every pixel: UPerNet and FPN heads on the feature maps of any backbone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from ._classifier import check_classes
from ._features import Dense, Maps, statistics_of
from ._segmentation_heads import FPNHead, UPerHead, resized
from ._task import Task
from .detection import picture_name
from .draw import draw_regions, save_picture
from .image_files import list_images, read_image
from .running import quiet, quiet_trainer, write_csv
from .segmentation_data import IGNORED, Regions, fitted
from .summary import plot_confusion

HEADS = ("upernet", "fpn")


class SegmenterNet(Dense):
    """Feature maps and a head.

    Args:
        maps: Feature maps.
        head: "upernet" or "fpn".
        num_classes: Outputs.
        width: Channels of the head.
        mean: Of the colours.
        std: Likewise.

    Raises:
        ValueError: an unknown head.
    """

    def __init__(
        self, maps: Maps, head: str, num_classes: int, width: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head!r} is unknown; choose one of {', '.join(HEADS)}")
        self.maps = maps
        if head == "upernet":
            self.head: nn.Module = UPerHead(maps.channels, num_classes, width)
        else:
            self.head = FPNHead(maps.channels, maps.strides, num_classes, width)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(b, 3, h, w)` from 0 to 1 to class scores `(b, num_classes, h, w)`, float32."""
        mean, std = cast(Tensor, self.mean), cast(Tensor, self.std)
        return resized(self.head(self.maps((x - mean) / std)).float(), x)


class Segmenter(Task):
    """A segmenter on a backbone of the zoo, scored by the mean intersection over union of the classes.

    Args:
        name: As in `mamba_zoo.list_models()`, or any model of timm that offers feature maps.
        scan: Scan order; None is the published one.
        head: "upernet", or "fpn", which is lighter.
        class_names: In the order of the class numbers.
        img_size: Height and width of the images, in pixels.
        out_indices: Which maps of the backbone, such as [0, 1, 2]; None takes its own choice.
        width: Channels of the head.
        options: Further arguments of the backbone, such as `{"patch_size": 2}`.
        pretrained: Start from the published weights of the backbone.
        checkpoint_path: Start from a published checkpoint file of the backbone. Not read when a checkpoint of a run is
            loaded.
        drop_path_rate: Stochastic depth; None is the model's own.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.

    Raises:
        ValueError: an unknown model or setting.
    """

    unit = "images"
    monitor, monitor_mode = "val/miou", "max"
    score_name, percent = "mIoU", True
    curves: ClassVar[tuple[str, ...]] = ("val/miou", "val/accuracy")
    metric_names: ClassVar[Mapping[str, str]] = {
        "miou": "mean IoU",
        "accuracy": "pixel accuracy",
        "loss": "cross-entropy",
    }

    def __init__(
        self,
        name: str = "vmamba_mini",
        scan: str | None = None,
        head: Literal["upernet", "fpn"] = "upernet",
        class_names: list[str] | None = None,
        img_size: int | None = None,
        out_indices: list[int] | None = None,
        width: int = 256,
        options: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_path_rate: float | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        class_names = class_names or [str(i) for i in range(2)]
        count = len(check_classes(len(class_names), class_names))
        maps = Maps(name, scan, img_size, pretrained, checkpoint_path, drop_path_rate, out_indices, options)
        net = SegmenterNet(maps, head, count, width, *statistics_of(name))
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.save_hyperparameters()
        self.class_names = class_names
        self.val_confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORED)
        self.test_confusion = MulticlassConfusionMatrix(count, ignore_index=IGNORED)
        self._tested: list[Tensor] = []
        self._counts: np.ndarray | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the pixels of one batch."""
        loss = self._loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Metrics of one batch."""
        self._evaluate(batch, "val", self.val_confusion)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Metrics of one batch, and the score of every image."""
        found = self._evaluate(batch, "test", self.test_confusion)
        for one, y in zip(found, batch[1], strict=True):
            known = y != IGNORED
            pairs = y[known] * len(self.class_names) + one[known]
            counts = torch.bincount(pairs, minlength=len(self.class_names) ** 2)
            self._tested.append(mean_iou(counts.view(len(self.class_names), -1)).cpu())

    def on_validation_epoch_end(self) -> None:
        """Score the counts of the epoch."""
        self._score("val", self.val_confusion)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._tested.clear()

    def on_test_epoch_end(self) -> None:
        """Score the counts of the test."""
        self._counts = self._score("test", self.test_confusion)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class numbers `(b, h, w)`."""
        return self.inference_net(batch[0]).argmax(1)

    @property
    def test_items(self) -> np.ndarray | None:
        """Mean IoU of every image that this process tested."""
        return torch.stack(self._tested).double().numpy() if self._tested else None

    def write_test_artifacts(self, out: Path) -> list[str]:
        """The IoU of every class as `classes.csv`, and the confusion of pixels as a picture."""
        if self._counts is None:
            return []
        counts = self._counts
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        rows = [
            {"class": name, "pixels": int(total), "iou": f"{hit / whole:.4f}" if whole else ""}
            for name, total, hit, whole in zip(self.class_names, counts.sum(1), counts.diagonal(), union, strict=True)
        ]
        write_csv(out / "classes.csv", rows)
        plot_confusion(counts, self.class_names, out / "confusion.png", numbers=False)
        return ["classes.csv", "confusion.png"]

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Whether pictures are drawn."""
        parser.add_argument("--no-pictures", action="store_true", help="write masks only")

    def predict_files(self, args: argparse.Namespace) -> str:
        """A mask of class numbers for each image, and a picture of it, by default in the folder `predictions`.

        Raises:
            FileNotFoundError: no such folder, or no image in it.
        """
        out = args.out or Path("predictions")
        paths = [args.data] if args.data.is_file() else list_images(args.data)
        size = self.hparams["img_size"] or 512
        data = Regions(paths, _unlabelled, size)
        loader = DataLoader(data, batch_size=min(args.batch_size, 16), num_workers=args.num_workers)
        with quiet():
            batches: Any = quiet_trainer(args.device).predict(self, loader)
        for path, found in zip(paths, torch.cat(batches), strict=True):
            image, name = read_image(path, "RGB"), picture_name(path, args.data, out)
            inside = fitted(image, size).size
            mask = Image.fromarray(found.cpu().numpy()[: inside[1], : inside[0]].astype(np.uint8))
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            save_picture(mask, out / "masks" / name)
            if not args.no_pictures:
                save_picture(draw_regions(image, np.asarray(mask), self.class_names, self._ground), out / name)
        return f"{len(paths):,} images -> {out}"

    @property
    def _ground(self) -> int | None:
        """The class that pictures leave untinted."""
        return 0 if self.class_names[0] in ("background", "unlabelled", "unlabeled", "none") else None

    def _loss(self, scores: Tensor, y: Tensor) -> Tensor:
        total = F.cross_entropy(scores, y, ignore_index=IGNORED, reduction="sum")
        return total / (y != IGNORED).sum().clamp_min(1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, confusion: MulticlassConfusionMatrix) -> Tensor:
        x, y = batch
        scores = self.inference_net(x)
        found = scores.argmax(1)
        confusion.update(found, y)
        self.log(f"{split}/loss", self._loss(scores, y), on_epoch=True, batch_size=len(x), sync_dist=True)
        return found

    def _score(self, split: str, confusion: MulticlassConfusionMatrix) -> np.ndarray:
        counts = confusion.compute()
        confusion.reset()
        self.log(f"{split}/miou", mean_iou(counts))
        self.log(f"{split}/accuracy", counts.diagonal().sum() / counts.sum().clamp_min(1))
        return counts.cpu().numpy()


def mean_iou(counts: Tensor) -> Tensor:
    """Mean over the classes that occur of hits over hits, misses and false alarms.

    Args:
        counts: `(classes, classes)` pixels, true classes as rows.
    """
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return (hits[union > 0] / union[union > 0]).mean() if (union > 0).any() else torch.zeros((), device=counts.device)


def _unlabelled(path: Path) -> tuple[Image.Image, np.ndarray]:
    image = read_image(path, "RGB")
    return image, np.zeros((image.height, image.width), np.uint8)

"""A backbone of the zoo trained to name images."""

from __future__ import annotations

import argparse
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch import Tensor

from ._classifier import Classifier, check_classes
from .building import build_model, make_mixer


class ImageClassifier(Classifier):
    """A model of the zoo with its loss, metrics, optimizer and, if asked, an average of its weights.

    Every argument is stored in the checkpoint, which alone rebuilds the model, its classes and its preprocessing.

    Args:
        name: As in `mamba_zoo.list_models()`, or any model of timm.
        scan: Scan order; None is the published one.
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Height and width in pixels. Only models whose weights depend on it are told.
        pretrained: Start from the published weights.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
        drop_rate: Dropout before the head; None is the model's own.
        drop_path_rate: Stochastic depth; None is the model's own.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        label_smoothing: Probability spread over the other classes.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        ema_decay: See `Task`.
        freeze: See `Task`.
        class_names: In the order of the class numbers; None numbers them.
        preprocess: What `ImageData.preprocess` says, as a dictionary; stored for prediction.

    Raises:
        ValueError: an unknown model or setting, or images the model cannot take.
    """

    unit = "images"

    def __init__(
        self,
        name: str = "vmamba_mini",
        scan: str | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
        class_names: list[str] | None = None,
        preprocess: dict[str, Any] | None = None,
    ) -> None:
        class_names = check_classes(num_classes, class_names)
        net = build_model(
            name, scan, num_classes, in_chans, img_size, pretrained, checkpoint_path, drop_rate, drop_path_rate
        )
        super().__init__(
            net, name, num_classes, class_names, label_smoothing, opt, lr, weight_decay, layer_decay, recipe,
            warmup_epochs, min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.mix = make_mixer(mixup, cutmix, label_smoothing, num_classes)

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy, of mixed images if that was asked for."""
        if self.mix is None:
            return super().batch_loss(batch)
        x, y = batch
        even = len(x) - len(x) % 2  # timm's mixup pairs images; one without a partner stays as it is
        soft = mixup_target(y, self.mix.num_classes, smoothing=self.mix.label_smoothing)
        if even:
            mixed, soft[:even] = self.mix(x[:even], y[:even])
            x = torch.cat([mixed, x[even:]]) if even < len(x) else mixed
        return -(soft * F.log_softmax(self.net(x).float(), dim=-1)).sum(-1).mean()

    def on_fit_start(self) -> None:
        """Refuse batches whose images cannot be paired for mixing.

        Raises:
            ValueError: images are mixed, and the batch size is odd.
        """
        size = getattr(cast(Any, self.trainer).datamodule, "batch_size", 0)
        if self.mix is not None and size % 2:
            raise ValueError(f"batch_size={size} is odd, but mixup and cutmix pair images; use an even one")
        super().on_fit_start()

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """How many classes to list, and what unreadable files do."""
        from .image_predict import add_arguments

        add_arguments(parser)

    def predict_files(self, args: argparse.Namespace) -> str:
        """Class probabilities of image files, as CSV."""
        from .image_predict import predict_csv

        return predict_csv(self, args)

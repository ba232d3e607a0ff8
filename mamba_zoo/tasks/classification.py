"""A backbone of the zoo trained to name images."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from .building import build_model, classification_metrics, freeze_parts, make_mixer
from .checkpoints import read_checkpoint
from .optim import parameter_groups, warmup_cosine


class ImageClassifier(LightningModule):
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
        opt: Name of an optimizer of timm.
        lr: Highest learning rate.
        weight_decay: Of the parameters that are decayed; see `recipe`.
        layer_decay: Each layer learns this factor slower than the next one; None gives every layer `lr`.
        recipe: "recommended" decays neither state matrices, skips, step biases, norms, biases nor positions;
            "as-published" decays what the architecture's published training code decays.
        warmup_epochs: Epochs over which the rate rises linearly, fractions allowed.
        min_lr: Last rate as a part of `lr`.
        label_smoothing: Probability spread over the other classes.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        ema_decay: Decay of the average of the weights, which is then validated, tested and used for prediction; None
            is off. The average warms up: it is plain at first and reaches this decay with time.
        freeze: "backbone" trains the head only, "bn" fixes batch norms, "none" trains everything.
        class_names: In the order of the class numbers; None numbers them.
        preprocess: What `ImageData.preprocess` says, as a dictionary; stored for prediction.

    Raises:
        ValueError: an unknown model or setting, or images the model cannot take.
    """

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
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}; classification needs at least 2 classes")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names for num_classes={num_classes}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1, such as 0.999; None is off")
        class_names = class_names or [str(i) for i in range(num_classes)]
        self.save_hyperparameters()
        self.name, self.class_names = name, class_names
        self.opt, self.lr, self.weight_decay, self.layer_decay = opt, lr, weight_decay, layer_decay
        self.recipe, self.warmup_epochs, self.min_lr, self.ema_decay = recipe, warmup_epochs, min_lr, ema_decay
        self.net = build_model(
            name, scan, num_classes, in_chans, img_size, pretrained, checkpoint_path, drop_rate, drop_path_rate
        )
        self._frozen = freeze_parts(self.net, freeze)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.mix = make_mixer(mixup, cutmix, label_smoothing, num_classes)
        self.val_metrics = classification_metrics(num_classes, "val")
        self.test_metrics = classification_metrics(num_classes, "test")
        self.confusion = MulticlassConfusionMatrix(num_classes)
        # Outside the module tree: its eval mode and its copies of the parameters are nobody else's business.
        self._ema: list[Any] = []
        self._ema_step = 0
        self._tested: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> ImageClassifier:
        """The trained model of a run, in evaluation mode on the CPU; nothing is downloaded and no pickle is run.

        Args:
            path: A checkpoint of `mamba-zoo fit`, or the folder of the run for its best one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no such checkpoint.
        """
        checkpoint = read_checkpoint(path)
        values = checkpoint.get("hyper_parameters", {})
        if "name" not in values or "state_dict" not in checkpoint:
            raise ValueError(
                f"{path} is no checkpoint of mamba-zoo fit; published weights load with create_model(checkpoint_path=)"
            )
        model = cls(**{**values, "pretrained": False, "checkpoint_path": None})
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval()

    @property
    def inference_net(self) -> nn.Module:
        """The weights that are validated and saved for use: the average if there is one."""
        return self._ema[0].module if self._ema else self.net

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `(b, num_classes)` of images `(b, in_chans, height, width)`."""
        return self.net(x) if self.training else self.inference_net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        x, y = batch
        if self.mix is not None:
            even = len(x) - len(x) % 2  # timm's mixup pairs images
            x, soft = self.mix(x[:even], y[:even])
            loss = -(soft * F.log_softmax(self.net(x).float(), dim=-1)).sum(-1).mean()
        else:
            loss = self.loss(self.net(x).float(), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Metrics of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Metrics and confusion of one batch."""
        scores = self._evaluate(batch, "test")
        self.confusion.update(scores, batch[1])
        self._tested.append((batch[1].cpu(), scores.argmax(-1).cpu()))

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._tested.clear()
        self.confusion.reset()

    @property
    def test_predictions(self) -> tuple[Any, Any] | None:
        """Class numbers of the images tested by this process, true and predicted, in order; None before a test."""
        if not self._tested:
            return None
        target, predicted = (torch.cat(part).numpy() for part in zip(*self._tested, strict=True))
        return target, predicted

    def predict_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> Tensor:
        """Class probabilities `(b, num_classes)`, float32."""
        return self.inference_net(batch[0]).float().softmax(-1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        x, y = batch
        scores = self.inference_net(x).float()
        self.log(f"{split}/loss", F.cross_entropy(scores, y), on_epoch=True, batch_size=len(x), sync_dist=True)
        metrics = self.val_metrics if split == "val" else self.test_metrics
        metrics.update(scores, y)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(x))
        return scores

    def configure_optimizers(self) -> Any:
        """The optimizer over exempt and decayed parameters, and the rate of every step."""
        from timm.optim._optim_factory import create_optimizer_v2

        groups = parameter_groups(self.net, self.lr, self.weight_decay, self.layer_decay, self.recipe, self.name)
        optimizer = create_optimizer_v2(groups, opt=self.opt, lr=self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = total / max(self.trainer.max_epochs or 1, 1)
        factor = warmup_cosine(total, round(self.warmup_epochs * per_epoch), self.min_lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Start or continue the average of the weights."""
        if self.ema_decay is not None and not self._ema:
            self._make_ema()

    def on_train_epoch_start(self) -> None:
        """Keep frozen parts in evaluation mode: their statistics must not move either."""
        for part in self._frozen:
            part.eval()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average, once for each step of the optimizer."""
        if self._ema and self.trainer.global_step > self._ema_step:
            self._ema_step = self.trainer.global_step
            self._ema[0].update(self.net, step=self._ema_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the average beside the weights."""
        if self._ema:
            checkpoint["ema"] = self._ema[0].module.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint that has one."""
        if "ema" in checkpoint:
            self._make_ema()
            self._ema[0].module.load_state_dict(checkpoint["ema"])
            self._ema_step = int(checkpoint["global_step"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImageClassifier:
        """Moves and casts take the average along, which is no submodule: its keys would be saved twice."""
        for ema in self._ema:
            ema._apply(fn)
        return super()._apply(fn, recurse)

    def _make_ema(self) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self._ema[:] = [ModelEmaV3(self.net, decay=self.ema_decay or 0.999, use_warmup=True)]

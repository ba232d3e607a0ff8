"""Masked pre-training on clouds: patches of points are hidden, and a model fills them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import mamba_zoo

from ..backbones._points import chamfer_distance
from .point_augment import PointAugment, Rotation
from .points import Freeze, PointTask, Recipe, with_file


class PointPretrainer(PointTask):
    """A masked autoencoder of points, whose encoder then starts a classifier: `init_encoder` of `point-classification`.

    Args:
        name: "pointmamba_pretraining", "pointmamba_mini_pretraining", or another model whose output is its loss.
        scan: Order of the patches; None is the model's own.
        num_points: Points of a cloud that the model sees.
        options: Further arguments of the model, such as `{"mask_ratio": 0.8}`.
        checkpoint_path: Start from a published checkpoint file.
        scale: See `PointAugment`, as for what follows.
        translate: See `PointAugment`.
        rotate: See `PointAugment`.
        tilt: See `PointAugment`.
        flip: See `PointAugment`.
        jitter: See `PointAugment`.
        opt: See `Task`, as for all that follow.
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

    monitor, monitor_mode = "val/chamfer", "min"
    score_name: ClassVar[str] = "chamfer"
    metric_names: ClassVar[Mapping[str, str]] = {"chamfer": "Chamfer distance of hidden patches"}

    def __init__(
        self,
        name: str = "pointmamba_mini_pretraining",
        scan: str | None = None,
        num_points: int = 1024,
        options: dict[str, Any] | None = None,
        checkpoint_path: str | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        translate: float = 0.0,
        rotate: Rotation = "none",
        tilt: float = 0.0,
        flip: bool = False,
        jitter: float = 0.0,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        recipe: Recipe = "recommended",
        warmup_epochs: float = 5.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Freeze = "none",
    ) -> None:
        more = {**with_file(options, checkpoint_path), **({} if scan is None else {"scan": scan})}
        net = mamba_zoo.create_model(name, **more)
        if not hasattr(net, "reconstruct"):
            raise ValueError(f"{name} is no masked autoencoder; take pointmamba_pretraining or its mini form")
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        self.save_hyperparameters()
        self._set_points(num_points, PointAugment(scale, translate, rotate, tilt, flip, jitter))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.net(self.sample(batch[0])[0])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Distance for masks that are the same in every epoch."""
        self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Distance for fixed masks."""
        self._evaluate(batch, "test", batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The hidden patches of a batch, rebuilt: `(b, hidden, group_size, 3)`."""
        return self._rebuild(batch, batch_idx)[0]

    def _rebuild(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        x, net = self.sample(batch[0])[0], self.inference_net
        masks = torch.Generator().manual_seed(batch_idx)
        ranks = torch.rand(len(x), net.encoder.groups, generator=masks).argsort(1).argsort(1)  # type: ignore[union-attr]
        return net.reconstruct(x, 0, (ranks < net.masked).to(x.device))  # type: ignore[operator]

    def _evaluate(self, batch: Any, split: str, batch_idx: int) -> None:
        rebuilt, true = self._rebuild(batch, batch_idx)
        distance = chamfer_distance(rebuilt.flatten(0, 1).float(), true.flatten(0, 1).float())
        values = {f"{split}/chamfer": distance, f"{split}/loss": distance}
        self.log_dict(values, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)

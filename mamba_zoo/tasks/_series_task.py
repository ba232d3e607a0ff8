"""What tasks on windows of series share: the model, published learning rates, and the weights of the best epoch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

import mamba_zoo
from mamba_zoo.backbones import cards
from mamba_zoo.scans import with_correlation

from ._task import Task

Schedule = Literal["cosine", "halving", "decay", "constant"]


class SeriesTask(Task):
    """A model of series trained to find values; see `Task` for what is not said here.

    Args:
        net: What is trained.
        name: Of the model.
        schedule: How the learning rate moves: "cosine" after the warm-up; "halving" every epoch from the third on;
            "decay" to 0.9 of it every epoch from the fifth on; "constant". The latter three are those of the published
            forecasters and know no warm-up.
        patience: Epochs without a better validation score after which training ends; None trains all epochs.
        keep_best: End with the weights of the epoch with the best validation score, instead of those of the last.
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
        ValueError: a setting out of range.
    """

    unit = "windows"
    orders = ("forward", "reversed", "bidirectional")
    grid: ClassVar[tuple[int, ...] | None] = None

    def __init__(
        self,
        net: nn.Module,
        name: str,
        schedule: Schedule = "cosine",
        patience: int | None = None,
        keep_best: bool = True,
        opt: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        layer_decay: float | None = None,
        recipe: Literal["recommended", "as-published"] = "recommended",
        warmup_epochs: float = 1.0,
        min_lr: float = 0.01,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        super().__init__(
            net, name, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs, min_lr, ema_decay, freeze
        )
        if schedule not in ("cosine", "halving", "decay", "constant"):
            raise ValueError(f"schedule={schedule!r} is unknown; choose cosine, halving, decay or constant")
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience} must be at least 1; None trains all epochs")
        self.schedule, self.patience, self.keep_best = schedule, patience, keep_best
        self._best: dict[str, Any] = {"score": float("inf"), "epochs_since": 0, "state": {}}

    def configure_optimizers(self) -> Any:
        """The optimizer, and the rate of every step or epoch."""
        found = super().configure_optimizers()
        if self.schedule == "cosine":
            return found
        factor = {
            "halving": lambda epoch: 0.5 ** max(epoch - 1, 0),
            "decay": lambda epoch: 0.9 ** max(epoch - 3, 0),
            "constant": lambda epoch: 1.0,
        }[self.schedule]
        schedule = torch.optim.lr_scheduler.LambdaLR(found["optimizer"], factor)
        return {**found, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def note_score(self, score: float) -> None:
        """Called after each validation: keep the weights if they are the best, and end if there is no hope."""
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        if score < self._best["score"]:
            state = {key: value.detach().clone() for key, value in self.inference_net.state_dict().items()}
            self._best = {"score": score, "epochs_since": 0, "state": state if self.keep_best else {}}
            return
        self._best["epochs_since"] += 1
        if self.patience is not None and self._best["epochs_since"] >= self.patience:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Go back to the weights of the best epoch."""
        if self._best["state"]:
            self.inference_net.load_state_dict(self._best["state"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the best weights so far, so that a resumed run knows them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        self._best = checkpoint.get("best", self._best)

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Which column of the table holds the dates."""
        parser.add_argument(
            "--date-column",
            metavar="NAME",
            help="column of dates, or none (default: the first one called date, time or alike that holds dates)",
        )


def build_series_model(
    name: str,
    scan: str | None,
    correlation: str | None,
    sizes: Mapping[str, int],
    net: Mapping[str, Any] | None,
    published: str | None = None,
    checkpoint_path: str | None = None,
) -> nn.Module:
    """A model of series for windows of these sizes.

    Args:
        name: As in `mamba_zoo.list_models(modality="series")`.
        scan: Order; None is the model's own, and "correlation" stands for `correlation`.
        correlation: From the data.
        sizes: `in_chans`, `seq_len`, and `pred_len` or `num_classes`.
        net: Further arguments of the model.
        published: Key of published settings, from which sizes may differ.
        checkpoint_path: Published weights.

    Raises:
        ValueError: no such model of series, or arguments it does not take.
    """
    known = sorted(key for key, card in cards().items() if card.modality == "series")
    if name not in known:
        raise ValueError(f"no model of series named {name!r}; choose one of {', '.join(known)}")
    options: dict[str, Any] = {**sizes, **(net or {})}
    if scan is not None:
        options["scan"] = scan if correlation is None else with_correlation(scan, correlation)
    if published is not None:
        options["published"] = published
    try:
        return mamba_zoo.create_model(name, checkpoint_path, **options)
    except TypeError as error:
        raise ValueError(str(error)) from error


class HorizonErrors(Metric):
    """Mean squared and absolute error of every step ahead.

    Args:
        steps: How many steps.
    """

    full_state_update = False
    squared: Tensor
    absolute: Tensor
    count: Tensor

    def __init__(self, steps: int):
        super().__init__()
        for name in ("squared", "absolute", "count"):
            self.add_state(name, torch.zeros(steps), dist_reduce_fx="sum")

    def update(self, found: Tensor, wanted: Tensor) -> None:
        """Add `(b, steps, v)`; where `wanted` is NaN nothing is counted."""
        known = ~wanted.isnan()
        error = torch.where(known, found.float() - wanted, 0.0)
        self.squared += error.square().sum((0, 2))
        self.absolute += error.abs().sum((0, 2))
        self.count += known.sum((0, 2))

    def compute(self) -> dict[str, Tensor]:
        """`mse` and `mae` over all steps, and of each, `mse_steps` and `mae_steps` `(steps,)`."""
        total = self.count.sum()
        return {
            "mse": self.squared.sum() / total,
            "mae": self.absolute.sum() / total,
            "mse_steps": self.squared / self.count,
            "mae_steps": self.absolute / self.count,
        }

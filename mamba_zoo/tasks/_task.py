"""What all tasks have in common: a network with its optimizer, an average of its weights, and where its score is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from .building import freeze_parts
from .checkpoints import read_checkpoint
from .optim import check_optimizer, parameter_groups, warmup_cosine
from .registry import task_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._comparison import Metric


class Task(LightningModule):
    """A network with its optimizer and, if asked, an average of its weights.

    A subclass builds its network, hands it on, calls `save_hyperparameters()`, and writes `training_step` (which logs
    "train/loss"), `validation_step` and `test_step` (which log `monitor` and its like under "val/" and "test/") and
    `predict_step`. Every argument is stored in the checkpoint, which alone rebuilds the model: plain values only.

    Attributes:
        unit: What one item of a batch is, in the plural; a column of `history.csv`.
        monitor: Logged score of the validation items by which the best epoch is chosen; "test/..." is its counterpart.
        monitor_mode: Whether more ("max") or less ("min") is better.
        score_name: What the score is called in comparisons.
        percent: Whether it is shown in percent.
        curves: Logged scores that are drawn over the epochs, beside the losses; empty draws `monitor`.
        metric_names: What tables call the metrics, by their name without "val/" or "test/".
        orders: Scan orders that `mamba-zoo compare` takes if none are named.
        compared: Arguments of the task that `mamba-zoo compare` takes if no model is named.
        grid: Grid of tokens on which `mamba-zoo compare` describes scan orders; None where orders follow from the data.

    Args:
        net: What is trained.
        name: Of the model.
        opt: Name of an optimizer of timm.
        lr: Highest learning rate.
        weight_decay: Of the parameters that are decayed; see `recipe`.
        layer_decay: Each layer learns this factor slower than the next one; None gives every layer `lr`.
        recipe: "recommended" decays neither state matrices, skips, step biases, norms, biases nor positions;
            "as-published" decays what the architecture's published training code decays.
        warmup_epochs: Epochs over which the rate rises linearly, fractions allowed.
        min_lr: Last rate as a part of `lr`.
        ema_decay: Decay of the average of the weights, which is then validated, tested and used for prediction; None
            is off. The average warms up: it is plain at first and reaches this decay with time.
        freeze: "backbone" trains the head only, "bn" fixes batch norms, "none" trains everything.

    Raises:
        ValueError: a setting out of range.
    """

    unit: ClassVar[str] = "items"
    monitor: ClassVar[str] = "val/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    score_name: ClassVar[str] = "loss"
    percent: ClassVar[bool] = False
    curves: ClassVar[tuple[str, ...]] = ()
    metric_names: ClassVar[Mapping[str, str]] = {}
    orders: ClassVar[tuple[str, ...]] = ("cross", "hilbert", "snake")
    compared: ClassVar[Mapping[str, Any]] = {}
    grid: ClassVar[tuple[int, ...] | None] = (14, 14)

    def __init__(
        self,
        net: nn.Module,
        name: str,
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
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1, such as 0.999; None is off")
        check_optimizer(opt)
        self.net, self.name = net, name
        self.opt, self.lr, self.weight_decay, self.layer_decay = opt, lr, weight_decay, layer_decay
        self.recipe, self.warmup_epochs, self.min_lr, self.ema_decay = recipe, warmup_epochs, min_lr, ema_decay
        self._frozen = freeze_parts(net, freeze)
        # Outside the module tree: its eval mode and its copies of the parameters are nobody else's business.
        self._ema: list[Any] = []
        self._ema_step = 0

    @classmethod
    def metric(cls) -> Metric:
        """The score, as comparisons show it."""
        from ._comparison import Metric

        return Metric(cls.score_name, cls.monitor_mode == "max", cls.percent)

    @classmethod
    def scan_spec(cls, scan: Any) -> str:
        """What stands for a scan order in tables and checkpoints; tasks whose orders are no scans of grids say how."""
        from mamba_zoo.scans import as_spec

        return as_spec(scan)

    @classmethod
    def scan_directions(cls, spec: str) -> int | None:
        """Directions of an order, where `grid` is None but they are known all the same."""
        return None

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> Self:
        """The trained model of a run, in evaluation mode on the CPU; nothing is downloaded and no pickle is run.

        Args:
            path: A checkpoint of `mamba-zoo fit`, or the folder of the run for its best one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no such checkpoint, or one of another task.
        """
        checkpoint = read_checkpoint(path)
        values = checkpoint.get("hyper_parameters", {})
        if "name" not in values or "state_dict" not in checkpoint:
            raise ValueError(
                f"{path} is no checkpoint of mamba-zoo fit; published weights load with create_model(checkpoint_path=)"
            )
        trained, own = checkpoint.get("task"), task_of(cls)
        if None not in (trained, own) and trained != own:
            raise ValueError(f"{path} holds a model for {trained}, not for {own}; mamba_zoo.tasks.load_task reads any")
        # Weights come from this file alone.
        values = {**values, **{key: off for key, off in _NO_OTHER_WEIGHTS.items() if key in values}}
        model = cls(**values)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval()

    @property
    def inference_net(self) -> nn.Module:
        """The weights that are validated and saved for use: the average if there is one."""
        return self._ema[0].module if self._ema else self.net

    def forward(self, *inputs: Any) -> Any:
        """What the network returns; in evaluation mode, the average of its weights if there is one."""
        return self.net(*inputs) if self.training else self.inference_net(*inputs)

    def batch_items(self, batch: Any) -> int:
        """How many items a batch holds; the length of its first member unless a task says otherwise."""
        return len(batch[0])

    @property
    def test_items(self) -> Any:
        """Score of every item that this process tested `(items,)`, in order, more being better or worse as for the
        score itself; None if the task keeps none. Comparisons pair them.
        """
        return None

    def test_arrays(self) -> dict[str, Any]:
        """Arrays worth keeping of a test, by name; `train_once` stores them in `test_predictions.npz`."""
        return {}

    def write_test_artifacts(self, out: Path) -> list[str]:
        """Write pictures and tables of a test into the folder `out`; returns the names of the files."""
        return []

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags that `mamba-zoo predict` takes for this task, beside those that all tasks share."""

    def predict_files(self, args: argparse.Namespace) -> str:
        """Run `mamba-zoo predict`: read `args.data`, write `args.out`.

        Args:
            args: `data`, `out` (None: choose), `batch_size`, `num_workers`, `device`, and the task's own flags.

        Returns: One line that says what was written.

        Raises:
            ValueError: the task cannot predict from files.
        """
        raise ValueError(
            f"{task_of(type(self)) or type(self).__name__} has no predictions to write; use mamba-zoo test"
        )

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

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In the calling thread: Python in the thread that autograd has for a GPU is slower.

        On two H100s vmamba_tiny trained on 2795 and 2607 images a second with it, on 3663 and 2839 without.
        """
        with torch.autograd.set_multithreading_enabled(False):
            super().backward(loss, *args, **kwargs)

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
        """Store the name of the task, and the average beside the weights."""
        if (name := task_of(type(self))) is not None:
            checkpoint["task"] = name
        if self._ema:
            checkpoint["ema"] = self._ema[0].module.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint that has one."""
        if "ema" in checkpoint:
            self._make_ema()
            self._ema[0].module.load_state_dict(checkpoint["ema"])
            self._ema_step = int(checkpoint["global_step"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts take the average along, which is no submodule: its keys would be saved twice."""
        for ema in self._ema:
            ema._apply(fn)
        return super()._apply(fn, recurse)

    def _make_ema(self) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self._ema[:] = [ModelEmaV3(self.net, decay=self.ema_decay or 0.999, use_warmup=True)]


_NO_OTHER_WEIGHTS: dict[str, Any] = {"pretrained": False, "checkpoint_path": None, "init_encoder": None}

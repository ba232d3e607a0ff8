"""What is missing: models of series trained to find values that were hidden from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ._gaps import interpolate, random_gaps
from ._series_loss import known_error
from ._series_task import HorizonErrors, Schedule, SeriesTask, build_series_model

_SHOWN = 4


class Imputer(SeriesTask):
    """A model that reads windows with gaps and finds what belongs there.

    Gaps are closed by straight lines first, and the model says what these lack; beside the series it reads where the
    gaps are, as one more channel for each. Windows are not normalised one by one. Errors are those of scaled values in
    the gaps; beside them stands the error of the straight lines.

    Args:
        name: As in `mamba_zoo.list_models(modality="series")`.
        scan: Scan order; None is the published one, "correlation" puts alike series one after another.
        net: Further arguments of the model, such as `{"dim": 128, "depth": 3}`.
        in_chans: Series.
        seq_len: Steps of a window.
        gap_rate: Part of the values that training and tests hide.
        gap_length: Steps of a gap.
        together: Hide all series of a step at once.
        loss: "mse", "mae" or "huber".
        schedule: See `SeriesTask`.
        patience: See `SeriesTask`.
        keep_best: See `SeriesTask`.
        opt: See `Task`.
        lr: See `Task`.
        weight_decay: See `Task`.
        layer_decay: See `Task`.
        recipe: See `Task`.
        warmup_epochs: See `Task`.
        min_lr: See `Task`.
        ema_decay: See `Task`.
        freeze: See `Task`.
        columns: Names of the series.
        mean: Of each series, which scaled values lack.
        deviation: Of each series, which scaled values are divided by.
        correlation: What the scan "correlation" stands for.
        marks: Whether the data give the time of each step; not read.

    Raises:
        ValueError: an unknown model or setting.
    """

    monitor, monitor_mode = "val/mse", "min"
    score_name = "MSE"
    curves: ClassVar[tuple[str, ...]] = ("val/mse", "val/mae")
    metric_names: ClassVar[Mapping[str, str]] = {
        "mse": "mean squared error in gaps",
        "mae": "mean absolute error in gaps",
        "line_mse": "MSE of straight lines",
        "line_mae": "MAE of straight lines",
    }

    def __init__(
        self,
        name: str = "series_mamba",
        scan: str | None = None,
        net: dict[str, Any] | None = None,
        in_chans: int = 1,
        seq_len: int = 96,
        gap_rate: float = 0.25,
        gap_length: int = 4,
        together: bool = False,
        loss: Literal["mse", "mae", "huber"] = "mse",
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
        columns: list[str] | None = None,
        mean: list[float] | None = None,
        deviation: list[float] | None = None,
        correlation: str | None = None,
        marks: bool = False,
    ) -> None:
        if not 0 < gap_rate < 1 or not 1 <= gap_length < seq_len:
            raise ValueError(
                f"gap_rate={gap_rate} must lie between 0 and 1, and gap_length={gap_length} from 1 to {seq_len - 1}"
            )
        if loss not in ("mse", "mae", "huber"):
            raise ValueError(f"loss={loss!r} is unknown; choose mse, mae or huber")
        sizes = {"in_chans": 2 * in_chans, "seq_len": seq_len, "pred_len": 0}
        # What lines lack has no mean that could be put back.
        model = build_series_model(name, scan, correlation, sizes, {"use_norm": False, **(net or {})})
        super().__init__(
            model, name, schedule, patience, keep_best, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs,
            min_lr, ema_decay, freeze,
        )  # fmt: skip
        if type(self) is Imputer:
            self.save_hyperparameters()
        self.seq_len, self.loss = seq_len, loss
        self.gap_rate, self.gap_length, self.together = gap_rate, gap_length, together
        self.columns = columns or [str(i) for i in range(in_chans)]
        self.mean, self.deviation = mean or [0.0] * in_chans, deviation or [1.0] * in_chans
        self.errors = torch.nn.ModuleDict({key: HorizonErrors(seq_len) for key in ("model", "line")})
        self._window: tuple[Tensor, ...] = ()

    def filled(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the model says of every value of windows `(b, l, v)`, of which `hidden` ones are not shown to it."""
        line = interpolate(x, hidden)
        net = self.net if self.training else self.inference_net
        return line + net(torch.cat([line, hidden.to(line.dtype)], dim=-1))[..., : x.shape[-1]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        x, target = batch[:2]
        unknown = target.isnan()
        hidden = random_gaps(x, self.gap_rate, self.gap_length, self.together)
        wanted = target.masked_fill(~hidden, torch.nan)
        loss, of_windows = known_error(self.filled(x, hidden | unknown), wanted, self.loss)
        if hasattr(self.net, "record"):
            self.net.record(of_windows)  # type: ignore[operator] - MambaTS learns which order costs least
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Errors of one batch."""
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Errors of the epoch."""
        found = self._finish("val")
        self.note_score(float(found["model"]["mse"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Errors of one batch."""
        self._window = self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Errors of the model and of straight lines."""
        self._finish("test")

    def _evaluate(self, batch: Any, batch_idx: int) -> tuple[Tensor, ...]:
        x, target = batch[:2]
        unknown = target.isnan()
        # The same gaps in every epoch and for every model.
        generator = torch.Generator().manual_seed(batch_idx)
        hidden = random_gaps(x, self.gap_rate, self.gap_length, self.together, generator)
        wanted = target.masked_fill(~hidden, torch.nan)
        found = self.filled(x, hidden | unknown).float()
        self.errors["model"].update(found, wanted)  # type: ignore[operator]
        self.errors["line"].update(interpolate(x, hidden | unknown), wanted)  # type: ignore[operator]
        return x[-1], hidden[-1], found[-1]

    def _finish(self, split: str) -> dict[str, dict[str, Tensor]]:
        found = {key: errors.compute() for key, errors in self.errors.items()}  # type: ignore[operator]
        for errors in self.errors.values():
            errors.reset()  # type: ignore[operator]
        for key, values in found.items():
            prefix = "" if key == "model" else f"{key}_"
            self.log_dict({f"{split}/{prefix}{error}": values[error] for error in ("mse", "mae")})
        return found

    def write_test_artifacts(self, out: Path) -> list[str]:
        """Gaps of one window, what was put into them and what belongs there."""
        from ._series_figures import plot_filled

        x, hidden, found = (part.detach().cpu() for part in self._window)
        truth = self.unscaled(x)
        known = truth.masked_fill(hidden, torch.nan)
        filled = torch.where(hidden, self.unscaled(found), truth)
        plot_filled(known.numpy(), filled.numpy(), self.columns, out / "gaps.png", truth.numpy())
        return ["gaps.png"]

    def unscaled(self, x: Tensor) -> Tensor:
        """Scaled values `(..., v)` in the units of the table."""
        return x * x.new_tensor(self.deviation) + x.new_tensor(self.mean)

    def scaled(self, x: Tensor) -> Tensor:
        """Values `(..., v)` in the units of the table, scaled as for training."""
        return (x - x.new_tensor(self.mean)) / x.new_tensor(self.deviation)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scaled windows `(b, l, v)`, with values where the target lacks them."""
        x, target = batch[:2]
        unknown = target.isnan()
        return torch.where(unknown, self.filled(x, unknown).float(), x)

    def predict_files(self, args: argparse.Namespace) -> str:
        """The table with its gaps filled, as CSV and as a picture."""
        from .series_predict import filled_csv

        return filled_csv(self, args)

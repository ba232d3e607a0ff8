"""What comes next: models of series trained to forecast, beside forecasts that need no training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ._series_loss import Weighting, known_error, spectral_error, step_weights, without_frequencies
from ._series_task import HorizonErrors, Schedule, SeriesTask, build_series_model
from .running import write_csv

_SHOWN = 4  # windows in the picture of forecasts


class Forecaster(SeriesTask):
    """A model that reads the last `seq_len` steps of some series and forecasts the next `pred_len`.

    Errors are those of scaled values, over all windows, steps and series. Beside them stand the errors of the last
    value repeated (`repeat_mse`) and, where there is a season, of the last season repeated (`season_mse`), on the same
    windows.

    Args:
        name: As in `mamba_zoo.list_models(modality="series")`.
        scan: Scan order; None is the published one, "correlation" puts alike series one after another.
        published: Settings of a paper, such as "etth1_96_96"; see `mamba_zoo.backbones._series_published`.
        net: Further arguments of the model, such as `{"dim": 128, "depth": 3}`.
        in_chans: Series.
        seq_len: Steps that the model reads.
        pred_len: Steps to forecast.
        loss: "mse", "mae" or "huber".
        weighting: How much the steps ahead count in the loss: "even"; "root", the i-th by i^-1/2 (arXiv:2305.12095);
            "arctan", by 1 + pi/4 - arctan(i), a fifth of the first at last (arXiv:2412.17323).
        mask_frequencies: Part of the frequencies that are taken out of each training window and of what follows it, at
            random (arXiv:2302.09292); 0 is off.
        spectral_loss: Part of the loss that is the mean absolute error between the spectra of forecast and truth
            (arXiv:2402.02399), from 0 to 1; the rest is `loss`, which alone knows of `weighting`.
        schedule: See `SeriesTask`.
        patience: See `SeriesTask`.
        keep_best: See `SeriesTask`.
        checkpoint_path: Start from a published checkpoint file. Not read when a checkpoint of a run is loaded.
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
        season: Steps after which the series repeat.
        correlation: What the scan "correlation" stands for.
        marks: Whether the data give the time of each step.

    Raises:
        ValueError: an unknown model or setting.
    """

    monitor, monitor_mode = "val/mse", "min"
    score_name = "MSE"
    orders = ("forward", "correlation", "bidirectional")
    curves: ClassVar[tuple[str, ...]] = ("val/mse", "val/mae")
    metric_names: ClassVar[Mapping[str, str]] = {
        "mse": "mean squared error",
        "mae": "mean absolute error",
        "repeat_mse": "MSE, last value repeated",
        "repeat_mae": "MAE, last value repeated",
        "season_mse": "MSE, last season repeated",
        "season_mae": "MAE, last season repeated",
    }

    step_weights: Tensor | None

    def __init__(
        self,
        name: str = "s_mamba",
        scan: str | None = None,
        published: str | None = None,
        net: dict[str, Any] | None = None,
        in_chans: int = 7,
        seq_len: int = 96,
        pred_len: int = 96,
        loss: Literal["mse", "mae", "huber"] = "mse",
        weighting: Weighting = "even",
        mask_frequencies: float = 0.0,
        spectral_loss: float = 0.0,
        schedule: Schedule = "cosine",
        patience: int | None = None,
        keep_best: bool = True,
        checkpoint_path: str | None = None,
        opt: str = "adam",
        lr: float = 1e-4,
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
        season: int = 1,
        correlation: str | None = None,
        marks: bool = False,
    ) -> None:
        if pred_len < 1:
            raise ValueError(f"pred_len={pred_len}; a forecast needs at least 1 step")
        if loss not in ("mse", "mae", "huber"):
            raise ValueError(f"loss={loss!r} is unknown; choose mse, mae or huber")
        if not 0 <= mask_frequencies < 1:
            raise ValueError(f"mask_frequencies={mask_frequencies} must be at least 0 and below 1")
        if not 0 <= spectral_loss <= 1:
            raise ValueError(f"spectral_loss={spectral_loss} must be from 0 to 1")
        sizes = {"in_chans": in_chans, "seq_len": seq_len, "pred_len": pred_len}
        model = build_series_model(name, scan, correlation, sizes, net, published, checkpoint_path)
        super().__init__(
            model, name, schedule, patience, keep_best, opt, lr, weight_decay, layer_decay, recipe, warmup_epochs,
            min_lr, ema_decay, freeze,
        )  # fmt: skip
        self.save_hyperparameters()
        self.reads_marks = marks
        self.seq_len, self.pred_len, self.loss, self.season = seq_len, pred_len, loss, season
        self.mask_frequencies, self.spectral_loss = mask_frequencies, spectral_loss
        self.register_buffer("step_weights", step_weights(weighting, pred_len), persistent=False)
        self.columns = columns or [str(i) for i in range(in_chans)]
        self.mean, self.deviation = mean or [0.0] * in_chans, deviation or [1.0] * in_chans
        self.val_errors = HorizonErrors(pred_len)
        compared = ("model", "repeat", "season") if season > 1 else ("model", "repeat")
        self.test_errors = torch.nn.ModuleDict({key: HorizonErrors(pred_len) for key in compared})
        self._windows: list[tuple[Tensor, ...]] = []
        self._window_errors: dict[str, list[Tensor]] = {"mse": [], "mae": []}

    def predictions(self, batch: Any) -> Tensor:
        """Scaled forecasts `(b, pred_len, v)` of a batch."""
        x, _, marks, _ = batch
        net = self.net if self.training else self.inference_net
        return net(x, marks if marks.shape[-1] else None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        if self.mask_frequencies:
            batch = [*without_frequencies(batch[0], batch[1], self.mask_frequencies), *batch[2:]]
        found = self.predictions(batch)
        loss, of_windows = known_error(found, batch[1], self.loss, self.step_weights)
        if self.spectral_loss:
            spectral, of_spectra = spectral_error(found, batch[1])
            loss = loss.lerp(spectral, self.spectral_loss)
            of_windows = of_windows.lerp(of_spectra, self.spectral_loss)
        if hasattr(self.net, "record"):
            self.net.record(of_windows)  # type: ignore[operator] - MambaTS learns which order costs least
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Errors of one batch."""
        self.val_errors.update(self.predictions(batch), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Errors of the epoch."""
        found = self.val_errors.compute()
        self.val_errors.reset()
        self.log_dict({f"val/{key}": found[key] for key in ("mse", "mae")})
        self.note_score(float(found["mse"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Errors of one batch, and of forecasts that need no training."""
        x, y = batch[:2]
        found = {"model": self.predictions(batch), **self.simple_forecasts(x)}
        simple = found["season" if self.season > 1 else "repeat"]
        for key, errors in self.test_errors.items():
            errors.update(found[key], y)  # type: ignore[operator]
        for kind, errors in self._window_errors.items():
            errors.append(known_error(found["model"], y, kind)[1].cpu())
        kept = (x, y, found["model"], simple)
        self._windows.append(tuple(part[0].detach().float().cpu() for part in kept))

    def simple_forecasts(self, x: Tensor) -> dict[str, Tensor]:
        """The last value and the last season repeated, `(b, pred_len, v)`; a season longer than `x` is a step."""
        period = self.season if self.season <= x.shape[1] else 1
        steps = torch.arange(self.pred_len, device=x.device)
        return {
            "repeat": x[:, -1:].expand(-1, self.pred_len, -1),
            "season": x[:, x.shape[1] - period + steps % period],
        }

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._windows.clear()
        for kept in self._window_errors.values():
            kept.clear()
        for errors in self.test_errors.values():
            errors.reset()  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Log the errors over all steps."""
        found = self.test_scores()
        for key, values in found.items():
            prefix = "" if key == "model" else f"{key}_"
            self.log_dict({f"test/{prefix}{error}": values[error] for error in ("mse", "mae")})

    def test_scores(self) -> dict[str, dict[str, Tensor]]:
        """Errors of the model and of the simple forecasts, over all steps and of each."""
        return {key: errors.compute() for key, errors in self.test_errors.items()}  # type: ignore[operator]

    def test_arrays(self) -> dict[str, np.ndarray]:
        """Errors of every step ahead, and those of the model in every window that this process tested, in order."""
        windows = {f"windows_{kind}": torch.cat(found).numpy() for kind, found in self._window_errors.items()}
        return {**self._step_errors(), **windows}

    def _step_errors(self) -> dict[str, np.ndarray]:
        found = self.test_scores()
        return {
            f"{key}_{error}": values[f"{error}_steps"].cpu().numpy()
            for key, values in found.items()
            for error in ("mse", "mae")
        }

    def write_test_artifacts(self, out: Path) -> list[str]:
        """Errors by step ahead as CSV and as a picture, and some forecasts beside what came."""
        from ._series_figures import plot_forecasts, plot_horizon

        arrays = self._step_errors()
        rows = [{"step": i + 1, **{key: float(v[i]) for key, v in arrays.items()}} for i in range(self.pred_len)]
        write_csv(out / "horizon.csv", rows)
        plot_horizon(arrays, out / "horizon.png")
        at = np.linspace(0, len(self._windows) - 1, min(_SHOWN, len(self._windows))).astype(int)
        windows = [[self.unscaled(part).numpy() for part in self._windows[i]] for i in dict.fromkeys(at.tolist())]
        plot_forecasts(windows, self.columns, out / "forecasts.png", self.season)
        return ["horizon.csv", "horizon.png", "forecasts.png"]

    def unscaled(self, x: Tensor) -> Tensor:
        """Scaled values `(..., v)` in the units of the table."""
        return x * x.new_tensor(self.deviation) + x.new_tensor(self.mean)

    def scaled(self, x: Tensor) -> Tensor:
        """Values `(..., v)` in the units of the table, scaled as for training."""
        return (x - x.new_tensor(self.mean)) / x.new_tensor(self.deviation)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Forecasts `(b, pred_len, v)` in the units of the table, float32."""
        return self.unscaled(self.predictions(batch).float())

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Where forecasts start, and how sure they are."""
        super().predict_arguments(parser)
        parser.add_argument(
            "--every",
            type=int,
            metavar="STEPS",
            help="also forecast from earlier in the file, every STEPS steps, beside what came (default: only from its "
            "end)",
        )
        parser.add_argument(
            "--interval",
            type=float,
            metavar="LEVEL",
            help="also write between which values this part of the truth lies, such as 0.9, by the errors of each step "
            "and series in the table of --calibrate",
        )
        parser.add_argument(
            "--calibrate",
            type=Path,
            metavar="FILE",
            help="table for --interval that the model was not trained on (default: the table itself; errors on rows "
            "that trained the model are too small)",
        )

    def predict_files(self, args: argparse.Namespace) -> str:
        """Forecasts of the series in a table, as CSV and as a picture."""
        from .series_predict import forecast_csv

        return forecast_csv(self, args)

"""What every run shares: callbacks, a quiet trainer, Ctrl-C as KeyboardInterrupt, a record of each epoch."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from ..backbones._checkpoint import load_checkpoint
from .checkpoints import write_atomically
from .epochs import EpochSeed, epoch_number


class History(Callback):
    """One row of metrics an epoch, kept in checkpoints and in `history.csv`, so that a resumed run has all of them.

    Args:
        path: Of the CSV file; None writes none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.rows = path, []
        self._started = self._seconds = 0.0
        self._items = 0

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after these rows."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._started, self._seconds, self._items = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the items of all processes."""
        self._items += cast(Any, pl_module).batch_items(batch) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: validation is not training."""
        self._seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch, and write the file anew.

        Raises:
            ValueError: the training loss is NaN or infinite.
        """
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        loss = trainer.callback_metrics.get("train/loss_epoch", trainer.callback_metrics.get("train/loss"))
        if loss is not None and not math.isfinite(float(loss)):
            # Raised before the checkpoints are written: they stay at the epoch before.
            raise ValueError(
                f"the loss became {float(loss)} in epoch {epoch_number(trainer)}; use a lower lr, more warm-up, or "
                "precision 32-true or bf16-mixed (mamba_zoo.tasks.nonfinite.find_nonfinite names the layer)"
            )
        row = {
            "epoch": epoch_number(trainer),
            "step": trainer.global_step,
            cast(Any, pl_module).unit: self._items,
            "seconds": self._seconds + time.perf_counter() - self._started,
            "lr": trainer.optimizers[0].param_groups[-1]["lr"],
            **({"train/loss": float(loss)} if loss is not None else {}),
            **found,
        }
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        if self.path is not None and trainer.is_global_zero:
            write_csv(self.path, self.rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV with every column that occurs, in place of an older file."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def run_callbacks(out: Path, seed: int, monitor: str, mode: str) -> tuple[list[Callback], History]:
    """The callbacks of a resumable run in the folder `out`: `best.ckpt`, `last.ckpt`, `history.csv`.

    Args:
        out: Folder.
        seed: Of every epoch's randomness.
        monitor: Logged score that chooses the best epoch.
        mode: "max" or "min".
    """
    history = History(out / "history.csv")
    # After the training epoch, validation included: a checkpoint then never holds half an epoch.
    common: dict[str, Any] = {
        "dirpath": out,
        "save_on_train_epoch_end": True,
        "auto_insert_metric_name": False,
        "enable_version_counter": False,
    }
    best = ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **common)
    last = ModelCheckpoint(filename="last", **common)
    return [EpochSeed(seed), history, best, last], history


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trainer's advertisements and hints that do not apply; errors and other warnings pass."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Reading in the training process is a choice: digits are in memory, and small machines have few cores.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The run folder is ours and is meant to hold the files of the run that continues.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            # Lightning's own use of torch and jsonargparse.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
            warnings.filterwarnings("ignore", message=r"(?s).*(JsonargparseDeprecationWarning|instantiate_classes)")
            # Values of the whole epoch are logged whatever the interval.
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
            # A frozen part is in evaluation mode on purpose.
            warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def trainer_settings(**given: Any) -> Iterator[None]:
    """Where a trainer is made: what it says about its settings becomes a ValueError that names them.

    Args:
        given: Settings that choose devices, by the names that the user knows.

    Raises:
        ValueError: a setting that the trainer refuses, such as a GPU where there is none.
    """
    try:
        yield
    except MisconfigurationException as error:
        named = ", ".join(f"{key} {value}" for key, value in given.items() if value not in (None, "auto"))
        where = f" ({named})" if named else ""
        raise ValueError(
            f"{str(error).strip().rstrip('.!')}{where}; mamba-zoo doctor says what this machine has, auto takes it"
        ) from None


@contextlib.contextmanager
def loading() -> Iterator[list[str]]:
    """What models say meanwhile of the weights that they load: how many, from where, and which are new."""
    found: list[str] = []
    logger, handler = logging.getLogger(load_checkpoint.__module__), logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage().partition(": ")[2])
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def quiet_trainer(device: str) -> Trainer:
    """A trainer on one device that tests and predicts without writing anything; use it within `quiet()`.

    Raises:
        ValueError: there is no such device.
    """
    with trainer_settings(**{"--device": device}):
        return Trainer(
            accelerator=device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


class _Pressed(Callback):
    """Ends a run at the first batch after Ctrl-C, at once after a second.

    Raised anywhere, KeyboardInterrupt can leave a lock of a logger held, for which closing it then waits forever; and
    Python drops it while it collects garbage.
    """

    def __init__(self) -> None:
        self.seen = False

    def note(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here."""
        self._stop()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Or here."""
        self._stop()

    def _stop(self) -> None:
        if self.seen:
            raise KeyboardInterrupt


def fit(trainer: Trainer, model: LightningModule, data: LightningDataModule, resume: Path | None = None) -> None:
    """Train, from `resume` if it is given.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the trainer has closed its files.
    """
    handler = signal.getsignal(signal.SIGINT)
    pressed = _Pressed()
    cast(Any, trainer).callbacks.append(pressed)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, pressed.note)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit:  # how the trainer leaves after Ctrl-C, having disabled it
        raise KeyboardInterrupt from None
    except Exception:
        if pressed.seen:  # workers that read items leave at Ctrl-C, and are then missed
            raise KeyboardInterrupt from None
        raise
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, handler)

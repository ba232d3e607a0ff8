"""Test errors after every epoch of a training, for `python -m benchmarks.series etth1 --evidence`.

Of every run: the test error of the epoch with the best validation error, which is a result; the lowest test
error of any epoch, which is none, since the test chose it, but a bound of what any choice of the epoch could give; and
both again over full batches alone, as TimeMachine's published test counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything


class TestedEachEpoch(Callback):
    """Errors of a forecaster on all test windows after every epoch.

    Args:
        data: With a loader of test windows.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.rows = data, []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test, after the epoch's validation."""
        from .series import full_batches

        module: Any = pl_module
        module.eval()
        with torch.no_grad():
            batches = ([part.to(module.device) for part in batch] for batch in self.data.test_dataloader())
            errors = torch.cat([(module.predictions(b) - b[1]).square().mean((1, 2)) for b in batches]).cpu()
        module.train()
        self.rows.append(
            {
                "epoch": len(self.rows) + 1,
                "val_mse": float(trainer.callback_metrics["val/mse"]),
                "mse": float(errors.mean()),
                "mse_full_batches": full_batches(errors),
            }
        )


def tested_each_epoch(
    name: str,
    data: Any,
    folder: Path,
    seed: int,
    epochs: int,
    options: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    """Train as `train_once` does; a finished run is read from `folder`."""
    from mamba_zoo.tasks.epochs import EpochSeed
    from mamba_zoo.tasks.running import fit, quiet
    from mamba_zoo.tasks.train import make_task

    file = folder / "epochs.json"
    if not file.exists():
        started = time.perf_counter()
        with quiet():
            seed_everything(seed, verbose=False)
            module = make_task(name, data, None, options, "forecasting")
            tested = TestedEachEpoch(data)
            runner = Trainer(
                max_epochs=epochs, logger=False, callbacks=[EpochSeed(seed), tested], enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, devices=1, **trainer,
            )  # fmt: skip
            data.seed_order(seed)
            fit(runner, module, data)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"epochs": tested.rows, "seconds": time.perf_counter() - started}))
    found = json.loads(file.read_text())
    best = min(found["epochs"], key=lambda row: row["val_mse"])
    return {
        **{key: best[key] for key in ("val_mse", "epoch", "mse", "mse_full_batches")},
        "lowest_mse": min(row["mse"] for row in found["epochs"]),
        "lowest_mse_full_batches": min(row["mse_full_batches"] for row in found["epochs"]),
        "epochs": len(found["epochs"]),
        "seconds": found["seconds"],
    }

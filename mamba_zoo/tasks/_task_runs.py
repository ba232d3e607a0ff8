"""One model trained under one scan order, measured as `compare` needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

MEASURE_SECONDS = 2.0

Trainer = Callable[[str, int, Path], Mapping[str, Any]]


def task_trainer(
    task: str,
    model: str,
    data: Any,
    epochs: int,
    model_options: Mapping[str, Any],
    trainer_options: Mapping[str, Any],
    keep_checkpoints: bool,
) -> Trainer:
    """A function of (scan, seed, folder) that trains `model` on `data`, the `TaskData` of `task`."""
    from .train import make_task, train_once

    def train(scan: str, seed: int, out: Path) -> dict[str, Any]:
        result = train_once(
            model, data, out, scan=scan, seed=seed, max_epochs=epochs, model=model_options, trainer=trainer_options,
            task=task,
        )  # fmt: skip
        module = make_task(model, data, scan, model_options, task)
        rate = inference_rate(module, data, trainer_options)
        if not keep_checkpoints:
            for path in out.glob("*.ckpt"):
                path.unlink()
        items = out / "test_items.npy"
        return {
            **result,
            "curve": [(row["epoch"], row[module.monitor]) for row in result["curve"] if module.monitor in row],
            "items": np.load(items, allow_pickle=False) if items.exists() else None,
            "images_per_second": result[f"{module.unit}_per_second"],
            "inference_images_per_second": rate,
        }

    return train


def inference_rate(module: Any, data: Any, trainer_options: Mapping[str, Any]) -> float:
    """Items a second of the task `module` on one real batch of the test items: the median, without reading files."""
    gpu = torch.cuda.is_available() and trainer_options.get("accelerator", "auto") != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    precision = str(trainer_options.get("precision", "32"))
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
    module = module.to(device).eval()
    batch = next(iter(data.loader(data.split("test"), data.batch_size, 0)))
    batch = module.transfer_batch_to_device(batch, device, 0)
    seconds, started = [], time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        module.predict_step(batch, 0)
        while len(seconds) < 3 or (len(seconds) < 50 and time.perf_counter() - started < MEASURE_SECONDS):
            _wait(device)
            before = time.perf_counter()
            module.predict_step(batch, 0)
            _wait(device)
            seconds.append(time.perf_counter() - before)
    return module.batch_items(batch) / float(np.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

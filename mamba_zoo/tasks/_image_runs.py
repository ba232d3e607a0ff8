"""One image classifier trained under one scan order, measured as `compare` needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

MEASURE_SECONDS = 2.0

Trainer = Callable[[str, int, Path], Mapping[str, Any]]


def image_trainer(
    model: str,
    data: Any,
    epochs: int,
    model_options: Mapping[str, Any],
    trainer_options: Mapping[str, Any],
    keep_checkpoints: bool,
) -> Trainer:
    """A function of (scan, seed, folder) that trains `model` on `data`, an `ImageData`."""
    from .train import make_classifier, train_once

    def train(scan: str, seed: int, out: Path) -> dict[str, Any]:
        result = train_once(
            model, data, out, scan=scan, seed=seed, max_epochs=epochs, model=model_options, trainer=trainer_options
        )
        found = np.load(out / "test_predictions.npz", allow_pickle=False)
        rate = inference_rate(make_classifier(model, data, scan, model_options).net, data, trainer_options)
        if not keep_checkpoints:
            for path in out.glob("*.ckpt"):
                path.unlink()
        return {
            **result,
            "curve": [(row["epoch"], row["val/top1"]) for row in result["curve"] if "val/top1" in row],
            "items": (found["target"] == found["predicted"]).astype(np.float64),
            "inference_images_per_second": rate,
        }

    return train


def inference_rate(net: nn.Module, data: Any, trainer_options: Mapping[str, Any]) -> float:
    """Images a second of `net` on batches of the size trained with: the median batch, without reading images."""
    gpu = torch.cuda.is_available() and trainer_options.get("accelerator", "auto") != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    precision = str(trainer_options.get("precision", "32"))
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
    net = net.to(device).eval()
    side, channels = data.preprocess.size, data.preprocess.in_chans
    x = torch.zeros(data.batch_size, channels, side, side, device=device)
    seconds, started = [], time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        net(x)
        while len(seconds) < 3 or (len(seconds) < 50 and time.perf_counter() - started < MEASURE_SECONDS):
            _wait(device)
            before = time.perf_counter()
            net(x)
            _wait(device)
            seconds.append(time.perf_counter() - before)
    return len(x) / float(np.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

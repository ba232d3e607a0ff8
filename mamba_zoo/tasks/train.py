"""One training run from Python: what `mamba-zoo compare` repeats for every scan order and seed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer, seed_everything

from ._data import TaskData
from ._task import Task
from .checkpoints import AtomicCheckpointIO, read_checkpoint, write_atomically
from .registry import DEFAULT, find_task, task_for
from .running import fit, quiet, run_callbacks, trainer_settings


def train_once(
    name: str,
    data: TaskData,
    out: str | Path,
    scan: str | None = None,
    seed: int = 0,
    max_epochs: int = 20,
    model: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """Train one model once and score its last weights on the test items.

    The folder `out` makes the run resumable: a finished run with the same settings is read from its `metrics.json`, an
    interrupted one continues from its `last.ckpt`, exactly as if it had not been interrupted.

    Args:
        name: Model.
        data: What to train on, such as an `ImageData`; the same object may serve many runs.
        out: Folder of this run.
        scan: Scan order; None is the published one.
        seed: Of the weights, the order of the items, augmentation and dropout.
        max_epochs: Epochs.
        model: Further arguments of the task, such as `ImageClassifier`'s, for instance `{"lr": 1e-3}`.
        trainer: Further arguments of Lightning's `Trainer`, such as `{"precision": "bf16-mixed"}`.
        task: One of `mamba_zoo.tasks.registry.TASKS`; None is the first that trains on such data.

    Returns:
        The score on the test items under the name that the task gives it (`accuracy`, 0..1, for classifiers), `test`
        (every test metric), `curve` (one dictionary an epoch, as in `history.csv`), `seconds` (training alone, over
        all sessions of the run), `images_per_second` (or what the items are), `peak_memory_bytes` (of the GPU; None on
        a CPU), `parameters`, and `settings`. Plain values, as stored. Results of single items are in
        `test_predictions.npz`, for classifiers `target` and `predicted`, and the scores that comparisons pair in
        `test_items.npy`, where the task keeps them.

    Raises:
        ValueError: `out` holds a run with other settings, or an argument is wrong.
        KeyboardInterrupt: after Ctrl-C; call again to continue.
    """
    out = Path(out)
    task = task or task_for(type(data))
    settings = _plain(
        {
            "name": name,
            "scan": scan,
            "seed": seed,
            "max_epochs": max_epochs,
            "data": dict(data.hparams),
            "model": dict(model or {}),
            "trainer": dict(trainer or {}),
            **({} if task == DEFAULT else {"task": task}),
        }
    )
    if (stored := _stored(out, settings)) is not None:
        return stored
    write_atomically(out / "settings.json", lambda f: f.write(json.dumps(settings, indent=1).encode()))
    with quiet():
        seed_everything(seed, verbose=False)
        last = out / "last.ckpt"
        if last.exists():
            data.restore(read_checkpoint(last))
        module = make_task(name, data, scan, model, task)
        callbacks, history = run_callbacks(out, seed, module.monitor, module.monitor_mode)
        options = {**_TRAINER, **(trainer or {})}
        with trainer_settings(**{key: (trainer or {}).get(key) for key in ("accelerator", "devices")}):
            runner = Trainer(
                max_epochs=max_epochs, logger=False, callbacks=callbacks, plugins=[AtomicCheckpointIO()], **options
            )
        cuda = runner.strategy.root_device.type == "cuda"
        if cuda:
            torch.cuda.init()  # the counters do not exist before
            torch.cuda.reset_peak_memory_stats(runner.strategy.root_device)
        data.seed_order(seed)
        fit(runner, module, data, last if last.exists() else None)
        memory = torch.cuda.max_memory_allocated(runner.strategy.root_device) if cuda else None
        started = time.perf_counter()
        scores = runner.test(module, datamodule=data, verbose=False)[0]
        test_seconds = time.perf_counter() - started
    seconds = sum(row["seconds"] for row in history.rows)
    items = sum(row[module.unit] for row in history.rows)
    result = {
        module.score_name: scores[f"test/{module.monitor.partition('/')[2]}"],
        "test": {key.removeprefix("test/"): value for key, value in scores.items()},
        "curve": history.rows,
        "seconds": seconds,
        "test_seconds": test_seconds,
        f"{module.unit}_per_second": items / seconds if seconds else None,
        "peak_memory_bytes": memory,
        "parameters": sum(p.numel() for p in module.net.parameters()),
        "settings": settings,
    }
    if arrays := module.test_arrays():
        write_atomically(out / "test_predictions.npz", lambda f: np.savez(f, **arrays))
    if (per_item := module.test_items) is not None:
        write_atomically(out / "test_items.npy", lambda f: np.save(f, per_item))
    result = _plain(result)
    write_atomically(out / "metrics.json", lambda f: f.write(json.dumps(result, indent=1).encode()))
    return result


_TRAINER: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "gradient_clip_val": 1.0,
    "devices": 1,
}


def make_task(
    name: str,
    data: TaskData,
    scan: str | None = None,
    model: Mapping[str, Any] | None = None,
    task: str | None = None,
) -> Task:
    """The task that fits `data`, with what the data tell it; see `train_once` for the arguments."""
    kind: Any = find_task(task or task_for(type(data))).model_class
    order = {} if scan is None else {"scan": scan}
    return kind(name=name, **order, **data.told(), **(model or {}))


def _stored(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run, None if there is none; an unfinished run must at least agree."""
    if not any((out / name).exists() for name in ("last.ckpt", "metrics.json")):
        return None
    if not (out / "settings.json").exists():
        raise ValueError(f"out={out} holds a run of something else; choose another folder or remove it")
    found = json.loads((out / "settings.json").read_text())
    if found != settings:
        differ = sorted(key for key in settings | found if settings.get(key) != found.get(key))
        raise ValueError(
            f"out={out} holds a run with other settings ({', '.join(differ)}); choose another folder or remove it"
        )
    return json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else None


def _plain(value: Any) -> Any:
    """As it will be read back from JSON."""
    return json.loads(json.dumps(value, default=str))

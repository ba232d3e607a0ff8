"""Training, scoring and prediction on the user's own data; imported on first use, because Lightning takes seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._data import TaskData
    from ._task import Task
    from .classification import ImageClassifier
    from .image_data import ImageData
    from .registry import load_task
    from .train import train_once

_WHERE = {
    "ImageClassifier": "classification",
    "ImageData": "image_data",
    "Task": "_task",
    "TaskData": "_data",
    "load_task": "registry",
    "train_once": "train",
}

__all__ = ["ImageClassifier", "ImageData", "Task", "TaskData", "load_task", "train_once"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)

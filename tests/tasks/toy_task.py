"""The smallest task: a network that learns the slope of noisy lines; what a new task has to write, and no more."""

from __future__ import annotations

import argparse
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mamba_zoo.tasks import Task, TaskData


class Line(Dataset):
    """Lines of one split: `{"x": (points,), "slope": ()}`."""

    def __init__(self, points: int, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.slopes = torch.rand(count, generator=draw) * 2 - 1
        self.x = self.slopes[:, None] * torch.linspace(-1, 1, points) + 0.01 * torch.randn(
            count, points, generator=draw
        )

    def __len__(self) -> int:
        return len(self.slopes)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "slope": self.slopes[i]}


def stacked(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class LineData(TaskData):
    """Lines with their slopes."""

    tells = {"points": "points"}  # noqa: RUF012
    collate = stacked

    def __init__(self, root: str = "lines", points: int = 8, batch_size: int = 16, num_workers: int = 0) -> None:
        super().__init__(root, batch_size, num_workers)
        self.save_hyperparameters(logger=False)
        self.points = points

    def parts(self) -> dict[str, Dataset]:
        if self.root != "lines":
            raise FileNotFoundError(f"no lines at {self.root}")
        counts = {"train": 64, "val": 16, "test": 24}
        return {name: Line(self.points, count, seed) for seed, (name, count) in enumerate(counts.items())}


class SlopeReader(Task):
    """Reads the slope of a line."""

    unit = "lines"
    monitor, monitor_mode = "val/mse", "min"
    score_name = "mse"
    grid = None

    def __init__(
        self,
        name: str = "linear",
        scan: str | None = None,
        points: int = 4,
        lr: float = 1e-2,
        ema_decay: float | None = None,
        freeze: Literal["none", "backbone", "bn"] = "none",
    ) -> None:
        """Read slopes.

        Args:
            name: Of the model.
            scan: Points to read, "none" or "all"; stands for an order.
            points: Of a line.
            lr: See `Task`.
            ema_decay: See `Task`.
            freeze: See `Task`.
        """
        net = nn.Linear(points, 1, bias=False)
        super().__init__(net, name, lr=lr, weight_decay=0.0, ema_decay=ema_decay, freeze=freeze)
        self.save_hyperparameters()
        self.blind = scan == "none"
        self.errors: list[Tensor] = []

    def batch_items(self, batch: dict[str, Tensor]) -> int:
        return len(batch["x"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._errors(batch, self.net).mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=self.batch_items(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.errors.append(self._evaluate(batch, "test"))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.inference_net(batch["x"])[:, 0]

    def on_test_epoch_start(self) -> None:
        self.errors.clear()

    @property
    def test_items(self) -> np.ndarray:
        return torch.cat(self.errors).double().numpy()

    @classmethod
    def predict_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--digits", type=int, default=2)

    def predict_files(self, args: argparse.Namespace) -> str:
        line = torch.from_numpy(np.loadtxt(args.data, dtype=np.float32))
        return f"slope {float(self.inference_net(line)):.{args.digits}f}"

    def _errors(self, batch: dict[str, Tensor], net: nn.Module) -> Tensor:
        return (net(batch["x"] * (not self.blind))[:, 0] - batch["slope"]) ** 2

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> Tensor:
        errors = self._errors(batch, self.inference_net)
        self.log(f"{split}/mse", errors.mean(), on_epoch=True, batch_size=len(errors))
        return errors

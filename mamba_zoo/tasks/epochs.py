"""Randomness that depends on seed and epoch alone, so that an interrupted run continues as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Sampler

_STRIDE = 1_000_003  # a prime, so that (seed, epoch, rank) of nearby runs do not meet


def epoch_number(trainer: Trainer) -> int:
    """Epochs whose training is complete, which does not count the one that runs."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


class EpochShuffle(Sampler[int]):
    """A fresh permutation each epoch, the same one whenever that epoch is run again.

    Args:
        length: Items.
        seed: Of all permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * _STRIDE + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()


class EpochLoader(DataLoader):
    """A loader that starts reading at the first batch asked for.

    The trainer makes the first iterator before it has announced the epoch and before `EpochSeed` has run; workers that
    start there would shuffle and augment with the wrong seed.
    """

    def __iter__(self) -> Any:
        """Batches of one epoch."""
        yield from super().__iter__()


class EpochSeed(Callback):
    """Before each epoch, seed every generator from the run's seed, the epoch and the process.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed `random`, numpy and torch."""
        value = (self.seed * _STRIDE + epoch_number(trainer)) * 1009 + trainer.global_rank
        value %= 2**32
        random.seed(value)
        np.random.seed(value)  # timm's augmentation and mixup draw from numpy's global generator
        torch.manual_seed(value)

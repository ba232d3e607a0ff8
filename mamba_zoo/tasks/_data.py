"""What all data have in common: three parts, their loaders, and what they tell the model."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from .epochs import EpochLoader, EpochShuffle

Split = Literal["train", "val", "test"]
_MOST_NAMES = 100_000  # files whose names a checkpoint holds
_CHECKPOINT: ContextVar[Mapping[str, Any]] = ContextVar("_CHECKPOINT")


@contextlib.contextmanager
def restoring(checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """Data that are made meanwhile have the parts of the run of a checkpoint; see `TaskData.restore`."""
    token = _CHECKPOINT.set(checkpoint)
    try:
        yield
    finally:
        _CHECKPOINT.reset(token)


class TaskData(LightningDataModule):
    """Training, validation and test items of one source.

    A subclass lists its items in `parts`, and says in `tells` what the model must know of them. Its constructor calls
    this one and `save_hyperparameters(logger=False)`; it reads no file, so that wrong settings end at once.

    Attributes:
        tells: For each argument of the model that follows from the data, the attribute or property of this object that
            holds it. Values are plain, so that a checkpoint can hold them.
        measured: Arguments among them that training measured of its items, such as their mean. Other data are scored by
            what the model was told, and need not be like it.
        collate: Makes a batch of a list of items; None is torch's own, which stacks tensors.

    Args:
        root: Name or folder of the source.
        batch_size: Items a step and device.
        num_workers: Processes that read items; 0 reads them in the training process.

    Raises:
        ValueError: a setting out of range.
    """

    tells: ClassVar[Mapping[str, str]] = {}
    measured: ClassVar[tuple[str, ...]] = ()
    collate: ClassVar[Callable[[list[Any]], Any] | None] = None

    def __init__(self, root: str, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1 and num_workers={num_workers} at least 0")
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.order_seed = 0
        self.taken: dict[str, Any] = {}
        self.new_files: list[str] = []
        self._kept: dict[str, Any] = {}
        self._splits: dict[str, Dataset] | None = None
        self.restore(_CHECKPOINT.get({}))

    @classmethod
    def own_settings(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `settings` that the constructor takes."""
        taken = inspect.signature(cls).parameters
        return {key: value for key, value in settings.items() if key in taken}

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Store the arguments of the constructor, and not what only a parent's constructor takes.

        Args:
            args: See Lightning's `save_hyperparameters`, as for all that follow.
            ignore: Arguments that are not stored.
            frame: Of the constructor.
            logger: Whether loggers are given them.
        """
        current = inspect.currentframe()
        families = (base for base in type(self).__mro__ if issubclass(base, TaskData))
        everything = {key for base in families for key in inspect.signature(base).parameters}
        foreign = everything - set(inspect.signature(type(self)).parameters)
        more = [ignore] if isinstance(ignore, str) else list(ignore or ())
        frame = frame or (current and current.f_back)
        super().save_hyperparameters(*args, ignore=[*foreign, *more], frame=frame, logger=logger)

    def parts(self) -> dict[str, Dataset]:
        """The data sets "train", "val" and "test", listed and split; called once, on first use."""
        raise NotImplementedError

    def divided(
        self, files: Sequence[Any], draw: Callable[[], Mapping[str, Sequence[int] | np.ndarray]]
    ) -> dict[str, list[int]]:
        """Numbers of the items of each part, for `parts` where they are drawn.

        Checkpoints keep the names of the files of each part. A run that is tested or resumed has the same parts though
        files were added since, which are left out; of more than 100,000 files it keeps a digest, and they must be the
        same.

        Args:
            files: Path of each item; items that are no files are drawn and not kept.
            draw: Draws the parts.

        Raises:
            FileNotFoundError: files of the run are gone.
            ValueError: files were added, of which only a digest is kept.
        """
        if not files or not all(isinstance(file, Path) for file in files):
            return {part: [int(i) for i in index] for part, index in draw().items()}
        base = Path(self.root).expanduser()
        base = base.parent if base.is_file() else base
        names = [Path(os.path.relpath(file, base)).as_posix() for file in files]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest() if len(names) > _MOST_NAMES else None
        if self._kept.get("digest") != digest and "digest" in self._kept:
            raise ValueError(
                f"the files of {self.root} are not those that this run was split from; put them back as they were, or "
                "train anew with folders train, val and test"
            )
        if "parts" not in self._kept:
            found = {part: [int(i) for i in index] for part, index in draw().items()}
            listed = {part: [names[i] for i in index] for part, index in found.items()}
            self._kept = {"parts": listed} if digest is None else {"digest": digest}
            return found
        numbers = {name: i for i, name in enumerate(names)}
        kept = {name for part in self._kept["parts"].values() for name in part}
        if gone := sorted(kept - set(numbers)):
            raise FileNotFoundError(
                f"{len(gone)} of the {len(kept)} files that this run was split from are not in {self.root}, the first "
                f"is {gone[0]}; put them back, or train anew"
            )
        self.new_files = sorted(set(numbers) - kept)
        return {part: [numbers[name] for name in part_names] for part, part_names in self._kept["parts"].items()}

    def state_dict(self) -> dict[str, Any]:
        """The files of each part, if they were drawn."""
        return dict(self._kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the parts of a run."""
        if state_dict != self._kept:
            self._kept, self._splits = dict(state_dict), None

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the parts of the run of a checkpoint, if it says them; before these data are read."""
        self.load_state_dict(checkpoint.get(type(self).__qualname__, self._kept))

    def told(self) -> dict[str, Any]:
        """Arguments of the model that follow from the data."""
        return {argument: getattr(self, source) for argument, source in self.tells.items()}

    def split(self, name: Split) -> Any:
        """One of the three parts, a data set with a length; see `scored_part`."""
        self.setup()
        assert self._splits is not None
        return self._splits[self.scored_part(name)]

    def scored_part(self, name: Split) -> Split:
        """The part that stands for `name`: where the source has no test items, validation stands for the test."""
        self.setup()
        assert self._splits is not None
        return "val" if name == "test" and "test" not in self._splits else name

    def describe(self, unit: str) -> list[tuple[str, str]]:
        """Rows for the summary of a run; `unit` is the plural of one item, such as "images"."""
        counts = {name: len(self.split(name)) for name in ("train", "val", "test") if self.scored_part(name) == name}
        shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        return [(unit, shown if "test" in counts else f"{shown}, no test: test scores are those of val"), *self.notes()]

    def notes(self) -> list[tuple[str, str]]:
        """Rows on what was left out, for the summaries of runs and tests."""
        if not self.new_files:
            return []
        count = f"{len(self.new_files):,} file{'s' * (len(self.new_files) > 1)}"
        return [("new files", f"{count} added since the run was split, the first is {self.new_files[0]}: left out")]

    def count(self, data: Dataset) -> int:
        """Items of a part, in the unit that `mamba-zoo test` tells."""
        return len(data)  # type: ignore[arg-type]

    def scored(self, model: Any, split: Split, other: bool) -> Dataset:
        """The part that `mamba-zoo test` scores.

        Args:
            model: The trained `Task`.
            split: Part asked for; of other data without parts, every item is scored.
            other: Whether the user named these data, instead of those that `model` was trained on.

        Raises:
            ValueError: data that do not fit the model.
        """
        if other:
            self.adopt(model)
            if self.undivided():
                self._splits, split = {"test": self.everything(model)}, "test"
        self.compare(model, other)
        return self.split(split)

    def adopt(self, model: Any) -> None:
        """Take from the model what training measured; called before these data are read."""
        self.taken = {key: model.hparams[key] for key in self.measured}

    def compare(self, model: Any, other: bool) -> None:
        """Check that these data are what the model can be scored on; see `scored`.

        Raises:
            ValueError: they are not.
        """
        for key, source in self.tells.items():
            if other and key in self.measured:
                continue
            value, trained = getattr(self, source), model.hparams.get(key)
            if value != trained:
                raise ValueError(
                    f"{key} of {self.root} is {_short(value)}, but the model was trained with {_short(trained)}"
                )

    def undivided(self) -> bool:
        """Whether these data come without parts of their own, so that a test of another model scores all of them."""
        return False

    def everything(self, model: Any) -> Dataset:
        """Every item of undivided data, as `model` is tested on them.

        Raises:
            ValueError: items that do not fit the model.
        """
        raise NotImplementedError

    def seed_order(self, seed: int) -> None:
        """Draw the order of the training items from `seed` from now on; the split stays as it is."""
        self.order_seed = seed

    def setup(self, stage: str | None = None) -> None:
        """List and split the items; only the first call works.

        Args:
            stage: Not read; all parts are set up together.
        """
        if self._splits is None:
            with torch.inference_mode(False):  # a test may come first, and training must be able to use its tensors
                self._splits = self.parts()

    def train_dataloader(self) -> DataLoader:
        """Shuffled by seed and epoch; the last batch is dropped unless it is the only one."""
        data = self.split("train")
        options = {"sampler": EpochShuffle(len(data), self.order_seed), "drop_last": True}
        return self.loader(data, min(self.batch_size, len(data)), self.num_workers, **options)

    def val_dataloader(self) -> DataLoader:
        """In order, nothing dropped."""
        return self.loader(self.split("val"), self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """In order, nothing dropped."""
        return self.loader(self.split("test"), self.batch_size, self.num_workers)

    def loader(self, data: Dataset, batch_size: int, num_workers: int, **options: Any) -> DataLoader:
        """Batches of `data`; `options` are those of torch's `DataLoader`."""
        return EpochLoader(
            data,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=type(self).collate,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

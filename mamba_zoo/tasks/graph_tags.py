"""Graphs with any number of labels each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from ._graph_files import DIGIT_TAGS
from .graph_data import GraphData, Items, Positions


class TaggedGraphData(GraphData):
    """Graphs with 0 or 1 for each class, or NaN where it is unknown; see `GraphData` for what is not described.

    Args:
        root: "digits-tags", "pyg:LRGBDataset:Peptides-func", "moleculenet:Tox21" and their like, or a folder whose
            `graphs.csv` has a column of 0 and 1 for each class, empty where it is unknown.
        pe: See `GraphSource`.
        pe_steps: See `GraphSource`.
        folds: See `GraphData`; drawn without regard to classes.
        fold: See `GraphData`.
        validate_on_test: See `GraphData`.
        split_seed: See `GraphSource`.
        batch_size: See `GraphSource`.
        num_workers: See `GraphSource`.
        download_dir: See `GraphSource`.
    """

    tells: ClassVar[Mapping[str, str]] = {**GraphData.tells, "class_names": "class_names"}

    def __init__(
        self,
        root: str = DIGIT_TAGS,
        pe: Positions = "none",
        pe_steps: int = 16,
        folds: int | None = None,
        fold: int = 0,
        validate_on_test: bool = False,
        split_seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        download_dir: str = "data",
    ) -> None:
        super().__init__(
            root, pe, pe_steps, folds, fold, validate_on_test, split_seed, batch_size, num_workers, download_dir
        )
        self.save_hyperparameters(logger=False)

    @cached_property
    def labels(self) -> np.ndarray:
        """0, 1 or NaN for each graph and class, `(graphs, classes)`.

        Raises:
            ValueError: other labels, or none that is known.
        """
        found = self.targets.astype(np.float32)
        odd = found[~(np.isnan(found) | (found == 0) | (found == 1))]
        if len(odd):
            raise ValueError(
                f"labels of {self.root} hold {odd[0]:g}, but tags are a column a class of 0 or 1, NaN where unknown; "
                f"train these with --task {self.fitting_task}"
            )
        if np.isnan(found).all():
            raise ValueError(f"no graph of {self.root} has a known label; all of them are NaN")
        return found

    @property
    def num_classes(self) -> int:
        """Classes."""
        return self.labels.shape[1]

    @property
    def class_names(self) -> list[str]:
        """Columns of `graphs.csv`, or numbers."""
        return list(self.graphs[0].get("target_names") or map(str, range(self.num_classes)))

    def parts(self) -> dict[str, Dataset]:
        """Graphs of each split.

        Raises:
            ValueError: a class that no training graph is known to have, or a split that can score none.
        """
        found = super().parts()
        labels = {part: torch.stack([g.y.reshape(-1) for g in cast(Items, data).items]) for part, data in found.items()}
        has = (labels["train"] == 1).any(0).tolist()
        if lost := [name for name, any_graph in zip(self.class_names, has, strict=True) if not any_graph]:
            raise ValueError(
                f"no training graph of {self.root} is known to have class {', '.join(lost[:5])}, so that it cannot be "
                "learnt; leave its column out, or split otherwise"
            )
        for part, of_part in labels.items():
            if not ((of_part == 1).any(0) & (of_part == 0).any(0)).any():
                raise ValueError(
                    f"the {part} graphs of {self.root} can score no class: of none are there both graphs known to have "
                    "it and graphs known to lack it; split otherwise"
                )
        return found

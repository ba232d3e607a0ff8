"""Graphs to train on: data sets of PyTorch Geometric, folders, bundled ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..scans.graph import Graphs, graph_orders, order_key
from ._data import TaskData
from ._graph_files import DIGITS, read_graphs
from .epochs import EpochLoader

Positions = Literal["none", "lap", "rwse"]
_AT_ONCE = 1024  # graphs whose orders are computed together
_EVERYWHERE = 20  # graphs of a class that are enough to have it in every part of 80, 10 and 10 percent


class Items(Dataset):
    """A list as a data set."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class GraphSource(TaskData):
    """What all graph data share; see its three kinds.

    Args:
        root: Source, see `mamba_zoo.tasks._graph_files.read_graphs`.
        pe: Positions that are prepared for the model: "none", "lap" or "rwse".
        pe_steps: Frequencies of "lap", or steps of "rwse".
        split_seed: Of automatic splits.
        batch_size: Graphs a step and device.
        num_workers: Processes that put batches together; 0 does it in the training process.
        download_dir: Where data sets of PyG are kept.
    """

    tells: ClassVar[Mapping[str, str]] = {
        "in_chans": "in_chans", "edge_chans": "edge_chans", "encoder": "encoder", "edges": "edges", "pe": "pe",
        "pe_steps": "pe_steps",
    }  # fmt: skip

    def __init__(
        self,
        root: str,
        pe: Positions = "none",
        pe_steps: int = 16,
        split_seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        download_dir: str = "data",
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.pe, self.pe_steps, self.split_seed, self.download_dir = pe, pe_steps, split_seed, download_dir
        self._ordered: set[str] = set()

    @cached_property
    def graphs(self) -> list[Any]:
        """All graphs as PyG `Data`, with their positions."""
        from ..backbones._pyg import AddLaplacian  # first: it says how to install PyG

        from torch_geometric.transforms import AddRandomWalkPE  # isort: skip

        transform: Any = {
            "lap": AddLaplacian(self.pe_steps), "rwse": AddRandomWalkPE(self.pe_steps), "none": None,
        }[self.pe]  # fmt: skip
        found = read_graphs(self.root, self.download_dir)
        return [transform(data) for data in found] if transform else found

    @property
    def encoder(self) -> str:
        """The encoder of nodes: "smiles" for molecules of MoleculeNet, "atom" for those of LRGB, else "linear"."""
        if self.root.startswith(("pyg:LRGBDataset:Peptides", "pyg:LRGBDataset:PCQM")):
            return "atom"
        return "smiles" if self.root.startswith("moleculenet:") else "linear"

    @property
    def edges(self) -> str:
        """The encoder of edges: "none", "smiles" or "bond" for molecules, or "linear"."""
        if self.graphs[0].get("edge_attr") is None:
            return "none"
        return {"smiles": "smiles", "atom": "bond"}.get(self.encoder, "linear")

    @property
    def in_chans(self) -> int:
        """Features of a node."""
        return self.graphs[0].x.shape[1]

    @property
    def edge_chans(self) -> int:
        """Features of an edge; 1 where there are none."""
        features = self.graphs[0].get("edge_attr")
        return 1 if features is None else features[:1].numel() if len(features) else features.shape[-1]

    def add_orders(self, scan: str) -> None:
        """Prepare the visiting orders of all graphs, once for each `scan`."""
        key = order_key(scan)
        if key not in self._ordered:
            graphs = self.all_graphs()
            for start in range(0, len(graphs), _AT_ONCE):
                part = graphs[start : start + _AT_ONCE]
                for data, order in zip(part, graph_orders(scan, [Graphs.of(data) for data in part]), strict=True):
                    data[key] = order.int()
            self._ordered.add(key)

    def all_graphs(self) -> list[Any]:
        """Every graph that batches are made of."""
        self.setup()
        return self.graphs


class GraphData(GraphSource):
    """Graphs with a class or with targets each.

    Args:
        root: "digits", "tu:MUTAG", "moleculenet:ESOL" and their like, or a folder with `graphs.csv`.
        pe: See `GraphSource`, as for all that are not described here.
        pe_steps: See `GraphSource`.
        folds: Split into so many parts, alike in their classes, of which number `fold` is the test set; None takes the
            splits of a folder, or draws 80, 10 and 10 percent. Where the data set's folder holds `gin_10fold`, the
            folds of Xu et al. (arXiv:1810.00826), those are taken for 10 folds.
        fold: From 0.
        validate_on_test: Validate on the test set, and train on everything else. Choosing the best epoch by that is
            the protocol of Xu et al.; it flatters.
        split_seed: See `GraphSource`.
        batch_size: See `GraphSource`.
        num_workers: See `GraphSource`.
        download_dir: See `GraphSource`.

    Raises:
        ValueError: a fold that does not exist.

    Warns:
        UserWarning: folds that are not alike in their classes, one of which has fewer graphs than there are folds.
    """

    tells: ClassVar[Mapping[str, str]] = {**GraphSource.tells, "num_classes": "num_classes"}

    def __init__(
        self,
        root: str = DIGITS,
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
        super().__init__(root, pe, pe_steps, split_seed, batch_size, num_workers, download_dir)
        if folds is not None and not 0 <= fold < folds:
            raise ValueError(f"fold={fold} must be from 0 to {folds - 1}, for folds={folds}")
        self.folds, self.fold, self.validate_on_test = folds, fold, validate_on_test
        self.save_hyperparameters(logger=False)

    @cached_property
    def targets(self) -> np.ndarray:
        """Targets of all graphs as they are given, `(graphs, targets)`.

        Raises:
            ValueError: graphs without any, or with different numbers of them.
        """
        if any(data.get("y") is None for data in self.graphs):
            raise ValueError(f"{self.root} has graphs without a label; training needs graphs.csv or the data set's own")
        counts = sorted({data.y.numel() for data in self.graphs})
        if len(counts) > 1:
            raise ValueError(
                f"graphs of {self.root} have {counts[0]} to {counts[-1]} labels each, perhaps those of their nodes; "
                "give every graph as many, in graphs.csv or the data set's y"
            )
        return np.stack([data.y.reshape(-1).numpy() for data in self.graphs])

    @cached_property
    def labels(self) -> np.ndarray:
        """Targets of all graphs, `(graphs, targets)`; integers if all are whole."""
        found = self.targets
        whole = found.dtype.kind == "f" and bool((found == np.rint(found)).all())
        return found.astype(np.int64) if whole else found

    @property
    def fitting_task(self) -> str:
        """The task that learns such labels."""
        if len(self.graphs) == 1:
            return "node-classification"
        found, unknown = self.targets, np.isnan(self.targets)
        one = found.shape[1] == 1
        if bool((unknown | (found == 0) | (found == 1)).all()) and (not one or unknown.any()):
            return "graph-tagging"
        return "graph-classification" if one and bool((found == np.rint(found)).all()) else "graph-regression"

    @property
    def num_classes(self) -> int:
        """Classes.

        Raises:
            ValueError: labels that are not one class number each.
        """
        if self.labels.shape[1] != 1 or self.labels.dtype.kind == "f":
            unknown = ", some unknown" if np.isnan(self.targets).any() else ""
            raise ValueError(
                f"graphs of {self.root} have {self.labels.shape[1]} targets of {self.labels.dtype}{unknown}, not one "
                f"class number each; train them with --task {self.fitting_task}"
            )
        if self.labels.min() < 0:
            raise ValueError(
                f"labels of {self.root} go down to {self.labels.min()}, but classes are numbered from 0; give -1 and 1 "
                "as 0 and 1, or train numbers with --task graph-regression"
            )
        return int(self.labels.max()) + 1

    def undivided(self) -> bool:
        """Unless `graphs.csv` or the data set says which graph is of which part."""
        return not all(data.get("split_name") for data in self.graphs)

    def everything(self, model: Any) -> Dataset:
        """All graphs."""
        return Items([self._plain(data) for data, _ in zip(self.graphs, self.labels, strict=True)])

    def parts(self) -> dict[str, Dataset]:
        """Graphs of each split."""
        names = [data.get("split_name") for data, _ in zip(self.graphs, self.labels, strict=True)]
        if all(names) and self.folds is None:
            where = {part: np.flatnonzero(np.array(names) == part) for part in ("train", "val", "test")}
            if empty := [part for part, found in where.items() if not len(found)]:
                raise ValueError(f"graphs.csv of {self.root} has no {empty[0]} graphs; its split is train, val or test")
        else:
            where = self._drawn()
        return {part: Items([self._plain(self.graphs[i]) for i in found]) for part, found in where.items()}

    def all_graphs(self) -> list[Any]:
        """Every graph of the three parts."""
        return [data for part in ("train", "val", "test") for data in self.split(part).items]

    def loader(self, data: Dataset, batch_size: int, num_workers: int, **options: Any) -> DataLoader:
        """PyG batches."""
        from torch_geometric.data import Batch

        return EpochLoader(
            data, batch_size=batch_size, num_workers=num_workers, collate_fn=Batch.from_data_list, **options
        )

    @staticmethod
    def _plain(data: Any) -> Any:
        """A copy without what does not go into batches."""
        data = data.clone()
        for key in ("split_name", "smiles", "split_of_node", "target_names", "degree_profile"):
            if key in data:
                del data[key]
        return data

    def _drawn(self) -> dict[str, np.ndarray]:
        from sklearn.model_selection import StratifiedKFold, train_test_split

        if len(self.graphs) < 3:
            raise ValueError(
                f"{self.root} holds {len(self.graphs)} graph{'s' * (len(self.graphs) > 1)}, too few to train, validate "
                "and test on; for the nodes or edges of one graph take --task node-classification, node-regression, "
                "edge-classification or edge-regression"
            )
        everything: Any = np.arange(len(self.graphs))
        classes = self.labels[:, 0] if self.labels.dtype.kind == "i" else None
        given: Any = self._given_fold() if self.folds is not None else None
        if classes is not None:
            numbers, counts = np.unique(classes, return_counts=True)
            if counts.min() < (self.folds or _EVERYWHERE):
                if self.folds is not None and given is None:
                    warnings.warn(
                        f"folds={self.folds} of {self.root} are drawn without regard to classes: class "
                        f"{numbers[counts.argmin()]} has {counts.min()} graphs, fewer than there are folds",
                        stacklevel=2,
                    )
                classes = None
        if given is None and self.folds is not None:
            cut = StratifiedKFold(self.folds, shuffle=True, random_state=self.split_seed)
            strata = np.zeros(len(everything), dtype=int) if classes is None else classes
            given = list(cut.split(everything, strata))[self.fold][1]
        elif given is None:
            given = train_test_split(everything, test_size=0.1, random_state=self.split_seed, stratify=classes)[1]
        test: Any = np.sort(given)
        rest: Any = np.setdiff1d(everything, test)
        if self.validate_on_test:
            return {"train": rest, "val": test, "test": test}
        size = len(test) if len(test) < len(rest) / 2 else 0.1
        strata = None if classes is None else classes[rest]
        if strata is not None:
            counts = np.unique(strata, return_counts=True)[1]
            if counts.min() < 2 or len(counts) > size * (1 if isinstance(size, int) else len(rest)):
                strata = None  # too few for a graph of each class on both sides
        cut = train_test_split(rest, test_size=size, random_state=self.split_seed, stratify=strata)
        return {"train": np.sort(cut[0]), "val": np.sort(cut[1]), "test": np.sort(test)}

    def _given_fold(self) -> np.ndarray | None:
        name = self.root.partition(":")[2]
        file = Path(self.download_dir).expanduser() / name / "gin_10fold" / f"test_idx-{self.fold + 1}.txt"
        return np.loadtxt(file, dtype=np.int64) if name and self.folds == 10 and file.exists() else None


class TargetData(GraphData):
    """Graphs with one or more numbers each; see `GraphData` for the arguments."""

    tells: ClassVar[Mapping[str, str]] = {**GraphSource.tells, "center": "center", "scale": "scale"}
    measured: ClassVar[tuple[str, ...]] = ("center", "scale")

    def __init__(
        self,
        root: str = DIGITS,
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
        """Targets of all graphs, `(graphs, targets)`, floating.

        Raises:
            ValueError: targets that are unknown.
        """
        if lost := int(np.isnan(self.targets).any(1).sum()):
            raise ValueError(
                f"{lost} graphs of {self.root} have targets that are unknown, of which numbers cannot be learnt; leave "
                "these graphs out, or train labels of 0 and 1 with --task graph-tagging"
            )
        return self.targets.astype(np.float32)

    @property
    def center(self) -> list[float]:
        """Mean of each target over the training graphs."""
        return self._targets().mean(0).tolist()

    @property
    def scale(self) -> list[float]:
        """Standard deviation of each target over the training graphs."""
        return self._targets().std(0).clamp(min=1e-6).tolist()

    def _targets(self) -> Tensor:
        return torch.stack([data.y.reshape(-1).float() for data in self.split("train").items])

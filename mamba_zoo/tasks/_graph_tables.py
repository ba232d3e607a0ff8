"""Graphs from folders of CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SPLITS = ("train", "val", "test")
_UNKNOWN = -1  # the class of a node that no split has


def read_folder(folder: Path) -> list[Any]:
    """Graphs from tables: `nodes.csv`, `edges.csv` and, where graphs have labels, `graphs.csv`.

    A row of `nodes.csv` is a node: `graph` (its number from 0; one graph without this column), `label`, `split` (train,
    val or test; empty for a node of none, which needs no label), and features in all other columns. A row of
    `edges.csv` is a directed edge: `source` and `target`, the numbers of nodes within their graph, `graph` likewise,
    `label` (a number to predict), and features. A row of `graphs.csv` is a graph: `graph` (its number; without this
    column rows are in the order of the numbers), `label` (or several columns of targets, empty where unknown) and
    `split`; with `split` alone, the labels are those of the nodes. Labels of classes are numbers from 0.

    Returns: PyG `Data`, whose `x` is None without a column of features.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a value that is no number, a split that is none, a node or graph that does not exist, or a graph
            without a row or with several.
    """
    from torch_geometric.data import Data

    nodes, edges = _Table.read(folder / "nodes.csv"), _Table.read(folder / "edges.csv")
    graphs = _Table.read(folder / "graphs.csv") if (folder / "graphs.csv").exists() else None
    if not nodes.rows:
        raise ValueError(f"{nodes.path} has no rows; a row is a node")
    of_node, of_edge = nodes.numbers("graph"), edges.numbers("graph")
    count = int(of_node.max()) + 1
    if len(of_edge) and int(of_edge.max()) >= count:
        raise ValueError(f"{edges.path} names graph {int(of_edge.max())}, but nodes.csv has {count} graphs")
    x, edge_attr = nodes.floats(("graph", "label", "split")), edges.floats(("graph", "source", "target", "label"))
    ends = torch.stack([edges.numbers("source"), edges.numbers("target")])
    targets = [] if graphs is None else [name for name in graphs.columns if name not in ("graph", "split")]
    labels = nodes.labels(nodes.splits()) if "label" in nodes.columns and not targets else None
    numbers = edges.labels([]) if "label" in edges.columns else None
    where = None if graphs is None else graphs.places(count)
    of_graphs = None if graphs is None or where is None else [graphs.splits(complete=True)[row] for row in where]
    y = graphs.floats(("graph", "split"), empty=math.nan) if graphs is not None else None
    found = []
    for i in range(count):
        mine, own = of_node == i, of_edge == i
        joined = ends[:, own]
        if joined.numel() and int(joined.max()) >= int(mine.sum()):
            raise ValueError(f"{edges.path}: graph {i} has no node {int(joined.max())}")
        data = Data(x=x[mine] if x.shape[1] else None, edge_index=joined, num_nodes=int(mine.sum()))
        if edge_attr.shape[1]:
            data.edge_attr = edge_attr[own]
        if numbers is not None:
            data.edge_target = numbers[own]
        if labels is not None:
            data.y = labels[mine]
        if of_graphs is None and "split" in nodes.columns:
            splits = nodes.splits()
            data.split_of_node = [splits[row] for row in mine.nonzero()[:, 0].tolist()]
        if of_graphs is not None:
            data.split_name = of_graphs[i] or None
        if targets and y is not None and where is not None:
            data.y, data.target_names = y[where[i]][None], targets
        found.append(data)
    return found


def read_pairs(path: Path, nodes: int) -> Tensor:
    """Pairs of nodes `(2, p)` from the columns `source` and `target` of a table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a node does not exist.
    """
    table = _Table.read(path)
    if missing := {"source", "target"} - set(table.columns):
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}; pairs are rows with a source and a target")
    found = torch.stack([table.numbers("source"), table.numbers("target")])
    if found.numel() and int(found.max()) >= nodes:
        raise ValueError(f"{path} names nodes {int(found.min())} to {int(found.max())}, but there are {nodes}")
    return found


@dataclass(frozen=True)
class _Table:
    """Cells of a CSV file by column, as text."""

    path: Path
    columns: dict[str, list[str]]
    rows: int

    @classmethod
    def read(cls, path: Path) -> _Table:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; a folder of graphs holds nodes.csv, edges.csv and maybe graphs.csv"
            )
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            columns: dict[str, list[str]] = {name: [] for name in lines.fieldnames or []}
            for line in lines:
                for name, values in columns.items():
                    values.append((line[name] or "").strip())
        if not columns:
            raise ValueError(f"{path} is empty; its first line names the columns")
        return cls(path, columns, len(next(iter(columns.values()))))

    def numbers(self, name: str) -> Tensor:
        """A column of whole numbers `(rows,)`; zeros where there is none."""
        if name not in self.columns:
            return torch.zeros(self.rows, dtype=torch.long)
        return torch.tensor(self._cells(name, _whole, "a whole number from 0"), dtype=torch.long)

    def floats(self, others: Sequence[str], empty: float | None = None) -> Tensor:
        """All columns but `others`, `(rows, columns)`; `empty` stands for cells without text, if they may be."""
        names = [name for name in self.columns if name not in others]
        read = _finite if empty is None else (lambda text: empty if text.lower() in ("", "nan") else _finite(text))
        columns = [torch.tensor(self._cells(name, read, "a finite number")) for name in names]
        return torch.stack(columns, dim=1) if columns else torch.zeros(self.rows, 0)

    def labels(self, splits: Sequence[str]) -> Tensor:
        """The column `label`: whole numbers, or others if any is not whole; unknown where it and the split are empty.

        An unknown class is -1, an unknown number NaN.
        """
        unknown = torch.tensor([not text for text in self.columns["label"]], dtype=torch.bool)
        for row in unknown.nonzero()[:, 0].tolist():
            if not splits or splits[row]:
                raise ValueError(f"{self._cell('label', row)} is empty; it may be so for a node whose split is, too")
        found = torch.tensor(self._cells("label", lambda text: _finite(text or "0"), "a number"))
        if bool((found == found.round()).all()):
            return found.long().masked_fill(unknown, _UNKNOWN)
        return found.masked_fill(unknown, math.nan)

    def splits(self, complete: bool = False) -> list[str]:
        """The column `split` in lower case; none without it. `complete` has it in every row or in none."""
        if "split" not in self.columns:
            return [""] * self.rows if complete else []
        found = [text.lower() for text in self.columns["split"]]
        for row, name in enumerate(found):
            if name not in _SPLITS and (name or (complete and any(found))):
                raise ValueError(f"{self._cell('split', row)} is {name!r}; a split is {', '.join(_SPLITS)}")
        return found

    def places(self, count: int) -> list[int]:
        """The row of each of `count` graphs."""
        if self.rows != count:
            raise ValueError(f"{self.path} has {self.rows} rows, but nodes.csv has {count} graphs; a row is a graph")
        if "graph" not in self.columns:
            return list(range(count))
        rows = {number: row for row, number in enumerate(self.numbers("graph").tolist())}
        if missing := [i for i in range(count) if i not in rows]:
            raise ValueError(
                f"{self.path} has no row for graph {missing[0]}, and others for the same graph or for none"
            )
        return [rows[i] for i in range(count)]

    def _cells(self, name: str, read: Callable[[str], Any], what: str) -> list[Any]:
        found = []
        for row, text in enumerate(self.columns[name]):
            try:
                found.append(read(text))
            except ValueError:
                raise ValueError(f"{self._cell(name, row)} is {text!r}, which is not {what}") from None
        return found

    def _cell(self, name: str, row: int) -> str:
        return f"{self.path}, line {row + 2}, column {name!r}"


def _whole(text: str) -> int:
    if (found := int(text)) < 0:
        raise ValueError(text)
    return found


def _finite(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(text)
    return found

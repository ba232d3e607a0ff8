"""Graphs from data sets of PyTorch Geometric by name, from folders of CSV files, and from what comes with libraries."""

from __future__ import annotations

import csv
import difflib
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

KARATE, TIES, DIGITS, DIGIT_TAGS = "karate", "karate-ties", "digits", "digits-tags"
_TAGS = {"odd": (1, 3, 5, 7, 9), "high": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "loop": (0, 6, 8, 9)}
_LIBRARIES = ("planetoid", "tu", "moleculenet", "pyg")


def read_graphs(root: str, download_dir: str) -> list[Any]:
    """Every graph of a source, as PyG `Data` in memory.

    Args:
        root: "karate" (PyG's KarateClub); "karate-ties" (the same club with the strength of its ties); "digits" (the
            handwritten digits of scikit-learn, each the graph of its inked pixels); "digits-tags" (the same with what
            is true of each: odd, above four, prime, written with a loop); "planetoid:NAME", "tu:NAME" or
            "moleculenet:NAME", data sets of PyG; "pyg:CLASS" or "pyg:CLASS:NAME", any other class of
            `torch_geometric.datasets`, such as "pyg:GNNBenchmarkDataset:MNIST", its splits if it has some among them;
            or a folder, see `read_folder`.
        download_dir: Where data sets of PyG are kept; they are downloaded if they are not there.

    Raises:
        ValueError: an unknown source or data set.
        FileNotFoundError: no such folder, files missing in it, or a data set that cannot be downloaded.
        ImportError: PyG is not installed, or for molecules RDKit.
    """
    from ..backbones import _pyg  # noqa: F401 - says how to install PyG

    kind, colon, name = root.partition(":")
    if root == KARATE:
        from torch_geometric.datasets import KarateClub

        return [KarateClub()[0]]
    if root == TIES:
        return [_ties()]
    if root in (DIGITS, DIGIT_TAGS):
        return _digits(tags=root == DIGIT_TAGS)
    if colon and kind in _LIBRARIES:
        return _of_library(kind, name, download_dir)
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"root={root!r} is no folder; give one, or {KARATE}, {TIES}, {DIGITS}, {DIGIT_TAGS}, planetoid:Cora, "
            "tu:MUTAG, moleculenet:ESOL, or another data set of PyG by its class, such as pyg:GNNBenchmarkDataset:MNIST"
        )
    return read_folder(Path(root))


def read_folder(folder: Path) -> list[Any]:
    """Graphs from tables: `nodes.csv`, `edges.csv` and, where graphs have labels, `graphs.csv`.

    A row of `nodes.csv` is a node: `graph` (its number from 0; one graph without this column), `label`, `split` (train,
    val or test), and features in all other columns. A row of `edges.csv` is a directed edge: `source` and `target`, the
    numbers of nodes within their graph, `graph` likewise, `label` (a number to predict), and features. A row of
    `graphs.csv` is a graph: `label` (or several columns of targets, empty where unknown) and `split`; with `split`
    alone, the labels are those of the nodes. Labels of classes are numbers from 0.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a value that is no number, or a node or graph that does not exist.
    """
    from torch_geometric.data import Data

    nodes, edges = _table(folder / "nodes.csv"), _table(folder / "edges.csv")
    graphs = _table(folder / "graphs.csv") if (folder / "graphs.csv").exists() else None
    of_node, of_edge = _numbers(nodes, "graph"), _numbers(edges, "graph")
    count = int(of_node.max()) + 1
    if len(of_edge) and int(of_edge.max()) >= count:
        raise ValueError(f"{folder / 'edges.csv'} names graph {int(of_edge.max())}, but nodes.csv has {count} graphs")
    x, edge_attr = (
        _features(nodes, ("graph", "label", "split")),
        _features(edges, ("graph", "source", "target", "label")),
    )
    ends = torch.stack([torch.from_numpy(_numbers(edges, key)).long() for key in ("source", "target")])
    found = []
    for i in range(count):
        mine, own = torch.from_numpy(of_node == i), torch.from_numpy(of_edge == i)
        joined = ends[:, own]
        data = Data(x=x[mine], edge_index=joined, num_nodes=int(mine.sum()))
        if edge_attr.shape[1]:
            data.edge_attr = edge_attr[own]
        if "label" in edges:
            data.edge_target = _labels(edges)[own]
        if joined.numel() and int(joined.max()) >= int(mine.sum()):
            raise ValueError(f"{folder / 'edges.csv'}: graph {i} has no node {int(joined.max())}")
        rows = np.flatnonzero(of_node == i)
        if "label" in nodes and (graphs is None or set(graphs) <= {"split"}):
            data.y = _labels(nodes)[mine]
        if "split" in nodes and graphs is None:
            data.split_of_node = [nodes["split"][row] for row in rows]
        if graphs is not None:
            targets = [key for key in graphs if key != "split"]
            if targets:
                data.y = torch.tensor([[float(graphs[key][i] or "nan") for key in targets]])
                data.target_names = targets
            data.split_name = graphs["split"][i] if "split" in graphs else None
        found.append(data)
    return found


def read_pairs(path: Path, nodes: int) -> torch.Tensor:
    """Pairs of nodes `(2, p)` from the columns `source` and `target` of a table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a node does not exist.
    """
    table = _table(path)
    if missing := {"source", "target"} - set(table):
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}; pairs are rows with a source and a target")
    found = torch.stack([torch.from_numpy(_numbers(table, key)).long() for key in ("source", "target")])
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < nodes:
        raise ValueError(f"{path} names nodes {int(found.min())} to {int(found.max())}, but there are {nodes}")
    return found


def add_degree_profile(data: Any) -> Any:
    """The graph, its features the degree of each node and what the degrees of its neighbours are like (PyG's profile).

    `degree_profile` says so in the graph: whoever hides edges makes them anew, of those that are left.
    """
    from torch_geometric.transforms import LocalDegreeProfile

    data.num_nodes = data.num_nodes
    data.x, data.degree_profile = None, True
    return LocalDegreeProfile()(data)


def _ties() -> Any:
    """Zachary's karate club; targets are the strength of each tie, and of all ties of each member."""
    import networkx
    from torch_geometric.data import Data

    graph = networkx.karate_club_graph()
    pairs = torch.tensor([(a, b) for a, b in graph.edges()]).T
    weight = torch.tensor([graph[a][b]["weight"] for a, b in graph.edges()], dtype=torch.float32).repeat(2)
    edges = torch.cat([pairs, pairs.flip(0)], dim=1)
    strength = torch.zeros(len(graph)).index_add(0, edges[0], weight)
    data = Data(edge_index=edges, y=strength, edge_target=weight, num_nodes=len(graph))
    return add_degree_profile(data)


def _digits(tags: bool) -> list[Any]:
    """Inked pixels with intensity and place as features, joined to those of the eight around them that are inked.

    Their targets are the digits, or with `tags` what is true of them.
    """
    from sklearn.datasets import load_digits
    from torch_geometric.data import Data

    bunch: Any = load_digits()
    found = []
    for image, label in zip(torch.from_numpy(bunch.images).float() / 16, bunch.target.tolist(), strict=True):
        place = image.nonzero()
        x = torch.cat([image[image > 0][:, None], place / 7.0], dim=1)
        near = (place[:, None] - place[None]).abs().amax(-1) == 1
        data = Data(x=x, edge_index=near.nonzero().T.contiguous(), y=torch.tensor([label]))
        if tags:
            data.y = torch.tensor([[float(label in digits) for digits in _TAGS.values()]])
            data.target_names = list(_TAGS)
        found.append(data)
    return found


def _of_library(kind: str, name: str, download_dir: str) -> list[Any]:
    from torch_geometric import datasets

    makers: dict[str, Any] = {
        "planetoid": lambda root: datasets.Planetoid(root, name),
        "tu": lambda root: datasets.TUDataset(root, name, use_node_attr=True),
        "moleculenet": lambda root: datasets.MoleculeNet(root, name),
        "pyg": lambda root: _splits(_class_of(name), root, name.partition(":")[2]),
    }
    root = Path(download_dir).expanduser()
    folder = root / (name.lower() if kind == "moleculenet" else name.partition(":")[0])
    root = folder if kind == "pyg" else root
    with tempfile.TemporaryDirectory() as scratch:
        if folder.is_dir() and not (folder / "processed").is_dir() and not os.access(folder, os.W_OK):
            shutil.copytree(folder / "raw", Path(scratch) / folder.name / "raw")  # PyG writes beside the raw files
            root = Path(scratch)
        try:
            dataset = makers[kind](str(root))
        except AssertionError:
            raise ValueError(f"{kind}:{name} is no data set of PyG's {kind}; check the name") from None
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{kind}:{name} needs the package {error.name}: pip install {error.name}"
            ) from error
        except OSError as error:
            raise FileNotFoundError(
                f"{kind}:{name} is not in {folder}, and cannot be downloaded ({error}); check the name, or put its "
                f"files into {folder / 'raw'}"
            ) from error
        found = [dataset[i] for i in range(len(dataset))]
    for data in found:
        if data.x is None:
            add_degree_profile(data)
    return found


def _class_of(name: str) -> Any:
    """The class of `torch_geometric.datasets` that "CLASS" or "CLASS:NAME" names."""
    from torch_geometric import datasets

    kind = name.partition(":")[0]
    if kind not in datasets.__all__:
        near = difflib.get_close_matches(kind, datasets.__all__, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torch_geometric.datasets"
        raise ValueError(f"PyG has no data set {kind!r}; {hint}")
    return getattr(datasets, kind)


def _splits(kind: Any, root: str, name: str) -> list[Any]:
    """Every graph of a class of data sets; where it is split, each graph knows its split."""
    parameters = inspect.signature(kind).parameters
    needed = [key for key, value in parameters.items() if value.default is value.empty and key not in ("root", "name")]
    if "root" not in parameters or needed or ("name" in parameters) != bool(name):
        wanted = "a name after a second colon" if "name" in parameters else "nothing but its class"
        more = f", and arguments that cannot be given here ({', '.join(needed)})" if needed else ""
        raise ValueError(f"pyg:{kind.__name__} needs {wanted}{more}")
    given = {"root": root, **({"name": name} if name else {})}
    if "split" not in parameters or parameters["split"].default not in ("train", None):
        return list(kind(**given))
    found = []
    for split in ("train", "val", "test"):
        for data in kind(**given, split=split):
            data.split_name = split
            found.append(data)
    return found


def _table(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; a folder of graphs holds nodes.csv, edges.csv and maybe graphs.csv"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        columns: dict[str, list[str]] = {name: [] for name in rows.fieldnames or []}
        for row in rows:
            for name, values in columns.items():
                values.append(row[name] or "")
    if not columns:
        raise ValueError(f"{path} is empty; its first line names the columns")
    return columns


def _numbers(table: dict[str, list[str]], name: str) -> np.ndarray:
    """A column of whole numbers; zeros where there is none."""
    if name not in table:
        return np.zeros(len(next(iter(table.values()))), dtype=np.int64)
    try:
        return np.array([int(value) for value in table[name]], dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"column {name!r} must hold whole numbers from 0: {error}") from None


def _labels(table: dict[str, list[str]]) -> torch.Tensor:
    """The column `label`: whole numbers, or others if any of them is not whole."""
    try:
        found = torch.tensor([float(value) for value in table["label"]])
    except ValueError as error:
        raise ValueError(f"column 'label' must hold numbers: {error}") from None
    return found.long() if bool((found == found.round()).all()) else found


def _features(table: dict[str, list[str]], others: tuple[str, ...]) -> torch.Tensor:
    columns = [[float(value) for value in values] for name, values in table.items() if name not in others]
    length = len(next(iter(table.values())))
    return torch.tensor(columns).T.contiguous() if columns else torch.zeros(length, 0)

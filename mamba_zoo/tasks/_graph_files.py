"""Graphs from data sets of PyTorch Geometric by name, from folders, and from what comes with libraries."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ._graph_tables import read_folder

KARATE, TIES, DIGITS, DIGIT_TAGS = "karate", "karate-ties", "digits", "digits-tags"
_TAGS = {"odd": (1, 3, 5, 7, 9), "high": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "loop": (0, 6, 8, 9)}
_LIBRARIES = ("planetoid", "tu", "moleculenet", "pyg")


def read_graphs(root: str, download_dir: str) -> list[Any]:
    """Every graph of a source, as PyG `Data` in memory; nodes without features get `add_degree_profile`.

    Args:
        root: "karate" (PyG's KarateClub); "karate-ties" (the same club with the strength of its ties); "digits" (the
            handwritten digits of scikit-learn, each the graph of its inked pixels); "digits-tags" (the same with what
            is true of each: odd, above four, prime, written with a loop); "planetoid:NAME", "tu:NAME" or
            "moleculenet:NAME", data sets of PyG; "pyg:CLASS" or "pyg:CLASS:NAME", any other class of
            `torch_geometric.datasets`, such as "pyg:GNNBenchmarkDataset:MNIST", its splits if it has some among them;
            or a folder of tables, see `_graph_tables.read_folder`.
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
        found = _of_library(kind, name, download_dir)
    elif Path(root).is_dir():
        found = read_folder(Path(root))
    else:
        raise FileNotFoundError(
            f"root={root!r} is no folder; give one, or {KARATE}, {TIES}, {DIGITS}, {DIGIT_TAGS}, planetoid:Cora, "
            "tu:MUTAG, moleculenet:ESOL, or another data set of PyG by its class, such as pyg:GNNBenchmarkDataset:MNIST"
        )
    return [add_degree_profile(data) if data.x is None else data for data in found]


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
        return [dataset[i] for i in range(len(dataset))]


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

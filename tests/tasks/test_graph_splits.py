"""What training, validation and test see of a graph, and of a set of graphs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mamba_zoo.tasks.graph_data import GraphData
from mamba_zoo.tasks.graph_edges import EdgeData
from mamba_zoo.tasks.graph_nodes import NodeData
from mamba_zoo.tasks.graph_targets import EdgeTargetData
from mamba_zoo.tasks.recipes import shipped
from mamba_zoo.tasks.registry import find_task


def write_graph(folder: Path, nodes: list[str], edges: list[str]) -> str:
    """Tables of rows as they are given; the first ones name the columns."""
    folder.mkdir(exist_ok=True)
    (folder / "nodes.csv").write_text("\n".join(nodes) + "\n")
    (folder / "edges.csv").write_text("\n".join(edges) + "\n")
    return str(folder)


@pytest.mark.parametrize("rows", ["both ways", "one way", "all but one both ways", "twice", "with loops"])
def test_a_hidden_edge_is_hidden_in_every_row(rows, tmp_path):
    draw = np.random.default_rng(0)
    once = sorted({(int(a), int(b)) for a, b in np.sort(draw.integers(0, 40, (120, 2))) if a != b})
    both = [pair for a, b in once for pair in ((a, b), (b, a))]
    found = {"both ways": both, "one way": once, "all but one both ways": both[:-1], "twice": both * 2,
             "with loops": [*both, *((a, a) for a in range(40))]}[rows]  # fmt: skip
    edges = ["source,target,row", *(f"{a},{b},{i}" for i, (a, b) in enumerate(found))]
    root = write_graph(tmp_path, ["x", *(["1"] * 40)], edges)
    data, parts = EdgeData(root, val_fraction=0.2, test_fraction=0.2), []
    for part in ("val", "test"):
        graph, labels = data.split(part)[0]  # type: ignore[arg-type]
        shown = {frozenset(pair) for pair in graph.edge_index.T.tolist()}
        joined = {frozenset(pair) for pair in graph.edge_label_index.T[labels == 1].tolist()}
        apart = {frozenset(pair) for pair in graph.edge_label_index.T[labels == 0].tolist()}
        assert len(joined) == len(apart) == labels.sum() == len(once) // 5
        assert not joined & shown
        assert not apart & {frozenset(pair) for pair in once}
        assert [found[int(row)] for row in graph.edge_attr[:, 0]] == list(map(tuple, graph.edge_index.T.tolist()))
        again, _ = EdgeData(root, val_fraction=0.2, test_fraction=0.2).split(part)[0]  # type: ignore[arg-type]
        assert torch.equal(graph.edge_label_index, again.edge_label_index), "a seed asks for the same pairs"
        parts.append(joined)
    assert not parts[0] & parts[1]
    training = data.split("train")
    graph, labels = training[0]
    visible = {frozenset(pair) for pair in training.data.edge_index.T.tolist()}
    assert not visible & (parts[0] | parts[1])
    assert not visible & {frozenset(pair) for pair in graph.edge_label_index.T[labels == 0].tolist()}
    edges = ["source,target,label", *(f"{a},{b},{min(a, b) + 50 * max(a, b)}.5" for a, b in found)]
    numbers = EdgeTargetData(write_graph(tmp_path, ["x", *(["1"] * 40)], edges))
    asked = [numbers.split(part)[0][0].edge_label_index.T.tolist() for part in ("train", "val", "test")]
    pairs = [{frozenset(pair) for pair in part} for part in asked]
    assert sum(map(len, asked)) == len(set.union(*pairs)) == len({frozenset(pair) for pair in found})


def test_pairs_that_are_asked_for_stay_those_of_pyg():
    from torch_geometric.transforms import RandomLinkSplit

    data = EdgeData(val_fraction=0.1, split_seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parts = RandomLinkSplit(0.1, 0.1, is_undirected=True, add_negative_train_samples=False)(data.graph)
    for part, theirs in zip(("val", "test"), parts[1:], strict=True):
        ours, labels = data.split(part)[0]  # type: ignore[arg-type]
        assert torch.equal(ours.edge_label_index[:, labels == 1], theirs.edge_label_index[:, theirs.edge_label == 1])


def test_edges_that_cannot_be_asked_for_are_refused(tmp_path):
    few = write_graph(tmp_path / "few", ["x", "1", "1", "1"], ["source,target", "0,1", "1,0", "1,2"])
    with pytest.raises(ValueError, match=r"joins 2 pairs of nodes, of which val_fraction=0\.05"):
        EdgeData(few).setup()
    full = [f"{a},{b}" for a in range(8) for b in range(8) if a != b]
    root = write_graph(tmp_path / "full", ["x", *(["1"] * 8)], ["source,target", *full])
    with pytest.raises(ValueError, match="joins all of its 8 nodes"):
        EdgeData(root, val_fraction=0.2).setup()


def test_numbers_of_both_directions_are_of_one_part(tmp_path):
    edges = [f"{a},{a + 1},{a}.5\n{a + 1},{a},{a + 100}.5" for a in range(30)]
    data = EdgeTargetData(write_graph(tmp_path, ["x", *(["1"] * 31)], ["source,target,label", *edges]))
    asked = {part: data.split(part)[0][0].edge_label_index.T.tolist() for part in ("train", "val", "test")}
    assert sum(map(len, asked.values())) == 60, "edges with a number of their own are all asked for"
    pairs = [{frozenset(pair) for pair in part} for part in asked.values()]
    assert sum(map(len, pairs)) == 30


def test_degrees_are_those_of_the_edges_that_are_shown():
    data = EdgeData("karate-ties", val_fraction=0.2, test_fraction=0.2)
    for graph in data.all_graphs():
        assert graph.x[:, 0].tolist() == torch.bincount(graph.edge_index[0], minlength=34).tolist()
    assert data.split("train").data.edge_index.shape[1] < data.graph.edge_index.shape[1] == data.graph.x[:, 0].sum()


@pytest.mark.parametrize("kind", [NodeData, EdgeData])
def test_features_stay_as_they_are_given(kind, tmp_path):
    nodes = ["label,x", *(f"{i % 2},{(i - 15) / 8}" for i in range(30))]
    root = write_graph(tmp_path, nodes, ["source,target", *(f"{i},{(i + 1) % 30}" for i in range(30))])
    given = torch.arange(-15, 15)[:, None] / 8
    data = kind(root)
    data.setup()
    assert all(torch.equal(graph.x, given) for graph in data.all_graphs())
    assert load_recipe("edge-classification", root).get("row_normalize", False) is False
    assert load_recipe("edge-classification", "planetoid:Cora")["row_normalize"] is True
    with pytest.raises(ValueError, match=r"features of these nodes go down to -1\.875; train with row_normalize=False"):
        kind(root, row_normalize=True).setup()


def write_graphs(folder: Path, labels: list[int], names: str = "label") -> str:
    """Graphs of one edge each, with their labels."""
    root = write_graph(
        folder,
        ["graph,x", *(f"{g},{node}" for g in range(len(labels)) for node in (0, 1))],
        ["graph,source,target", *(f"{g},0,1" for g in range(len(labels)))],
    )
    (folder / "graphs.csv").write_text("\n".join([names, *map(str, labels)]))
    return root


def test_folds_are_alike_in_classes_that_have_a_graph_for_each(tmp_path):
    labels = [1] * 60 + [2] * 30 + [4] * 5  # numbered with gaps, too
    root = write_graphs(tmp_path, labels)
    for fold in range(5):
        where = GraphData(root, folds=5, fold=fold)._drawn()
        assert np.bincount(np.array(labels)[where["test"]]).tolist() == [0, 12, 6, 0, 1]
        assert np.bincount(np.array(labels)[where["val"]], minlength=5)[1:3].min() >= 5
    with pytest.warns(UserWarning, match=r"folds=6 of .* without regard to classes: class 4 has 5 graphs") as found:
        GraphData(root, folds=6).setup()
    assert len(found) == 1
    few = GraphData(write_graphs(tmp_path, [0, 0, 0, 1, 1, 1]), folds=3)
    assert sorted(map(len, few._drawn().values())) == [1, 2, 3]


def load_recipe(task: str, root: str) -> dict[str, object]:
    """What the recipe for a source says of the data."""
    return yaml.safe_load(shipped()[find_task(task).recipe(root)].read_text())["data"]

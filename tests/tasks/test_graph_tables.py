"""Graphs from folders of tables: what belongs together, and what is refused."""

from pathlib import Path

import pytest
import torch

from mamba_zoo.tasks._graph_files import read_graphs
from mamba_zoo.tasks._graph_tables import read_folder
from mamba_zoo.tasks.graph_data import GraphData, TargetData
from mamba_zoo.tasks.graph_edges import EdgeData
from mamba_zoo.tasks.graph_nodes import NodeData
from mamba_zoo.tasks.graph_targets import NodeTargetData


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three graphs of two nodes, whose rows of `graphs.csv` are in another order."""
    (tmp_path / "nodes.csv").write_text("graph,x\n" + "".join(f"{g},{g}.5\n{g},0\n" for g in range(3)))
    (tmp_path / "edges.csv").write_text("graph,source,target\n0,0,1\n1,0,1\n2,1,0\n")
    (tmp_path / "graphs.csv").write_text("graph,label,split\n2,0,Test\n0,1,train\n1,2, VAL\n")
    return tmp_path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One graph of eight nodes, two of them without label and split."""
    splits = ["train", "train", "val", "val", "test", "test", "", ""]
    labels = ["0", "1", "0", "1", "0", "2", "", ""]
    cells = zip(labels, splits, range(8), strict=True)
    (tmp_path / "nodes.csv").write_text("label,split,x\n" + "".join(f"{a},{b},{c}\n" for a, b, c in cells))
    (tmp_path / "edges.csv").write_text("source,target\n" + "".join(f"{i},{i + 1}\n" for i in range(7)))
    return tmp_path


def test_graphs_are_found_by_their_number(three):
    found = read_folder(three)
    assert [data.y.item() for data in found] == [1, 2, 0]
    assert [data.split_name for data in found] == ["train", "val", "test"]
    assert found[0].target_names == ["label"], "the number is no target"
    data = GraphData(str(three))
    assert data.num_classes == 3
    assert data.split("test")[0].x[0].item() == 2.5
    (three / "graphs.csv").write_text("\ufefflabel\n1\n2\n0\n", encoding="utf-8")
    assert [data.y.item() for data in read_folder(three)] == [1, 2, 0], "without numbers the order of the rows counts"


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("label\n1\n2\n", "has 2 rows, but nodes.csv has 3 graphs"),
        ("label\n1\n2\n0\n0\n", "has 4 rows, but nodes.csv has 3 graphs"),
        ("graph,label\n0,1\n0,1\n2,1\n", "has no row for graph 1"),
        ("graph,label\n0,1\n1,1\n3,1\n", "has no row for graph 2"),
        ("graph,label\n0,1\n1,1\n-2,1\n", "line 4, column 'graph' is '-2', which is not a whole number from 0"),
        ("label\n1\n2\nc\n", "line 4, column 'label' is 'c', which is not a finite number"),
        ("label,split\n1,train\n2,valid\n0,test\n", "line 3, column 'split' is 'valid'; a split is train, val, test"),
        ("label,split\n1,train\n2,\n0,test\n", "line 3, column 'split' is ''; a split is train, val, test"),
    ],
)
def test_rows_that_belong_to_no_graph_are_refused(three, table, match):
    (three / "graphs.csv").write_text(table)
    with pytest.raises(ValueError, match=rf"graphs\.csv.*{match}"):
        read_folder(three)


def test_labels_below_zero_are_no_classes(three, one):
    (three / "nodes.csv").write_text("graph,x\n0,1\n1,1\n2,1\n")
    (three / "edges.csv").write_text("graph,source,target\n")
    (three / "graphs.csv").write_text("label\n1\n-1\n1\n")
    with pytest.raises(ValueError, match=r"labels of .* go down to -1, but classes are numbered from 0"):
        _ = GraphData(str(three)).num_classes
    assert TargetData(str(three)).labels.tolist() == [[1], [-1], [1]]
    (three / "graphs.csv").unlink()
    (one / "nodes.csv").write_text("label,x\n" + "".join(f"{i % 2 * 2 - 1},{i}\n" for i in range(8)))
    with pytest.raises(ValueError, match=r"labels of the nodes of .* go down to -1, but classes are numbered from 0"):
        _ = NodeData(str(one)).num_classes


def test_nodes_of_no_split_need_no_label(one):
    data = NodeData(str(one))
    assert data.num_classes == 3
    assert [data.split(part)[0][1].tolist() for part in ("train", "val", "test")] == [[0, 1], [2, 3], [4, 5]]
    text = (one / "nodes.csv").read_text()
    (one / "nodes.csv").write_text(text.replace("0,train", "0.5,train"))
    numbers = NodeTargetData(str(one))
    assert numbers.train_targets().tolist() == [[0.5], [1.0]]
    assert numbers.graph.y.isnan().tolist() == [False] * 6 + [True] * 2
    for cells, match in {
        ",Test,": "line 6, column 'label' is empty",
        "0,validation,": "line 6, column 'split' is 'validation'; a split is train, val, test",
    }.items():
        (one / "nodes.csv").write_text(text.replace("0,test,", cells))
        with pytest.raises(ValueError, match=match):
            read_folder(one)
    (one / "nodes.csv").write_text(text.replace("val", "train"))
    with pytest.raises(ValueError, match="has no val nodes"):
        NodeData(str(one)).setup()


@pytest.mark.parametrize("cell", ["n3", "", "nan"])
def test_a_cell_that_is_no_number_is_named(one, cell):
    (one / "nodes.csv").write_text("id,x\n" + "".join(f"{cell if i == 3 else i},1\n" for i in range(8)))
    with pytest.raises(ValueError, match=rf"nodes\.csv, line 5, column 'id' is '{cell}', which is not a finite number"):
        read_folder(one)


def test_edges_from_nowhere_are_refused(one):
    (one / "edges.csv").write_text("source,target\n0,1\n-1,2\n")
    with pytest.raises(ValueError, match=r"edges\.csv, line 3, column 'source' is '-1', which is not a whole number"):
        read_folder(one)


def test_nodes_without_features_have_degrees(one):
    (one / "nodes.csv").write_text("label\n" + "0\n1\n" * 4)
    graph = read_graphs(str(one), "data")[0]
    assert graph.x[:, 0].tolist() == [1] * 7 + [0]
    hidden = EdgeData(str(one), val_fraction=0.2, test_fraction=0.2).split("val")[0][0]
    assert hidden.x[:, 0].tolist() == torch.bincount(hidden.edge_index[0], minlength=8).tolist()
    assert hidden.x[:, 0].sum() == 5

"""Graph tasks: data of every kind, training of every level, predictions, and comparisons of orders."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mamba_zoo
from mamba_zoo.__main__ import main
from mamba_zoo.scans.graph import order_key
from mamba_zoo.tasks import train_once
from mamba_zoo.tasks._graph_files import read_graphs
from mamba_zoo.tasks._graph_nets import BASELINES, build_graph_model
from mamba_zoo.tasks._graph_tables import read_folder
from mamba_zoo.tasks.graph import GraphClassifier
from mamba_zoo.tasks.graph_data import GraphData, TargetData
from mamba_zoo.tasks.graph_edges import EdgeData
from mamba_zoo.tasks.graph_nodes import NodeData, normalized
from mamba_zoo.tasks.graph_targets import EdgeTargetData, NodeTargetData
from mamba_zoo.tasks.registry import load_task
from mamba_zoo.tasks.running import quiet, quiet_trainer

SHARED = Path(os.environ.get("MAMBA_ZOO_DATA", "data")) / "graph"


@pytest.fixture(scope="module")
def digits() -> GraphData:
    """A few of the digits, so that an epoch takes a moment."""
    data = GraphData(batch_size=16)
    data.graphs[:] = data.graphs[::30]
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two graphs with labels and splits, in tables."""
    (tmp_path / "nodes.csv").write_text("graph,weight,charge\n0,1,0.5\n0,2,0\n1,3,1\n1,4,0\n1,5,1\n")
    (tmp_path / "edges.csv").write_text("graph,source,target,length\n0,0,1,2.5\n0,1,0,2.5\n1,2,0,1\n")
    (tmp_path / "graphs.csv").write_text("label,split\n1,train\n0,test\n")
    return tmp_path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_folders_are_read_as_they_are_written(folder):
    one, two = read_folder(folder)
    assert one.x.tolist() == [[1, 0.5], [2, 0]]
    assert one.edge_index.tolist() == [[0, 1], [1, 0]]
    assert one.edge_attr.tolist() == [[2.5], [2.5]]
    assert (one.y.item(), one.split_name, two.y.item(), two.split_name) == (1, "train", 0, "test")
    assert two.edge_index.tolist() == [[2], [0]]
    data = GraphData(str(folder))
    assert data.num_classes == 2
    with pytest.raises(ValueError, match="no val graphs"):
        data.setup()
    (folder / "graphs.csv").write_text("a,b\n1.5,2\n0.1,3\n")
    with pytest.raises(ValueError, match="graph-regression"):
        _ = GraphData(str(folder)).num_classes
    assert TargetData(str(folder)).labels.shape == (2, 2)


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("edges.csv", "graph,source,target\n0,0,2\n", "has no node 2"),
        ("edges.csv", "graph,source,target\n4,0,1\n", "names graph 4"),
        (
            "edges.csv",
            "graph,source,target\n0,a,1\n",
            r"edges\.csv, line 2, column 'source' is 'a', which is not a whole",
        ),
        ("nodes.csv", "", "is empty"),
    ],
)
def test_tables_that_make_no_graph_are_refused(folder, file, text, match):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=match):
        read_folder(folder)


def test_sources_that_do_not_exist_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="planetoid:Cora"):
        read_graphs("nowhere", "data")
    with pytest.raises(FileNotFoundError, match=r"nodes\.csv"):
        read_graphs(str(tmp_path), "data")
    with pytest.raises(ValueError, match="fold=3"):
        GraphData(folds=3, fold=3)

    def offline(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch_geometric.datasets.Planetoid", offline)
    with pytest.raises(FileNotFoundError, match=r"planetoid:Cora is not in .*Cora, and cannot be downloaded"):
        read_graphs("planetoid:Cora", str(tmp_path))
    with pytest.raises(ValueError, match="moleculenet:Water is no data set"):
        read_graphs("moleculenet:Water", str(tmp_path))

    def without(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'rdkit'", name="rdkit")

    monkeypatch.setattr("torch_geometric.datasets.MoleculeNet", without)
    with pytest.raises(ModuleNotFoundError, match="moleculenet:ESOL needs the package rdkit: pip install rdkit"):
        read_graphs("moleculenet:ESOL", str(tmp_path))
    with pytest.raises(ValueError, match=r"karate-ties holds 1 graph, too few .* node-regression"):
        TargetData("karate-ties").setup()


def test_any_data_set_of_pyg_is_read_by_its_class(tmp_path, monkeypatch):
    from torch_geometric import datasets
    from torch_geometric.data import Data

    class LRGBDataset(list):
        def __init__(self, root: str, name: str, split: str = "train", transform: object = None) -> None:
            assert Path(root) == tmp_path / "LRGBDataset"
            count = {"train": 3, "val": 2, "test": 1}[split]
            one = torch.ones(2, 9, dtype=torch.long)
            super().__init__(
                Data(x=one, edge_index=torch.tensor([[0], [1]]), edge_attr=one[:1, :3], y=torch.tensor([[0.5, i]]))
                for i in range(count)
            )

    class Actor(list):
        def __init__(self, root: str) -> None:
            data: Any = datasets.KarateClub()[0]
            masks = torch.rand(3, 34, 2).argmax(0, keepdim=True) == torch.arange(3)[:, None, None]
            data.train_mask, data.val_mask, data.test_mask = masks
            super().__init__([data])

    monkeypatch.setattr(datasets, "LRGBDataset", LRGBDataset)
    monkeypatch.setattr(datasets, "Actor", Actor)
    data = TargetData("pyg:LRGBDataset:Peptides-struct", download_dir=str(tmp_path))
    assert [len(data.split(part)) for part in ("train", "val", "test")] == [3, 2, 1]
    assert (data.encoder, data.edges) == ("atom", "bond")
    model = mamba_zoo.create_model("graph_mamba_peptides_struct", pe="none", num_classes=2)
    assert model(next(iter(data.val_dataloader()))).shape == (2, 2)
    for seed in (0, 1):
        nodes = NodeData("pyg:Actor", split_seed=seed, download_dir=str(tmp_path))
        mask = nodes.graph.val_mask[:, seed]
        assert nodes.split("val")[0][1].tolist() == mask.nonzero()[:, 0].tolist()
    for root, message in {
        "pyg:LRGBDatset:x": "no data set 'LRGBDatset'; did you mean LRGBDataset",
        "pyg:LRGBDataset": "needs a name after a second colon",
        "pyg:Actor:film": "needs nothing but its class",
        "pyg:FakeDataset": "needs nothing but its class",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_graphs(root, str(tmp_path))


def test_without_pyg_the_way_to_it_is_told(tmp_path):
    code = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "from mamba_zoo.__main__ import main\n"
        "sys.exit(main(['fit', '--task', 'node-classification']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "install it with: pip install 'mamba_zoo[graph]'" in done.stderr


def test_digits_are_graphs_of_their_ink():
    data = read_graphs("digits", "data")
    assert len(data) == 1797
    x, (source, target) = data[0].x, data[0].edge_index
    assert bool((x[:, 0] > 0).all())
    step = ((x[source] - x[target]) * 7)[:, 1:].abs()
    assert bool((step.amax(1).round() == 1).all())


def test_folds_share_the_graphs_out_and_keep_the_classes():
    tested, data = [], GraphData(folds=4)
    for data.fold in range(4):
        where = data._drawn()
        assert sorted(np.concatenate(list(where.values())).tolist()) == list(range(1797))
        assert np.bincount(data.labels[where["test"], 0]).min() >= 43
        tested += where["test"].tolist()
    assert sorted(tested) == list(range(1797))
    data.validate_on_test = True
    assert data._drawn()["val"].tolist() == data._drawn()["test"].tolist()


def test_nodes_of_karate_keep_their_published_training_nodes():
    data = NodeData()
    parts = {part: data.split(part)[0][1] for part in ("train", "val", "test")}
    graph = data.graph
    assert parts["train"].tolist() == graph.train_mask.nonzero()[:, 0].tolist()
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(34))
    assert len(data.split("train")) == 10


def test_hidden_edges_stay_hidden():
    data = EdgeData(val_fraction=0.1)
    shown = {tuple(pair) for pair in data.split("test")[0][0].edge_index.T.tolist()}
    asked, labels = data.split("test")[0][0].edge_label_index, data.split("test")[0][1]
    assert all(tuple(pair) not in shown for pair in asked.T[labels == 1].tolist())
    training = data.split("train")
    first, second = training[0][0].edge_label_index, training[1][0].edge_label_index
    count = training.joined.shape[1]
    assert torch.equal(first[:, :count], second[:, :count])
    assert not torch.equal(first[:, count:], second[:, count:])


def test_rows_of_zeros_stay():
    assert normalized(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist() == [[0.25, 0.75], [0.0, 0.0]]


def test_orders_are_prepared_once_for_the_models_scan(digits, tmp_path):
    result = train_once(
        "graph_mamba", digits, tmp_path, "rcm", max_epochs=2,
        model={"options": {"dim": 16, "depth": 1, "local": "gin"}, "lr": 0.01}, task="graph-classification",
    )  # fmt: skip
    assert all(order_key("rcm") in data for data in digits.all_graphs())
    assert 0 <= result["accuracy"] <= 1
    assert result["curve"][1]["train/loss"] < result["curve"][0]["train/loss"]
    assert len(np.load(tmp_path / "test_items.npy")) == len(digits.split("test"))


def test_the_command_line_trains_tests_and_predicts_nodes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--task", "node-classification", "--trainer.max_epochs", "2", "--out", "run"]
    assert main([*fit, "--trainer.accelerator", "cpu", "--model.scan", "both_ways(bfs)"]) == 0
    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    assert main(["predict", "--checkpoint", "run", "--data", "karate", "--device", "cpu", "--out", "p.csv"]) == 0
    told = capsys.readouterr().out
    assert "graph_mamba: 20 nodes" in told, "what the test scores are nodes, not graphs"
    assert "34 nodes" in told
    found = rows(tmp_path / "p.csv")
    assert len(found) == 34
    assert set(found[0]) >= {"node", "predicted", "probability"}


@pytest.mark.parametrize("name", ["gcn", "gmn"])
def test_another_model_does_not_take_the_options_of_the_default_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipe of karate has options that these two do not take
    fit = ["fit", "--task", "node-classification", "--model.name", name, "--trainer.accelerator", "cpu"]
    assert main([*fit, "--trainer.max_epochs", "1", "--data.steps_per_epoch", "1"]) == 0
    assert main([*fit, "--config", "graph_karate"]) != 0
    assert "takes no argument 'norm'" in capsys.readouterr().err


def test_data_that_were_tested_first_can_be_trained_on(tmp_path):
    settings = {"max_epochs": 1, "model": {"options": {"dim": 8, "depth": 1}}, "task": "node-classification"}
    train_once("gin", NodeData(), tmp_path / "a", **settings)
    model = load_task(tmp_path / "a" / "last.ckpt")
    data = NodeData()
    with quiet():
        quiet_trainer("cpu").test(model, data, verbose=False)
    assert train_once("gin", data, tmp_path / "b", seed=1, **settings)["accuracy"] > 0


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_run_at_every_level(baseline):
    data = NodeData()
    for level, shape in (("graph", (1, 3)), ("node", (34, 3))):
        told = {key: getattr(data, key) for key in ("in_chans", "edge_chans", "encoder", "edges", "pe", "pe_steps")}
        net = build_graph_model(baseline, None, level, 3, told, {"dim": 8, "depth": 2})
        assert net(data.graph).shape == shape
    with pytest.raises(ValueError, match="no order"):
        build_graph_model(baseline, "degree", "graph", 3, {}, {})
    with pytest.raises(TypeError, match="expand"):
        build_graph_model(baseline, None, "graph", 3, {}, {"expand": 2})


def test_pairs_are_learnt(tmp_path, capsys):
    result = train_once(
        "gcn", EdgeData(val_fraction=0.1), tmp_path, max_epochs=2, model={"options": {"dim": 16, "depth": 2}},
        task="edge-classification",
    )  # fmt: skip
    assert {"accuracy", "curve"} <= set(result)
    assert 0 <= result["test"]["auc"] <= 1
    (tmp_path / "pairs.csv").write_text("source,target\n0,1\n16,25\n")
    command = ["predict", "--checkpoint", str(tmp_path), "--data", "karate", "--out", str(tmp_path / "p.csv")]
    assert main([*command, "--pairs", str(tmp_path / "pairs.csv")]) == 0
    assert [(row["source"], row["target"]) for row in rows(tmp_path / "p.csv")] == [("0", "1"), ("16", "25")]
    assert main(command) != 0
    assert "Give --pairs FILE" in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("source,target\n0,34\n")
    assert main([*command, "--pairs", str(tmp_path / "pairs.csv")]) != 0
    assert "there are 34" in capsys.readouterr().err


def test_targets_are_learnt_in_their_own_units(tmp_path):
    data = TargetData(batch_size=32)
    data.graphs[:] = data.graphs[::20]
    result = train_once(
        "graph_mamba", data, tmp_path, max_epochs=3, model={"options": {"dim": 16, "depth": 1}, "lr": 0.01},
        task="graph-regression",
    )  # fmt: skip
    found = np.load(tmp_path / "test_predictions.npz")
    error = np.sqrt(np.square(found["target"] - found["predicted"]).mean())
    assert result["rmse"] == pytest.approx(error, rel=1e-4)
    assert abs(found["predicted"].mean() - 4.5) < 3
    trained = load_task(tmp_path / "best.ckpt")
    assert trained.hparams["center"] == pytest.approx(data.center)


@pytest.mark.parametrize(("level", "items"), [("node", 34), ("edge", 156)])
def test_numbers_of_nodes_and_edges_are_learnt(level, items, tmp_path):
    data = NodeTargetData(steps_per_epoch=20) if level == "node" else EdgeTargetData(steps_per_epoch=20)
    options = {"dim": 16, "depth": 1, "local": "gin"}
    result = train_once(
        "graph_mamba", data, tmp_path / "run", max_epochs=4, model={"options": options, "lr": 0.01},
        task=f"{level}-regression",
    )  # fmt: skip
    curve = [row["train/loss"] for row in result["curve"]]
    assert curve[-1] < 0.7 * curve[0]
    found = np.load(tmp_path / "run" / "test_predictions.npz")
    assert np.square(found["target"] - found["predicted"]).mean() ** 0.5 == pytest.approx(result["rmse"], rel=1e-4)
    out = tmp_path / "p.csv"
    assert main(["predict", "--checkpoint", str(tmp_path / "run"), "--data", "karate-ties", "--out", str(out)]) == 0
    assert len(rows(out)) == items
    assert {"node", "target_0"} <= set(rows(out)[0]) or {"source", "target", "target_0"} <= set(rows(out)[0])


def test_edges_of_a_tie_are_in_one_part_only():
    data = EdgeTargetData()
    parts = {part: data.split(part)[0][0].edge_label_index.T.tolist() for part in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 78
    assert len({frozenset(pair) for pairs in parts.values() for pair in pairs}) == 78
    graph, strength = data.split("test")[0]
    assert graph.edge_index.shape == (2, 156)
    assert strength.tolist() == [
        graph.edge_target[(pair == graph.edge_index.T).all(1)].item() for pair in graph.edge_label_index.T
    ]


def test_numbers_of_nodes_and_edges_of_a_folder(folder):
    (folder / "graphs.csv").unlink()
    (folder / "nodes.csv").write_text("label,weight\n0.5,1\n2,2\n3,2\n")
    (folder / "edges.csv").write_text("source,target,label,length\n0,1,2.5,1\n1,0,3.5,1\n1,2,0,2\n")
    graph = read_folder(folder)[0]
    assert graph.y.tolist() == [0.5, 2, 3]
    assert graph.edge_target.tolist() == [2.5, 3.5, 0]
    assert graph.edge_attr.tolist() == [[1], [1], [2]]
    with pytest.raises(ValueError, match="--task node-regression"):
        _ = NodeData(str(folder)).num_classes
    with pytest.raises(ValueError, match="--task node-classification"):
        _ = GraphData("karate").num_classes
    with pytest.raises(ValueError, match="no labels to predict"):
        EdgeTargetData("karate").setup()
    with pytest.raises(ValueError, match=r"val_fraction=0\.0"):
        EdgeTargetData(val_fraction=0.0)


@pytest.fixture
def paths(tmp_path: Path) -> Path:
    """Thirty paths of three to six nodes; the label of a node says whether it is an end."""
    nodes, edges = ["graph,one,label"], ["graph,source,target"]
    for g in range(30):
        n = 3 + g % 4
        nodes += [f"{g},1,{int(v in (0, n - 1))}" for v in range(n)]
        edges += [f"{g},{a},{b}" for v in range(n - 1) for a, b in ((v, v + 1), (v + 1, v))]
    folder = tmp_path / "paths"
    folder.mkdir()
    (folder / "nodes.csv").write_text("\n".join(nodes))
    (folder / "edges.csv").write_text("\n".join(edges))
    return folder


@pytest.mark.parametrize("task", ["node-classification", "node-regression"])
def test_nodes_of_several_graphs_are_learnt(task, paths, tmp_path, capsys):
    data = (NodeData if task == "node-classification" else NodeTargetData)(str(paths), batch_size=8)
    sizes = {part: len(data.split(part)) for part in ("train", "val", "test")}
    assert sizes == {"train": 24, "val": 3, "test": 3}
    model = {"options": {"dim": 16, "depth": 1, "local": "gin"}, "lr": 0.02, "warmup_epochs": 0}
    result = train_once("graph_mamba", data, tmp_path / "run", "bfs", max_epochs=12, model=model, task=task)
    assert result["accuracy"] == 1 if task == "node-classification" else result["rmse"] < 0.2
    assert all(order_key("bfs") in graph for graph in data.all_graphs())
    tested = sum(graph.num_nodes for graph in data.split("test").items)
    assert len(np.load(tmp_path / "run" / "test_items.npy")) == tested
    out = tmp_path / "p.csv"
    assert main(["test", "--checkpoint", str(tmp_path / "run"), "--data", str(paths)]) == 0
    assert f"graph_mamba: {tested} nodes" in capsys.readouterr().out
    command = ["predict", "--checkpoint", str(tmp_path / "run"), "--data", str(paths), "--out", str(out)]
    assert main([*command, "--batch-size", "7"]) == 0
    found = rows(out)
    assert [(row["graph"], row["node"]) for row in found[:4]] == [("0", "0"), ("0", "1"), ("0", "2"), ("1", "0")]
    assert len(found) == sum(3 + g % 4 for g in range(30))
    if task == "node-classification":
        assert all((row["predicted"] == "1") == (row["node"] in ("0", str(2 + int(row["graph"]) % 4))) for row in found)


def test_splits_of_several_graphs(paths):
    (paths / "graphs.csv").write_text("split\n" + "train\n" * 20 + "val\n" * 6 + "test\n" * 4)
    data = NodeData(str(paths))
    assert [len(data.split(part)) for part in ("train", "val", "test")] == [20, 6, 4]
    assert data.describe("nodes")[0] == ("graphs", "20 train, 6 val, 4 test")
    (paths / "graphs.csv").write_text("split\n" + "train\n" * 30)
    with pytest.raises(ValueError, match="has no val graphs"):
        NodeData(str(paths)).setup()
    (paths / "graphs.csv").write_text("label\n" + "1\n" * 30)
    with pytest.raises(ValueError, match=r"1 labels for 3 nodes; .* --task graph-classification"):
        _ = NodeData(str(paths)).num_classes
    (paths / "graphs.csv").unlink()
    text = (paths / "nodes.csv").read_text().splitlines()
    (paths / "nodes.csv").write_text("\n".join([f"{text[0]},split", *(f"{line},train" for line in text[1:])]))
    with pytest.raises(ValueError, match="is one of nodes, which goes with one graph"):
        NodeData(str(paths)).setup()
    with pytest.raises(ValueError, match="holds 1797 graphs; this task takes one"):
        EdgeData("digits").setup()


def test_labels_of_nodes_are_none_of_graphs(folder):
    (folder / "graphs.csv").unlink()
    (folder / "nodes.csv").write_text("graph,label,weight\n0,0,1\n0,1,2\n1,1,2\n")
    (folder / "edges.csv").write_text("graph,source,target\n0,0,1\n")
    with pytest.raises(ValueError, match=r"have 1 to 2 labels each, perhaps those of their nodes"):
        _ = GraphData(str(folder)).num_classes


def test_a_checkpoint_alone_predicts_graphs_of_a_folder(folder, tmp_path, digits, capsys):
    train_once("gin", digits, tmp_path / "run", max_epochs=1, model={"options": {"dim": 8, "depth": 1}},
               task="graph-classification")  # fmt: skip
    trained = load_task(tmp_path / "run" / "best.ckpt")
    assert isinstance(trained, GraphClassifier)
    out = tmp_path / "p.csv"
    assert main(["predict", "--checkpoint", str(tmp_path / "run"), "--data", str(folder), "--out", str(out)]) != 0
    assert "has 2 node features, but the model was trained with 3" in capsys.readouterr().err
    (folder / "nodes.csv").write_text("graph,a,b,c\n0,1,0.5,0\n0,2,0,1\n1,3,1,1\n")
    (folder / "edges.csv").write_text("graph,source,target\n0,0,1\n0,1,0\n")
    assert main(["predict", "--checkpoint", str(tmp_path / "run"), "--data", str(folder), "--out", str(out)]) == 0
    assert len(rows(out)) == 2


def test_orders_are_compared_on_graphs(tmp_path):
    comparison = mamba_zoo.compare.orders(
        scans=["degree", "both_ways(rcm)"], seeds=1, epochs=1, out=tmp_path, controls=["none"], progress=False,
        task="node-classification", model_options={"options": {"dim": 8, "depth": 1, "local": "gcn"}},
        data_options={"steps_per_epoch": 2}, trainer_options={"accelerator": "cpu"},
    )  # fmt: skip
    assert {run.scan for run in comparison.runs} == {"degree", "both_ways(rcm)", "none"}
    assert (tmp_path / "report.html").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="no Cora and MUTAG at $MAMBA_ZOO_DATA/graph")
def test_published_splits_and_folds():
    cora = NodeData("planetoid:Cora", download_dir=str(SHARED / "planetoid"))
    assert [len(cora.split(part)[0][1]) for part in ("train", "val", "test")] == [140, 500, 1000]
    mutag = GraphData("tu:MUTAG", folds=10, fold=3, download_dir=str(SHARED / "tudataset"))
    given = np.loadtxt(SHARED / "tudataset/MUTAG/gin_10fold/test_idx-4.txt", dtype=int)
    assert mutag._drawn()["test"].tolist() == sorted(given.tolist())
    assert len(mutag.graphs) == 188

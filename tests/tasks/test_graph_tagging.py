"""Naming everything that a graph is: loss and scores of tags, unknown labels, training, tables, refusals."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_geometric import datasets
from torch_geometric.data import Data
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

import mamba_zoo
from mamba_zoo.__main__ import main
from mamba_zoo.tasks import train_once
from mamba_zoo.tasks._tagging_metrics import OverClasses, TagLoss, item_scores
from mamba_zoo.tasks.graph_data import GraphData, TargetData
from mamba_zoo.tasks.graph_tagging import GraphTagger
from mamba_zoo.tasks.graph_tags import TaggedGraphData
from mamba_zoo.tasks.registry import load_task

NAN = float("nan")
TINY = {"options": {"dim": 16, "depth": 1, "local": "gin"}, "lr": 0.02, "warmup_epochs": 0}
CPU = {"accelerator": "cpu"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_folder(folder: Path, head: str, labels: list[str]) -> str:
    """Stars or paths of a few nodes by the first label, whose features are ones."""
    nodes, edges = ["graph,one"], ["graph,source,target"]
    for g, label in enumerate(labels):
        n = 4 + g % 3
        nodes += [f"{g},1"] * n
        star = label.startswith("1")
        edges += [
            f"{g},{a},{b}" for v in range(1, n) for a, b in ((v, 0 if star else v - 1), (0 if star else v - 1, v))
        ]
    (folder / "nodes.csv").write_text("\n".join(nodes))
    (folder / "edges.csv").write_text("\n".join(edges))
    (folder / "graphs.csv").write_text("\n".join([head, *labels]))
    return str(folder)


def test_unknown_labels_count_neither_for_the_loss_nor_for_the_scores():
    torch.manual_seed(0)
    scores = torch.randn(6, 3, requires_grad=True)
    targets = torch.tensor([[1, NAN, NAN], [0, 1, NAN], [1, 0, NAN], [NAN, 1, NAN], [0, NAN, NAN], [1, 0, NAN]])
    known = ~targets.isnan()
    loss = TagLoss()(scores, targets)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(scores[known], targets[known]))
    (grad,) = torch.autograd.grad(loss, scores)
    assert torch.equal(grad != 0, known)
    smooth = TagLoss(0.2)(scores, targets)
    torch.testing.assert_close(smooth, F.binary_cross_entropy_with_logits(scores[known], targets[known] * 0.8 + 0.1))
    (grad,) = torch.autograd.grad(TagLoss()(scores, torch.full((6, 3), NAN)), scores)
    assert not grad.any()
    metric = OverClasses(binary_average_precision)
    metric.update(scores.detach()[:4], targets[:4])
    metric.update(scores.detach()[4:], targets[4:])
    each = [
        binary_average_precision(scores.detach()[seen, i], targets[seen, i].long())
        for i, seen in ((0, known[:, 0]), (1, known[:, 1]))
    ]
    assert metric.each()[2] is None
    torch.testing.assert_close(metric.compute(), torch.stack(each).mean())


def test_the_mean_over_items_is_the_area_under_the_curve():
    draw = np.random.default_rng(0)
    targets, scores = (draw.random((40, 2)) < 0.3).astype(np.float32), draw.integers(0, 9, (40, 2)) / 9
    areas = [
        float(binary_auroc(torch.from_numpy(scores[:, i]), torch.from_numpy(targets[:, i]).long())) for i in (0, 1)
    ]
    assert item_scores(targets, scores).mean() == pytest.approx(np.mean(areas))
    targets = np.array([[1, NAN], [NAN, NAN], [0, 1], [0, 1]], dtype=np.float32)
    found = item_scores(targets, np.array([[0.5, 0.1], [0.9, 0.9], [0.5, 0.9], [0.1, 0.2]]))
    assert found.tolist() == [0.75, 0.5, 1.0], "a tie is half a win, and what is unknown is left out"


def test_the_published_model_is_trained_by_its_name(tmp_path, monkeypatch, capsys):
    class LRGBDataset(list):
        def __init__(self, root: str, name: str, split: str = "train", transform: object = None) -> None:
            assert (Path(root).name, name) == ("LRGBDataset", "Peptides-func")
            draw = torch.Generator().manual_seed(len(split))
            count = {"train": 10, "val": 4, "test": 4}[split]
            for i in range(count):
                n, y = 3 + i % 3, torch.randint(2, (1, 10), generator=draw).float()
                y[0, i % 10] = 1 if split == "train" else NAN
                y[0, 3] = NAN if i == 5 else y[0, 3]
                path = torch.tensor([[*range(n - 1), *range(1, n)], [*range(1, n), *range(n - 1)]])
                x = torch.randint(2, (n, 9), generator=draw)
                edges = torch.ones(path.shape[1], 3, dtype=torch.long)
                self.append(Data(x=x, edge_index=path, edge_attr=edges, y=y))

    monkeypatch.setattr(datasets, "LRGBDataset", LRGBDataset)
    monkeypatch.chdir(tmp_path)
    root = "pyg:LRGBDataset:Peptides-func"
    fit = ["fit", "--task", "graph-tagging", "--data.root", root, "--trainer.accelerator", "cpu", "--out", "run"]
    assert main([*fit, "--trainer.max_epochs", "1", "--data.batch_size", "5"]) == 0
    model: Any = load_task("run")
    assert isinstance(model, GraphTagger)
    assert model.name == "graph_mamba_peptides_func"
    published: Any = mamba_zoo.create_model(model.name)
    assert {k: v.shape for k, v in model.net.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }
    assert main(["test", "--checkpoint", "run", "--device", "cpu"]) == 0
    assert "mean average precision" in capsys.readouterr().out
    table = rows(tmp_path / "run" / "classes.csv")
    assert [row["known"] for row in table] == ["3"] * 4 + ["4"] * 6
    assert main(["predict", "--checkpoint", "run", "--data", root, "--device", "cpu", "--out", "p.csv"]) == 0
    found = rows(tmp_path / "p.csv")
    assert list(found[0]) == ["graph", *(f"probability_{i}" for i in range(10))]
    assert len(found) == 18
    with pytest.raises(ValueError, match=r"10 targets of float32, some unknown, .* --task graph-tagging"):
        _ = GraphData(root).num_classes
    with pytest.raises(ValueError, match=r"9 graphs of .* unknown.*--task graph-tagging"):
        TargetData(root).setup()


def test_tags_of_a_folder_are_learnt(tmp_path):
    labels = [f"{g // 2 % 2},{'' if g % 5 == 0 else int(g % 3 == 0)}" for g in range(60)]
    data = TaggedGraphData(write_folder(tmp_path, "star,small", labels), batch_size=16)
    assert (data.num_classes, data.class_names) == (2, ["star", "small"])
    assert int(np.isnan(data.labels).sum()) == 12
    result = train_once("graph_mamba", data, tmp_path / "run", max_epochs=8, model=TINY, trainer=CPU)
    assert result["mAP"] == 1
    arrays = np.load(tmp_path / "run" / "test_predictions.npz")
    assert arrays["target"].shape == arrays["probability"].shape == (6, 2)
    assert np.load(tmp_path / "run" / "test_items.npy").tolist() == [1.0] * 6
    out, last = tmp_path / "p.csv", tmp_path / "run" / "last.ckpt"
    assert main(["predict", "--checkpoint", str(last), "--data", data.root, "--out", str(out)]) == 0
    found = [float(row["probability_star"]) for row in rows(out)]
    assert min(p for g, p in enumerate(found) if g // 2 % 2) > max(p for g, p in enumerate(found) if not g // 2 % 2)
    one = TaggedGraphData(write_folder(tmp_path, "star", [label[:1] for label in labels]))
    with pytest.raises(ValueError, match=r"num_classes of .* is 1, but the model was trained with 2"):
        one.scored(load_task(tmp_path / "run"), "test", True)


def test_a_single_tag_is_enough(tmp_path):
    labels = [str(g // 2 % 2) if g % 7 else '""' for g in range(40)]
    data = TaggedGraphData(write_folder(tmp_path, "star", labels), batch_size=16)
    result = train_once("gin", data, tmp_path / "run", max_epochs=1, model={"options": {"dim": 8}}, trainer=CPU)
    assert set(result["test"]) == {"map", "auroc", "loss"}
    with pytest.raises(ValueError, match=r"1 targets of float32, some unknown.*--task graph-tagging"):
        _ = GraphData(data.root).num_classes


@pytest.mark.parametrize(
    ("head", "labels", "match"),
    [
        ("label", ["0", "1", "2"], r"hold 2, but tags .* --task graph-classification"),
        ("a,b", ["0,1", "1,0.5", "0,1"], r"hold 0\.5, but tags .* --task graph-regression"),
        ("a,b", [",", ",", ","], "no graph of .* has a known label"),
        ("a,b", ["0,1", "0,", "0,1"], "known to have class a, so that it cannot be learnt"),
        ("a,b", ["1,1", "1,", ",1"], "the train graphs of .* can score no class"),
    ],
)
def test_labels_that_are_no_tags_are_refused(head, labels, match, tmp_path):
    data = TaggedGraphData(write_folder(tmp_path, head, labels * 4))
    with pytest.raises(ValueError, match=match):
        data.setup()


def test_settings_of_the_other_task_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_classes=0"):
        GraphTagger(num_classes=0)
    with pytest.raises(ValueError, match="class_names has 1 names for num_classes=2"):
        GraphTagger(num_classes=2, class_names=["a"])
    whole = TaggedGraphData(write_folder(tmp_path, "a,b", ["0,1", "1,0", "1,1"] * 4))
    with pytest.raises(ValueError, match=r"2 targets of int64, not one class number each; .* --task graph-tagging"):
        _ = GraphData(whole.root).num_classes
    with pytest.raises(ValueError, match=r"tags .* --task node-classification"):
        _ = TaggedGraphData("karate").labels


def test_orders_are_compared_by_what_they_say_of_each_graph(tmp_path):
    data = TaggedGraphData(batch_size=16)
    data.graphs[:] = data.graphs[::30]
    found = mamba_zoo.compare.orders(
        data=data, scans=["degree", "rcm"], seeds=1, epochs=1, out=tmp_path, controls=[], progress=False,
        task="graph-tagging", model_options=TINY, trainer_options=CPU,
    )  # fmt: skip
    assert (found.metric.name, found.metric.higher_is_better) == ("mAP", True)
    items = [run.items for run in found.runs]
    assert all(item is not None and len(item) == len(data.split("test")) for item in items)
    assert found["rcm"].items is not None
    assert (tmp_path / "report.html").exists()

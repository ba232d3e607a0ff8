"""Graph models: PyG's data, batches, numbering, orders, timm's contract; and what goes with PyG."""

from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCNConv, GPSConv
from torch_geometric.transforms import AddRandomWalkPE

import mamba_zoo
from mamba_zoo.backbones._graph import Orders, Visit, pool_nodes
from mamba_zoo.backbones._keys import rename
from mamba_zoo.backbones.gmn import DirectionalMamba
from mamba_zoo.backbones.graph_mamba import KEYS
from mamba_zoo.graphs import AddLaplacian, AddOrder, MambaGPSConv, relabelled, relabelling_sensitivity
from mamba_zoo.scans import Graphs, graph_order
from mamba_zoo.scans.graph import order_key

NAMES = [name for name in mamba_zoo.list_models(modality="graph") if name != "graph_mamba_layer"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("graph_mamba", {}),
    "several directions": ("graph_mamba", {"scan": "both_ways(rcm)", "local": "gin"}),
    "drawn orders": ("graph_mamba", {"ties": "random", "buckets": 2, "num_order_samples": 2}),
    "no scan": ("graph_mamba", {"scan": "none", "local": "gcn"}),
    "smoothed": ("graph_mamba", {"local": "none", "smooth": 3, "norm": "layer"}),
    "gmn": ("gmn", {}),
    "gmn of nodes": ("gmn", {"walk_length": 0, "local": "none"}),
}


def graph(n: int, edges: int, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.randint(n, (2, edges), generator=draw)
    return Data(
        x=torch.randn(n, 16, generator=draw),
        edge_index=torch.cat([pairs, pairs.flip(0)], dim=1),
        y=torch.tensor([seed % 3]),
    )


def joined(items: Any) -> Any:
    return Batch.from_data_list(items)


def karate() -> Any:
    return KarateClub()[0]


def graphs() -> list[Any]:
    """Among them a single node, and nodes without edges."""
    return [graph(12, 18, 0), graph(1, 0, 1), graph(5, 0, 2), graph(9, 6, 3)]


def small(kind: str, **options: Any) -> Any:
    name, own = KINDS[kind]
    return mamba_zoo.create_model(name, **{"num_classes": 3, "dim": 16, "depth": 2, **own, **options}).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_graphs_one_by_one(kind, device):
    model, items = small(kind).to(device), graphs()
    with torch.no_grad():
        together = model(joined(items).to(device))
        alone = torch.cat([model(item.to(device)) for item in items])
    assert together.shape == (4, 3)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_renumbering_changes_nothing_where_colours_tell_nodes_apart(kind):
    item = graph(14, 24, 5)
    assert len(Graphs.of(item).colours.unique()) == 14
    assert relabelling_sensitivity(small(kind), item, draws=3) < 1e-5
    assert relabelling_sensitivity(small(kind, level="node"), item, draws=3) < 1e-5


def test_sensitivity_measures_orders_that_depend_on_numbering():
    item = graph(14, 24, 5)
    assert relabelling_sensitivity(small("default", scan="raster"), item) > 1e-3
    symmetric = karate()
    tied = small("default", in_chans=34, level="node")
    assert (
        0
        < relabelling_sensitivity(tied, symmetric)
        < relabelling_sensitivity(small("default", in_chans=34, level="node", scan="raster"), symmetric)
    )
    assert relabelling_sensitivity(small("no scan", in_chans=34, level="node"), symmetric) < 1e-5


def test_renumbered_data_keep_everything_at_its_node():
    item = AddOrder("degree")(AddLaplacian(4)(graph(8, 10, 0)))
    permutation = torch.randperm(8)
    other = relabelled(item, permutation)
    assert torch.equal(other.x[permutation], item.x)
    assert torch.equal(other.EigVecs[permutation], item.EigVecs)
    assert order_key("degree") not in other
    assert order_key("degree") in item


@pytest.mark.parametrize("kind", ["default", "gmn"])
def test_every_weight_learns(kind):
    model = small(kind).train()
    model(joined(graphs())).square().sum().backward()
    # The last layer's edges go nowhere, in the published model too.
    idle = [name for name, p in model.named_parameters() if p.grad is None and "layers.1.local.norm_e" not in name]
    assert idle == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("level", ["graph", "node", "edge"])
def test_levels(level):
    batch = joined(graphs())
    batch.edge_label_index = torch.tensor([[0, 3, 14], [1, 2, 15]])
    model = small("default", level=level)
    rows = {"graph": 4, "node": 27, "edge": 3}[level]
    assert model(batch).shape == (rows, 3)
    model.reset_classifier(0)
    assert model(batch).shape == (rows, 16)
    model.reset_classifier(7, "max")
    assert model(batch).shape == (rows, 7)
    assert model.get_classifier().out_features == 7


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_model(name):
    model: Any = mamba_zoo.create_model(name, device="meta")
    card = mamba_zoo.model_card(name)
    assert sum(p.numel() for p in model.parameters()) == card.params
    assert card.modality == "graph"
    exempt = model.no_weight_decay()
    assert {n for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D")) or p.dim() < 2} <= exempt
    assert exempt < {n for n, _ in model.named_parameters()}
    assert isinstance(model.get_classifier(), nn.Linear)


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("gmn", {"token_depth": 2}, "encoder token_encoder token_layers.0 token_layers.1 layers.0 layers.1 head"),
        ("gmn", {"walk_length": 0}, "encoder layers.0 layers.1 head"),
        ("graph_mamba", {"pre_layers": 2}, "encoder layers.0 layers.1 layers.2 head"),
    ],
    ids=str,
)
def test_layers_learn_in_the_order_they_run(name, options, want):
    model: Any = mamba_zoo.create_model(name, device="meta", **options)
    groups: Any = group_parameters(model, model.group_matcher())
    parts = [[key for key in groups[i] if key.startswith(f"{part}.")] for i, part in enumerate(want.split())]
    assert all(parts)
    assert len(groups) == len(parts)
    beside = {key for i, group in groups.items() for key in group if key not in parts[i]}
    assert {key.split(".")[0] for key in beside} <= {"edge_encoder", "pre", "norm"}
    assert all(key in groups[0] for key in beside if not key.startswith("norm"))


def test_gradient_checkpointing_changes_nothing():
    batch, found = joined(graphs()), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small("default", norm="layer", local="gcn").train()
        model.set_grad_checkpointing(checkpointing)
        model(batch).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["default", "gmn"])
def test_bfloat16_stays_close(kind, device):
    model, batch = small(kind).to(device), joined(graphs()).to(device)
    with torch.no_grad():
        want = model(batch)
        got = model.bfloat16()(batch)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()


def test_a_checkpoint_goes_in_whole_or_not_at_all(tmp_path):
    model, path = small("default"), tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    again = small("default", checkpoint_path=path)
    batch = joined(graphs())
    torch.testing.assert_close(again(batch), model(batch))
    with pytest.raises(ValueError, match=r"w\.pth"):
        small("default", checkpoint_path=path, depth=3)


def test_prepared_orders_are_taken_and_join_to_those_of_the_batch():
    items = [AddOrder("both_ways(bfs)")(item) for item in graphs()]
    batch = joined(items)
    want = graph_order("both_ways(bfs)", Graphs.of(batch))
    of_graph = Graphs.of(batch).batch
    for row, own in zip(batch[order_key("both_ways(bfs)")], want, strict=True):
        for i in range(4):
            assert row[of_graph[row] == i].tolist() == own[of_graph[own] == i].tolist()
    model = small("default", scan="both_ways(bfs)")
    torch.testing.assert_close(model(batch), model(joined(graphs())))
    backwards = joined(items)
    backwards[order_key("both_ways(bfs)")] = batch[order_key("both_ways(bfs)")].flip(1)
    assert not torch.allclose(model(backwards), model(batch), atol=1e-4)


def test_orders_prepared_before_nodes_changed_are_one_clear_error():
    from torch_geometric.data import Data
    from torch_geometric.transforms import VirtualNode

    item, model = AddOrder("degree")(karate()), small("default", in_chans=34)
    kept = torch.arange(34) % 3 > 0
    for changed in (item.subgraph(kept), VirtualNode()(item)):
        with pytest.raises(
            ValueError, match=r"AddOrder\('degree'\) prepared .* taken out or added .* apply AddOrder last"
        ):
            model(changed)
    part = karate().subgraph(kept)
    torch.testing.assert_close(model(AddOrder("degree")(part)), model(part))
    with pytest.raises(ValueError, match="its edges as adj_t; leave ToSparseTensor out"):
        model(Data(x=part.x, adj_t=torch.eye(len(part.x))))  # as ToSparseTensor leaves it


def test_evaluation_is_deterministic_unless_asked_and_training_draws_orders():
    batch = joined([karate(), karate()])
    model = small("drawn orders", in_chans=34, norm="layer", local="gcn")
    assert torch.equal(model(batch), model(batch))
    assert not torch.equal(model.train()(batch), model(batch))
    model.eval().orders.seed = None
    assert not torch.equal(model(batch), model(batch))
    fixed = small("default", in_chans=34, norm="layer", local="gcn").train()
    assert torch.equal(fixed(batch), fixed(batch))


def test_random_orders_are_drawn_anew_and_averaged():
    found = Graphs.of(karate())
    drawn = Orders("colour", "random", 1, 5, 0)
    firsts = {visits[0].order[0, 0].item() for visits in drawn.draw(None, found, 40, training=True)}  # type: ignore[arg-type]
    assert len(firsts) > 15, "any node may come first"
    assert [len(visits) for visits in drawn.draw(None, found, 2, training=False)] == [5, 5]


def test_averaging_over_orders_is_the_mean_of_the_mixers():
    item = karate()
    found = Graphs.of(item)
    orders = Orders("degree", "random", 1, 3, 0)
    visits = orders.draw(item, found, 2, False)
    assert [len(several) for several in visits] == [3, 3]
    assert len({tuple(v.order[0].tolist()) for several in visits for v in several if v.order is not None}) == 6
    layer: Any = mamba_zoo.create_model("graph_mamba_layer", dim=34, local="none", norm="none").eval()
    x = torch.randn(34, 34)
    mixed = torch.stack([visit.mix(layer.mixer, x) for visit in visits[0]]).mean(0)
    heard = []
    layer.norm_mixer.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0]))
    layer(x, item.edge_index, None, visits[0])
    torch.testing.assert_close(heard[0], x + mixed)


def test_buckets_are_sequences_of_their_own():
    item = graph(10, 20, 0)
    found = Graphs.of(item)
    group = torch.tensor([0, 1] * 5)
    visit = Visit.split(graph_order("degree", found), found, group)
    layer: Any = mamba_zoo.create_model("graph_mamba_layer", dim=16).eval()
    x = torch.randn(10, 16)
    y = visit.mix(layer.mixer, x)
    order = graph_order("degree", found)[0]
    for bucket in (0, 1):
        mine = order[group[order] == bucket]
        torch.testing.assert_close(y[mine], layer.mixer(x[mine][None])[0])


def test_published_checkpoints_are_averaged_over_five_orders_others_are_not(tmp_path):
    model: Any = mamba_zoo.create_model("graph_mamba_mnist")
    assert model.orders.samples == 1
    own = {name: value.clone() for name, value in model.state_dict().items()}
    assert rename(own, KEYS).keys() == own.keys(), "our own names pass through the table of published ones"
    torch.save(own, tmp_path / "own.pth")
    again: Any = mamba_zoo.create_model("graph_mamba_mnist", checkpoint_path=tmp_path / "own.pth")
    assert again.orders.samples == 1


@pytest.mark.parametrize(
    ("pe", "transform"), [("lap", AddLaplacian(4)), ("rwse", AddRandomWalkPE(4, attr_name="random_walk_pe"))]
)
def test_positions(pe, transform):
    model = small("default", pe=pe, pe_dim=4, pe_steps=4)
    with pytest.raises(ValueError, match="pre_transform"):
        model(graph(6, 9, 0))
    items = [transform(graph(n, 2 * n, n)) for n in (7, 5)]
    together = model(joined(items))
    torch.testing.assert_close(together, torch.cat([model(item) for item in items]), rtol=1e-4, atol=1e-5)


def test_laplacian_positions():
    item = AddLaplacian(5)(graph(3, 4, 0))
    assert item.EigVals.shape == (3, 5, 1)
    assert item.EigVecs.shape == (3, 5)
    assert bool(item.EigVals[:, 3:].isnan().all())
    adjacency = torch.from_numpy(Graphs.of(item).adjacency.toarray()).float()
    laplacian = adjacency.sum(1).diag() - adjacency
    vectors = item.EigVecs[:, :3]
    torch.testing.assert_close(laplacian @ vectors, vectors * item.EigVals[0, :3, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"local": "gat"}, "local='gat'"),
        ({"level": "tree"}, "level='tree'"),
        ({"global_pool": "sum"}, "global_pool='sum'"),
        ({"ties": "none"}, "ties='none'"),
        ({"num_order_samples": 0}, "num_order_samples=0"),
        ({"norm": "rms"}, "norm='rms'"),
        ({"pe": "sin"}, "pe='sin'"),
        ({"edges": "all"}, "edges='all'"),
        ({"scan": "degre"}, "did you mean 'degree'"),
    ],
)
def test_unknown_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        small("default", **options)


def test_data_that_do_not_fit_are_refused():
    item = graph(4, 5, 0)
    with pytest.raises(ValueError, match="in_chans=5"):
        small("default", in_chans=5)(item)
    with pytest.raises(ValueError, match="edge_attr"):
        small("default", edges="linear", edge_chans=2)(item)
    with pytest.raises(ValueError, match="edge_label_index"):
        small("default", level="edge")(item)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"no nodes|without any node"):
            small(kind)(Data(x=torch.zeros(0, 16), edge_index=torch.zeros(2, 0, dtype=torch.long)))
    atoms: Any = mamba_zoo.create_model("graph_mamba_peptides_func", pe="none").eval()
    molecule = Data(x=torch.full((2, 9), 2), edge_index=torch.tensor([[0], [1]]), edge_attr=torch.tensor([[0, 7, 1]]))
    with pytest.raises(ValueError, match="integer feature 7 holds 2 to 2, but must be below 2"):
        atoms(molecule)
    molecule.x = torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="integer feature 1 holds 7 to 7, but must be below 6"):
        atoms(molecule)
    item.x, item.num_nodes = None, 4
    with pytest.raises(ValueError, match="OneHotDegree"):
        small("default")(item)


@pytest.mark.parametrize("how", ["mean", "add", "max"])
def test_pooling_leaves_zeros_for_a_graph_without_nodes(how):
    found = Graphs(torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 2, 2, 3]))
    x = torch.tensor([[-1.0], [-3.0], [2.0]])
    assert pool_nodes(x, found, how).flatten().tolist() == {
        "mean": [-2.0, 0.0, 2.0], "add": [-4.0, 0.0, 2.0], "max": [-1.0, 0.0, 2.0],
    }[how]  # fmt: skip


def test_gmn_draws_new_walks_in_training_only():
    item = karate()
    model: Any = small("gmn", in_chans=34)
    found = Graphs.of(item)
    assert torch.equal(model.neighbourhoods(found).token, model.neighbourhoods(found).token)
    model.train()
    assert not torch.equal(model.neighbourhoods(found).token, model.neighbourhoods(found).token)
    model.resample = False
    assert torch.equal(model.neighbourhoods(found).token, model.neighbourhoods(found).token)


def test_gmns_mixer_has_a_gate_for_each_direction():
    mixer, x = DirectionalMamba(8, d_state=3), torch.randn(1, 9, 8)
    order = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
    whole = mixer(x, order)
    parts = []
    for direction in (0, 1):
        one = DirectionalMamba(8, d_state=3, k=1)
        state = {n: p[direction : direction + 1] if p.shape[0] == 2 else p for n, p in mixer.state_dict().items()}
        one.load_state_dict(state)
        parts.append(one(x, order[direction : direction + 1]))
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_mamba_stands_in_for_pygs_gps_layer():
    data, batch = karate(), joined(graphs())
    layer = MambaGPSConv(16, GCNConv(16, 16), scan="both_ways(degree)", dropout=0.1)
    assert isinstance(layer, GPSConv)
    layer.reset_parameters()
    layer.eval()
    together = layer(batch.x, batch.edge_index, batch.batch)
    alone = torch.cat([layer(item.x, item.edge_index) for item in graphs()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    item = AddOrder("both_ways(degree)")(graphs()[0])
    given = layer(item.x, item.edge_index, order=item[order_key("both_ways(degree)")])
    torch.testing.assert_close(given, alone[:12], rtol=1e-4, atol=1e-5)
    plain = MambaGPSConv(34, None, norm=None).train()
    plain(data.x, data.edge_index).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    with pytest.raises(ValueError, match="scan='none'"):
        MambaGPSConv(16, None, scan="none")

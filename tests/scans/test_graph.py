"""Properties every registered order of graphs has, whatever its graphs and their numbering."""

import networkx
import pytest
import torch

from mamba_zoo.scans import (
    Graphs,
    as_spec,
    build_scan,
    graph_order,
    graph_scan,
    list_scans,
    register_graph_order,
    register_scan,
    unregister_scan,
)
from mamba_zoo.scans._registry import sample_scan
from mamba_zoo.scans._sample import Samples
from mamba_zoo.scans.graph import graph_orders, order_key, sort_nodes
from mamba_zoo.scans.neighbourhood import neighbourhoods

ORDERS = list_scans(modality="graph")
SPECS = [*ORDERS, "both_ways(degree)", "join(rcm, reverse(bfs))", "raster", "random(seed=3)"]


def edges_of(graph: networkx.Graph) -> torch.Tensor:
    pairs = torch.tensor(list(graph.edges()), dtype=torch.long).view(-1, 2).T
    return torch.cat([pairs, pairs.flip(0)], dim=1)


def single(graph: networkx.Graph) -> Graphs:
    return Graphs(edges_of(graph), torch.tensor([0, graph.number_of_nodes()]))


def packed(graphs: list[networkx.Graph]) -> Graphs:
    sizes = torch.tensor([0, *(graph.number_of_nodes() for graph in graphs)]).cumsum(0)
    return Graphs(torch.cat([edges_of(g) + at for g, at in zip(graphs, sizes[:-1], strict=True)], dim=1), sizes)


def zoo() -> list[networkx.Graph]:
    """A connected graph, disconnected ones, single and isolated nodes, no edges, and full symmetry."""
    return [
        networkx.karate_club_graph(),
        networkx.empty_graph(1),
        networkx.disjoint_union_all([networkx.path_graph(4), networkx.empty_graph(3), networkx.cycle_graph(5)]),
        networkx.empty_graph(6),
        networkx.star_graph(5),
        networkx.complete_graph(4),
        networkx.gnm_random_graph(20, 30, seed=1),
    ]


def asymmetric(count: int, n: int = 15, m: int = 26) -> list[Graphs]:
    """Random graphs all of whose nodes have a colour of their own."""
    made = (single(networkx.gnm_random_graph(n, m, seed=seed)) for seed in range(50))
    return [graphs for graphs in made if len(graphs.colours.unique()) == n][:count]


@pytest.mark.parametrize("spec", SPECS)
def test_orders_visit_every_node_once_and_a_batch_is_its_graphs_one_by_one(spec):
    graphs = packed(zoo())
    order = graph_order(spec, graphs)
    at = graphs.ptr.tolist()
    for row in order:
        assert sorted(row.tolist()) == list(range(graphs.num_nodes))
    singles = [single(graph) for graph in zoo()]
    for i, (graph, together) in enumerate(zip(singles, graph_orders(spec, singles), strict=True)):
        alone = graph_order(spec, graph) + at[i]
        assert torch.equal(together + at[i], alone)
        for row, own in zip(order, alone, strict=True):
            assert row[graphs.batch[row] == i].tolist() == own.tolist()


@pytest.mark.parametrize("name", ORDERS)
def test_renumbering_renumbers_the_order_and_nothing_else(name):
    found = asymmetric(4)
    assert len(found) == 4
    for graphs in found:
        permutation = torch.randperm(graphs.num_nodes)
        want = permutation[graph_order(name, graphs)]
        assert torch.equal(graph_order(name, graphs.renumbered(permutation)), want)


@pytest.mark.parametrize("name", ["colour", "degree", "pagerank", "eigenvector", "rwse"])
def test_only_nodes_of_one_colour_change_places_under_renumbering(name):
    graphs = packed(zoo())
    generator = torch.Generator().manual_seed(1)
    places = zip(graphs.ptr[:-1], graphs.lengths, strict=True)
    within = torch.cat([low + torch.randperm(n, generator=generator) for low, n in places])
    other = graphs.renumbered(within)
    assert torch.equal(graphs.colours[graph_order(name, graphs)], other.colours[graph_order(name, other)])


def test_colours_are_the_same_in_any_batch_and_numbering():
    graphs, alone = packed(zoo()), single(zoo()[0])
    assert torch.equal(graphs.colours[:34], alone.colours)
    permutation = torch.randperm(34)
    assert torch.equal(alone.renumbered(permutation).colours[permutation], alone.colours)
    assert len(single(networkx.cycle_graph(7)).colours.unique()) == 1
    assert single(networkx.path_graph(3)).colours.tolist() == [
        1437129678669977069, 5485265615063884401, 1437129678669977069,
    ], "no longer the recorded colours"  # fmt: skip


def test_orders_by_hand():
    path = single(networkx.path_graph(5))
    assert graph_order("rcm", path)[0].tolist() == [4, 3, 2, 1, 0]
    assert graph_order("fiedler", path)[0].tolist() in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])
    star = single(networkx.star_graph(4))
    for name in ("degree", "pagerank", "eigenvector"):
        assert graph_order(name, star)[0].tolist() == [1, 2, 3, 4, 0]
    assert graph_order("bfs", star)[0].tolist() == [0, 1, 2, 3, 4]
    tree = single(networkx.Graph([(0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (0, 6)]))
    assert graph_order("bfs", tree)[0].tolist() == [0, 1, 4, 6, 2, 5, 3]
    assert graph_order("dfs", tree)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    two = single(networkx.disjoint_union(networkx.complete_graph(4), networkx.complete_graph(5)))
    assert set(graph_order("clusters", two)[0].tolist()[:5]) == set(range(4, 9))
    assert set(graph_order("bfs", two)[0].tolist()[:5]) == set(range(4, 9)), "the largest part comes first"


def test_degree_and_pagerank_follow_the_direction_of_edges():
    into = Graphs(torch.tensor([[1, 2, 3], [0, 0, 0]]), torch.tensor([0, 4]))
    assert graph_order("degree", into)[0].tolist() == [0, 1, 2, 3]
    assert graph_order("pagerank", into)[0].tolist() == [1, 2, 3, 0]


def test_centralities_are_networkxs():
    graph = networkx.karate_club_graph()
    for name, score in [("pagerank", networkx.pagerank(graph, weight=None)),
                        ("eigenvector", networkx.eigenvector_centrality_numpy(graph))]:  # fmt: skip
        values = torch.tensor([score[i] for i in range(34)])[graph_order(name, single(graph))[0]]
        assert bool((values.diff() >= -1e-6).all())


def test_reverse_cuthill_mckee_narrows_the_band():
    graph = networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(6, 7))
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0))
    graphs = single(graph).renumbered(order)

    def width(row: torch.Tensor) -> int:
        place = torch.empty_like(row).scatter(0, row, torch.arange(len(row)))
        return int((place[graphs.edge_index[0]] - place[graphs.edge_index[1]]).abs().max())

    assert width(graph_order("rcm", graphs)[0]) <= 8
    assert width(torch.arange(42)) > 25


def test_noise_breaks_ties_instead_and_nothing_else():
    graphs = single(networkx.star_graph(6))
    seen = set()
    for seed in range(8):
        noise = torch.rand(7, generator=torch.Generator().manual_seed(seed))
        order = graph_order("degree", Graphs(graphs.edge_index, graphs.ptr, noise))[0].tolist()
        assert order[-1] == 0
        seen.add(tuple(order))
    assert len(seen) > 4


def test_orders_are_scans_of_grids_too():
    scan = build_scan("both_ways(rcm)", 3, 3)
    assert scan.k == 2
    assert scan.size == (3, 3)
    assert scan.order[0].tolist() == scan.order[1].flip(0).tolist()
    assert {"degree", "rcm"} <= set(list_scans(modality="graph"))
    assert "rcm" not in list_scans()


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("transpose(degree)", "transpose needs a grid"),
        ("with_token(degree)", "with_token and filled cannot be used"),
        ("cross", "orders a grid"),
        ("degre", "did you mean 'degree'"),
        ("pagerank(0.5, 3)", "takes \\(damping\\)"),
    ],
)
def test_what_cannot_be_ordered_is_refused(spec, match):
    with pytest.raises(ValueError, match=match):
        graph_order(spec, single(networkx.path_graph(5)))


@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_without_nodes_is_passed_over_but_not_all_of_them(spec):
    path = single(networkx.path_graph(3))
    order = graph_order(spec, Graphs(path.edge_index, torch.tensor([0, 0, 3, 3])))
    assert torch.equal(order, graph_order(spec, path))
    with pytest.raises(ValueError, match="without any node"):
        graph_order(spec, Graphs(path.edge_index[:, :0], torch.tensor([0, 0])))


def test_samples_of_another_modality_are_refused():
    with pytest.raises(ValueError, match="orders samples of graph, not of cloud"):
        sample_scan("degree", Samples("cloud", None, (3,)))


def test_a_users_order_is_usable_by_name_and_taken_once():
    @register_graph_order("by_storage_backwards")
    def backwards(graphs):
        return sort_nodes(graphs, -torch.arange(graphs.num_nodes))

    try:
        assert graph_order("reverse(by_storage_backwards)", single(networkx.path_graph(3)))[0].tolist() == [0, 1, 2]
        assert graph_scan("by_storage_backwards", packed(zoo()[:2])).length == 35
        with pytest.raises(ValueError, match="taken"):
            register_scan("by_storage_backwards")(lambda n: range(n))
        with pytest.raises(TypeError, match="must take the data of samples"):
            register_graph_order("two_things")(lambda graphs, needed: None)
    finally:
        unregister_scan("by_storage_backwards")


def test_graphs_are_read_from_what_tells_the_number_of_nodes():
    class Data:
        edge_index = torch.tensor([[0, 1], [1, 0]])

    with pytest.raises(ValueError, match="neither x nor num_nodes"):
        Graphs.of(Data())
    Data.batch = torch.tensor([0, 0, 2])  # type: ignore[attr-defined]
    assert Graphs.of(Data()).lengths == (2, 0, 1)
    Data.batch = torch.tensor([1, 0, 0])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ascending"):
        Graphs.of(Data())
    with pytest.raises(ValueError, match="holds node 5"):
        Graphs(torch.tensor([[0], [5]]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="holds node -1, but there are 2 nodes, counted from 0"):
        Graphs(torch.tensor([[0], [-1]]), torch.tensor([0, 2]))


def test_keys_of_prepared_orders_join_as_indices():
    assert order_key("degree") == order_key(as_spec(" degree"))
    assert order_key("degree") != order_key("rcm")
    assert "index" in order_key("rcm")


def test_neighbourhoods_lie_within_reach_and_hold_their_edges():
    graphs = packed(zoo())
    found = neighbourhoods(graphs, length=3, walks=3, samples=2)
    assert found.tokens == 7
    node = found.token // 7
    near = graphs.adjacency.toarray() > 0
    reach = torch.eye(graphs.num_nodes, dtype=torch.bool).numpy() | near
    for place, length in ((4, 1), (5, 1), (6, 0)):
        mine = found.token % 7 == place
        if length == 0:
            assert torch.equal(found.nodes[mine], node[mine]), "the last token is the node alone"
        assert all(reach[v, u] for v, u in zip(node[mine], found.nodes[mine], strict=True))
    one, other = found.edge_index
    assert torch.equal(found.token[one], found.token[other])
    assert all(near[u, v] for u, v in zip(found.nodes[one], found.nodes[other], strict=True))
    inside = sum(
        near[u, v]
        for token in found.token[:400].unique()
        for u in found.nodes[found.token == token]
        for v in found.nodes[found.token == token]
    )
    whole = found.token <= int(found.token[:400].unique()[-1])
    assert inside == int(whole[one].sum()), "an edge of the induced subgraph is missing"


def test_neighbourhoods_are_the_same_in_any_batch_and_numbering():
    graphs, alone = packed(zoo()), single(zoo()[0])
    one, many = neighbourhoods(alone, 2, 3, 2, seed=5), neighbourhoods(graphs, 2, 3, 2, seed=5)
    assert torch.equal(many.nodes[: len(one.nodes)], one.nodes)
    assert not torch.equal(neighbourhoods(alone, 2, 3, 2, seed=6).token, one.token)
    first = asymmetric(1)[0]
    permutation = torch.randperm(first.num_nodes)
    a, b = neighbourhoods(first, 2), neighbourhoods(first.renumbered(permutation), 2)
    moved = torch.stack([permutation[a.token // a.tokens], a.token % a.tokens, permutation[a.nodes]])
    found = torch.stack([b.token // b.tokens, b.token % b.tokens, b.nodes])
    assert sorted(moved.T.tolist()) == found.T.tolist()
    with pytest.raises(ValueError, match="walks=0"):
        neighbourhoods(alone, 2, walks=0)

"""Orders of points: permutations, ties, packed clouds, what each one is meant to do."""

import pytest
import torch

from mamba_zoo.backbones._mixer import Mamba
from mamba_zoo.scans import list_scans, point_order, register_point_order, unregister_scan
from mamba_zoo.scans._cloud import rows_of, trusted
from mamba_zoo.scans.points import cts_code, hilbert_code, zcurve_code


def clouds(b: int = 3, n: int = 40, device: str | torch.device = "cpu") -> torch.Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("name", list_scans(modality="points"))
def test_every_order_is_a_permutation_of_each_cloud_alone(name, device):
    x = clouds(device=device) * torch.tensor([0.1, 1.0, 5.0], device=device)[:, None, None]
    order = point_order(name, x)
    assert order.shape == (3, 1, 40)
    assert order.device.type == device.type
    assert torch.equal(order.sort(-1).values, torch.arange(40, device=device).expand(3, 1, -1))
    for cloud, row in zip(x, order, strict=True):
        assert torch.equal(point_order(name, cloud[None])[0], row), "an order depends on its cloud alone"
    assert torch.equal(point_order(name, x[:, :1]), torch.zeros(3, 1, 1, dtype=torch.int64, device=device))


@pytest.mark.parametrize("name", sorted({*list_scans(modality="points")} - {"random", "given", "spectral"}))
def test_equal_points_are_visited_as_they_are_stored(name):
    x = clouds(1, 10).repeat_interleave(4, dim=1)
    order = point_order(name, x)[0, 0].view(10, 4)
    assert torch.equal(order, order[:, :1] + torch.arange(4))


@pytest.mark.parametrize("name", ["hilbert", "cts", "spectral", "sort_z", "zcurve_trans"])
def test_renumbering_the_points_changes_nothing_else(name):
    x, shuffle = clouds(1), torch.randperm(40)
    path, again = x[0, point_order(name, x)[0, 0]], x[0, shuffle][point_order(name, x[:, shuffle])[0, 0]]
    assert torch.equal(path, again)


def test_curves_visit_neighbours():
    grid = torch.cartesian_prod(*[torch.arange(8)] * 3)
    steps = {
        "hilbert": hilbert_code(grid, 3),
        "cts": cts_code(grid[None], "yzx")[0],
        "zcurve": zcurve_code(grid),
    }
    lengths = {name: (grid[code.argsort()].diff(dim=0).abs().sum(-1)) for name, code in steps.items()}
    assert lengths["hilbert"].tolist() == [1] * 511
    assert lengths["cts"].tolist() == [1] * 511
    assert lengths["zcurve"].float().mean() > 1.5
    assert torch.equal(steps["hilbert"].sort().values, torch.arange(512)), "a code is a place on the curve"
    rows = grid[steps["cts"].argsort()]
    assert (rows[:8, 1].diff().abs() == 1).all(), "the first axis is walked first"
    assert torch.equal(hilbert_code(grid, 6).argsort(), hilbert_code(grid, 3).argsort())
    assert not torch.equal(hilbert_code(grid, 4).argsort(), hilbert_code(grid, 3).argsort())


def test_spectral_goes_from_one_end_to_the_other():
    t = torch.linspace(0, 1, 50)
    helix = torch.stack([t, (6 * t).sin(), (6 * t).cos()], dim=-1)
    shuffle = torch.randperm(50)
    order = point_order("spectral", helix[shuffle][None])[0, 0]
    assert torch.equal(shuffle[order], torch.arange(50))
    with pytest.raises(ValueError, match="use 'hilbert', or sample 4096 points"):
        point_order("spectral", torch.zeros(1, 4097, 3))


def test_random_follows_its_seed():
    x = clouds()
    assert torch.equal(point_order("random(seed=4)", x), point_order("random(4)", x.flip(1)))
    assert not torch.equal(point_order("random(seed=4)", x), point_order("random", x))


def test_cells_may_follow_the_size_of_the_cloud():
    x = clouds()
    assert torch.equal(point_order("hilbert(cell=None)", x), point_order("hilbert(cell=None)", 1000 * x + 7))
    assert torch.equal(point_order("hilbert(cell=0.5)", x), point_order("hilbert(cell=5.0)", 10 * x))
    with pytest.raises(ValueError, match="give a larger cell, or cell=None"):
        point_order("hilbert", 1e6 * x)
    with pytest.raises(ValueError, match="cell=0 must be positive"):
        point_order("zcurve(cell=0)", x)


def test_specs():
    x = clouds()
    a, b = point_order("sort_x", x), point_order("cts('zxy')", x)
    assert torch.equal(point_order("join(sort_x, cts(axes='zxy'))", x), torch.cat([a, b], 1))
    assert torch.equal(point_order("first(both_ways(sort_x), 1)", x), a)
    assert torch.equal(point_order("reverse(sort_x)", x), a.flip(-1))
    assert rows_of("join(sort_x, both_ways(sort_y))") == [
        ("sort_x", 0), ("both_ways(sort_y)", 0), ("both_ways(sort_y)", 1),
    ]  # fmt: skip
    for spec, message in {
        "hilbert(depht=3)": r"hilbert takes \(cell, depth, shared_depth\)",
        "sort_x(1)": "sort_x takes no options",
        "join(3)": "join is made of other scans",
        "first(sort_x, 2)": "the scan has 1 directions",
        "cts('xxy')": "must be an arrangement of 'xyz'",
        "2": "'2' is no scan",
        "spiral": "no scan of points named 'spiral'",
    }.items():
        with pytest.raises(ValueError, match=message):
            point_order(spec, x)
    with pytest.raises(TypeError, match="a name, a spec or a function"):
        point_order(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"xyz must be \(b, n, 3\)"):
        point_order("sort_x", x[0])


def test_clouds_that_have_no_order_are_refused():
    x = clouds()
    with pytest.raises(ValueError, match=r"xyz \(3, 0, 3\) holds no points"):
        point_order("sort_x", x[:, :0])
    with pytest.raises(ValueError, match="holds no points"):
        point_order("hilbert", x[0, :0], torch.tensor([0, 0]))
    x[1, 4, 2] = torch.nan
    with pytest.raises(ValueError, match="coordinates that are not finite"):
        point_order("hilbert", x)
    with pytest.raises(ValueError, match="give a larger cell"):
        point_order("zcurve", clouds() * 1e30)


def test_own_orders():
    x = clouds()
    assert torch.equal(point_order(by_distance, x)[:, 0], by_distance(x))

    register_point_order("by_distance")(by_distance)
    try:
        assert "by_distance" in list_scans(modality="points")
        assert point_order("both_ways(by_distance)", x).shape == (3, 2, 40)
        with pytest.raises(ValueError, match="is taken"):
            register_point_order("by_distance")(lambda xyz: xyz)
    finally:
        unregister_scan("by_distance", "points")
    with pytest.raises(TypeError, match=r"must return int64 indices \(3, 40\)"):
        point_order(lambda xyz: xyz, x)


def by_distance(xyz: torch.Tensor) -> torch.Tensor:
    return xyz.norm(dim=-1).argsort(dim=-1, stable=True)


def test_packed_clouds_go_into_the_op_as_they_are(device):
    x = clouds(1, 60, device)[0]
    cuts = torch.tensor([0, 25, 25, 60], device=device)
    order = point_order("join(hilbert, sort_y)", x, cuts)
    assert order.shape == (2, 60)
    assert (order[:, :25] < 25).all()
    torch.manual_seed(0)
    layer = Mamba(16, d_state=4, k=2).to(device)
    tokens = torch.randn(1, 60, 16, device=device)
    with torch.no_grad():
        packed = layer(tokens, order, cuts)
        for start, end in ((0, 25), (25, 60)):
            alone = layer(tokens[:, start:end], point_order("join(hilbert, sort_y)", x[None, start:end]))
            torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"with cu_seqlens, xyz must be \(l, 3\)"):
        point_order("sort_x", x[None], cuts)


def test_orders_per_sample_need_not_be_read_back(device, monkeypatch):
    torch.manual_seed(0)
    layer, x = Mamba(16, d_state=4).to(device), torch.randn(3, 40, 16, device=device)
    order = point_order("hilbert", clouds(device=device))
    with torch.no_grad():
        checked = layer(x, order.clone())
        monkeypatch.setattr("mamba_zoo.kernels._order._check_values", None)
        assert torch.equal(layer(x, trusted(order, 40)), checked)

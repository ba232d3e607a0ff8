"""Properties every registered scan has, and the tables of the published models."""

import doctest
import gzip
import importlib
import json
import math
import pkgutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mamba_zoo.scans
from mamba_zoo.scans import SCANS, build_scan, list_scans, scan_order

SIZES = [(1, 1), (1, 7), (2, 3), (5, 4), (7, 7), (14, 14), (13, 27)]
VIDEO_SIZES = [(1, 1, 1), (5, 1, 1), (1, 3, 4), (2, 3, 1), (3, 4, 5), (4, 7, 6), (2, 13, 9)]
DIRECTIONS = {
    "raster": 1, "column": 1, "bidirectional": 2, "cross": 4, "snake": 4, "window": 4, "local": 4, "atrous": 4,
    "diagonal": 4, "spiral": 2, "random": 4, "hilbert": 4, "zcurve": 4, "spatial_first": 2, "temporal_first": 2,
    "spatiotemporal": 4, "cross_video": 6, "snake_video": 4, "hilbert_video": 4, "time_first": 2,
    "frequency_first": 2, "time_window": 2,
    "forward": 1, "reversed": 1, "permuted": 1, "shuffled": 1, "step_first": 1,
}  # fmt: skip
OFFICIAL = json.loads(gzip.decompress((Path(__file__).parent / "fixtures/scan_orders.json.gz").read_bytes()))


def sizes_of(name: str) -> list[tuple[int, ...]]:
    """Grids that a scan is tried on: of images unless it is for videos only."""
    return [*VIDEO_SIZES] if SCANS[name].axes == ("frames", "height", "width") else [*SIZES]


def moves(row: torch.Tensor, width: int) -> torch.Tensor:
    """Rows and columns that a path of tokens advances at each step, `(steps - 1, 2)`."""
    row = row[row >= 0]
    return torch.stack([row // width, row % width], dim=1).diff(dim=0).abs()


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in list_scans() for size in sizes_of(name)], ids=str)
def test_orders_are_sound(name, size, device):
    scan, l = build_scan(name, *size, device=device), math.prod(size)
    assert scan.order.device.type == device.type
    assert (scan.k, scan.length, scan.size, scan.name) == (len(scan.order), l, size, name)
    for row in scan.order:
        visited = row[row >= 0]
        assert len(visited.unique()) == len(visited), "a direction visits some token twice"
    assert set(scan.order.flatten().tolist()) - {-1} == set(range(l)), "together the directions miss a token"
    x = torch.randn(2, l, 4, device=device)
    steps = scan.gather(x)
    back = scan.restore(steps)
    assert steps.shape == (2, scan.k, scan.m, 4)
    assert back.shape == (2, scan.k, l, 4)
    for k, row in enumerate(scan.order):
        visited, rest = row[row >= 0], torch.ones(l, dtype=torch.bool, device=device)
        rest[visited] = False
        assert not steps[:, k, row < 0].any(), f"direction {k} reads something at an empty step"
        assert torch.equal(back[:, k, visited], x[:, visited]), f"direction {k} does not return tokens to their places"
        assert not back[:, k, rest].any(), f"direction {k} writes where it never was"
    assert torch.equal(scan_order(name, size, device), scan.order.int())


def test_every_scan_has_its_documented_directions():
    assert {name: build_scan(name, *sizes_of(name)[-1]).k for name in list_scans()} == DIRECTIONS
    for name in list_scans():
        assert "direction" in (SCANS[name].function.__doc__ or "")


@pytest.mark.parametrize(
    ("spec", "official"),
    [
        ("cross", "cross2d"),
        ("join(raster, raster, raster, raster)", "unidi"),
        ("both_ways(join(raster, raster))", "bidi"),
    ],
)
@pytest.mark.parametrize("size", [(3, 5), (4, 4)], ids=str)
def test_cross_tables_are_vmambas(spec, official, size):
    assert build_scan(spec, *size).order.tolist() == OFFICIAL["cross"][f"{official}/{size[0]}x{size[1]}"]


@pytest.mark.parametrize("size", [(3, 5), (4, 4)], ids=str)
def test_atrous_tables_are_efficient_vmambas(size):
    assert build_scan("atrous", *size).order.tolist() == OFFICIAL["efficient"][f"{size[0]}x{size[1]}"]


@pytest.mark.parametrize(
    ("size", "name"),
    [(tuple(map(int, size.split("x"))), name) for size, tables in OFFICIAL["local"].items() for name in tables],
    ids=str,
)
def test_local_tables_are_localmambas(size, name):
    want = OFFICIAL["local"][f"{size[0]}x{size[1]}"][name]
    assert build_scan(f"local([{name!r}])", *size).order.tolist() == [want]
    if name.startswith("w"):
        spec = f"first(window({name[1]}))"
        spec = f"reverse({spec})" if name.endswith("flip") else spec
        assert build_scan(spec, *size).order.tolist() == [want]


def test_local_pads_shorter_directions_at_their_end():
    order = build_scan("local(['h', 'w2', 'w2_flip'])", 3, 3).order
    assert order.shape == (3, 16)
    assert order[0].tolist() == [*range(9), *[-1] * 7]
    assert order[2].tolist() == order[1].tolist()[::-1]


@pytest.mark.parametrize("size", [(3, 5), (9, 8), (2, 20)], ids=str)
@pytest.mark.parametrize("spec", ["window(999)", "local(['w999', 'w999_flip'])"])
def test_windows_beyond_the_grid_cost_no_steps(spec, size):
    scan = build_scan(spec, *size)
    assert scan.m <= max(7, size[0]) * max(7, size[1])
    assert scan.order[0][scan.order[0] >= 0].tolist() == list(range(size[0] * size[1]))


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (3, 3), (4, 4)], ids=str)
def test_snake_is_plainmambas(size):
    """The walk as the paper tells it: right, down, left, down, ... and its reverse; then the same in columns."""

    def walk(height, width):
        path = []
        for h in range(height):
            path += [(h, w) for w in (range(width) if h % 2 == 0 else reversed(range(width)))]
        return path

    height, width = size
    rows = [h * width + w for h, w in walk(height, width)]
    columns = [h * width + w for w, h in walk(width, height)]
    assert build_scan("snake", *size).order.tolist() == [rows, rows[::-1], columns, columns[::-1]]


def test_bidirectional_is_vims():
    scan = build_scan("bidirectional", 2, 3)
    assert scan.order.tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert scan.reduce == "mean"
    assert build_scan("cross", 2, 3).reduce == "sum"


def test_small_tables_by_hand():
    assert build_scan("column", 2, 3).order.tolist() == [[0, 3, 1, 4, 2, 5]]
    assert build_scan("spiral", 3, 4).order.tolist()[0] == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert build_scan("diagonal", 3, 3).order.tolist()[:2] == [[0, 1, 3, 2, 4, 6, 5, 7, 8], [2, 1, 5, 0, 4, 8, 3, 7, 6]]
    assert build_scan("diagonal(zigzag=True)", 3, 3).order[0].tolist() == [0, 3, 1, 2, 4, 6, 7, 5, 8]
    assert build_scan("zcurve", 4, 4).order[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert build_scan("zcurve", 2, 3).order[0].tolist() == [0, 1, 3, 4, 2, 5]
    assert build_scan("zcurve", 2, 2, 2).order[0].tolist() == list(range(8))
    down_and_round = [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert build_scan("hilbert", 4, 4).order[0].tolist() == down_and_round


def test_hilbert_only_ever_steps_to_a_neighbour():
    for height in range(1, 23):
        for width in range(1, 23):
            for row in build_scan("hilbert", height, width).order:
                step = moves(row, width).sum(1)
                assert bool((step == 1).all()), f"{height} x {width} jumps {int(step.max())}"


@pytest.mark.parametrize("size", [(5, 4), (4, 5), (13, 27), (14, 27), (16, 16)], ids=str)
def test_hilbert_directions_are_a_curve_its_transpose_and_both_reversed(size):
    order = build_scan("hilbert", *size).order
    turned = build_scan("transpose(hilbert)", *size).order
    assert torch.equal(turned, order[[1, 0, 3, 2]])
    assert torch.equal(order[2:], order[:2].flip(1))
    assert not torch.equal(order[0], order[1])


def test_hilbert_keeps_neighbours_nearer_than_rows():
    near = {name: build_scan(f"first({name})", 32, 32).statistics(window=8)["near"] for name in ("raster", "hilbert")}
    assert near["raster"] == pytest.approx(0.5)  # only the neighbours within a row
    assert near["hilbert"] > 0.65


@pytest.mark.parametrize("spec", ["snake", "spiral"])
def test_continuous_scans_have_no_jumps(spec):
    for size in SIZES:
        for row in build_scan(spec, *size).order:
            assert bool((moves(row, size[1]).sum(1) == 1).all())


def test_zigzag_never_jumps_further_than_a_diagonal():
    for size in SIZES:
        for row in build_scan("diagonal(True)", *size).order:
            assert moves(row, size[1]).max() <= 1 if len(row) > 1 else True


@pytest.mark.parametrize("step", [1, 2, 3])
def test_atrous_directions_share_the_tokens_out(step):
    order = build_scan(f"atrous({step})", 7, 8).order
    assert order.shape == (step * step, math.ceil(7 / step) * math.ceil(8 / step))
    assert sorted(order[order >= 0].tolist()) == list(range(56))


def test_random_depends_on_its_seed_only():
    one, other = build_scan("random", 5, 5), build_scan("random(seed=1)", 5, 5)
    assert torch.equal(one.order, build_scan("random(0)", 5, 5).order)
    assert torch.equal(one.order, build_scan("random", 25).order)
    assert not torch.equal(one.order, other.order)
    assert len({tuple(row) for row in one.order.tolist()}) == 4
    assert build_scan("random(k=6)", 5, 5).k == 6
    assert build_scan("random(k=1)", 3, 3).order.tolist() == [[3, 2, 1, 8, 6, 0, 7, 4, 5]], (
        "no longer the recorded table"
    )


@pytest.mark.parametrize("name", list_scans())
def test_large_grids_build_in_well_under_a_second(name):
    size = (223, 224) if len(sizes_of(name)[0]) == 2 else (16, 56, 57)  # sizes no other test has cached
    start = time.perf_counter()
    build_scan(name, *size)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["raster", "bidirectional", "random", "column", "zcurve"])
@pytest.mark.parametrize("size", [(9,), (2, 3, 4)], ids=str)
def test_some_scans_take_any_number_of_dimensions(name, size):
    scan = build_scan(name, *size)
    assert sorted(scan.order[0].tolist()) == list(range(math.prod(size)))
    assert scan.coordinates().shape == (math.prod(size), len(size))


def test_coordinates_follow_the_raster():
    places = build_scan("with_token(raster, 1)", 2, 2).coordinates()
    assert places.tolist() == [[0, 0], [-1, -1], [0, 1], [1, 0], [1, 1]]
    assert np.array_equal(build_scan("raster", 3).coordinates(), [[0], [1], [2]])


def test_doctests_of_the_package():
    tried = 0
    for module in pkgutil.iter_modules(mamba_zoo.scans.__path__, "mamba_zoo.scans."):
        result = doctest.testmod(importlib.import_module(module.name), extraglobs={"torch": torch})
        assert not result.failed, module.name
        tried += result.attempted
    assert tried >= 10

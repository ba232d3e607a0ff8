"""Scan objects: checks, reductions, composition, statistics and pictures."""

import pytest
import torch

from mamba_zoo.scans import Scan, both_ways, build_scan, filled, first, join, reverse, transpose, with_token

ROWS = Scan(torch.arange(6)[None], 6, size=(2, 3), name="rows")


@pytest.mark.parametrize(
    ("order", "options", "error", "message"),
    [
        ([[0, 1]], {}, TypeError, "order must be an integer tensor of token indices, not list"),
        (torch.tensor([[0.0, 1.0]]), {}, TypeError, "not torch.float32"),
        (torch.tensor([[False, True]]), {}, TypeError, "not torch.bool"),
        (torch.tensor([0, 1]), {}, ValueError, r"\(directions, steps\), both >= 1, not \(2,\)"),
        (torch.tensor([[0, 2]]), {}, ValueError, "order holds 2, but tokens run from 0 to 1"),
        (torch.tensor([[0, -2]]), {}, ValueError, "order holds -2"),
        (torch.tensor([[0, 1], [1, 1]]), {}, ValueError, "direction 1 visits token 1 twice"),
        (torch.tensor([[0, 1]]), {"reduce": "max"}, ValueError, "reduce='max' is unknown"),
        (
            torch.tensor([[0, 1]]),
            {"size": (2, 2)},
            ValueError,
            r"size \(2, 2\) and 0 extra tokens do not make length=2",
        ),
    ],
)
def test_bad_tables_are_refused(order, options, error, message):
    with pytest.raises(error, match=message):
        Scan(order, 2, **options)


def test_empty_steps_may_repeat_and_read_zeros():
    scan = Scan(torch.tensor([[1, -1, 0, -1], [-1, -1, -1, 1]], dtype=torch.int32), 2)
    assert scan.padded
    assert scan.order.dtype == torch.int64
    x = torch.tensor([[[1.0], [2.0]]], requires_grad=True)
    assert scan.gather(x).flatten().tolist() == [2, 0, 1, 0, 0, 0, 0, 2]
    y = torch.arange(1.0, 9.0).view(1, 2, 4, 1)
    assert scan.restore(y).flatten().tolist() == [3, 1, 0, 8]
    assert scan.merge(scan.restore(y)).flatten().tolist() == [3, 9]
    scan.gather(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 2]


def test_reductions():
    y = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1)
    table = torch.tensor([[0, 1], [1, 0]])
    assert Scan(table, 2).merge(y).flatten().tolist() == [4, 6]
    assert Scan(table, 2, reduce="mean").merge(y).flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.gather(torch.zeros(2, 5, 3)),
        lambda s: s.gather(torch.zeros(6, 3)),
        lambda s: s.restore(torch.zeros(2, 1, 5, 3)),
        lambda s: s.restore(torch.zeros(2, 2, 6, 3)),
        lambda s: s.merge(torch.zeros(2, 1, 5, 3)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match=r"Scan\(rows, size=\(2, 3\), k=1, m=6, l=6, sum\) needs .* has shape"):
        call(ROWS)


def test_to_keeps_everything_else(device):
    scan = build_scan("window(2)", 3, 3).to(device)
    assert scan.order.device.type == device.type
    assert (scan.padded, scan.name, scan.size) == (True, "window(2)", (3, 3))


def test_composition_in_python():
    assert both_ways(ROWS).order.tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert both_ways(ROWS).name == "both_ways(rows)"
    assert torch.equal(first(both_ways(ROWS)).order, ROWS.order)
    assert torch.equal(reverse(reverse(ROWS)).order, ROWS.order)
    columns = transpose(ROWS)
    assert columns.size == (3, 2)
    assert columns.order.tolist() == [[0, 2, 4, 1, 3, 5]]
    assert torch.equal(transpose(columns).order, ROWS.order)
    both = join(ROWS, Scan(torch.tensor([[5, 4]]), 6, reduce="mean", size=(2, 3)))
    assert both.order.tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, -1, -1, -1, -1]]
    assert both.reduce == "sum"
    with pytest.raises(ValueError, match="join needs scans over the same tokens"):
        join(ROWS, columns)


@pytest.mark.parametrize("size", [(3, 5), (1, 4), (2, 2)], ids=str)
def test_transposed_rows_are_columns(size):
    assert torch.equal(build_scan("transpose(raster)", *size).order, build_scan("column", *size).order)
    assert torch.equal(build_scan("transpose(cross)", *size).order, build_scan("cross", *size).order[[1, 0, 3, 2]])
    rows, columns = build_scan("window(2)", *size).order[:2]
    assert torch.equal(build_scan("transpose(first(window(2)))", *size).order[0], columns)
    assert len(rows) == len(columns)


def test_transpose_with_axes_puts_time_last():
    """A clip `(t, h, w)` visited place by place, all times of a place in a row."""
    scan = build_scan("transpose(raster, axes=(1, 2, 0))", 2, 1, 3)
    assert scan.size == (2, 1, 3)
    assert scan.order.tolist() == [[0, 3, 1, 4, 2, 5]]
    padded = build_scan("transpose(window(2))", 3, 2)
    assert sorted(padded.order[0].tolist()) == [-1, -1, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("l", [4, 5, 9])
@pytest.mark.parametrize("position", [0, 1, 2, 4, "middle"])
def test_class_token_of_bidirectional_is_a_flip_of_the_whole_sequence(l, position):
    scan = build_scan(f"with_token(bidirectional, {position!r})", l)
    assert scan.order.tolist() == [list(range(l + 1)), list(range(l, -1, -1))]
    assert scan.extra == ((l // 2,) if position == "middle" else (position,))
    assert (scan.length, scan.size, scan.reduce) == (l + 1, (l,), "mean")


def test_class_token_of_other_scans_comes_at_its_step():
    assert build_scan("with_token(column, 1)", 2, 2).order.tolist() == [[0, 1, 3, 2, 4]]
    cross = build_scan("with_token(cross)", 3, 3).order
    assert (cross[:2, 4] == 4).all()
    assert torch.equal(cross[2:], cross[:2].flip(1))
    uneven = build_scan("with_token(cross, 3)", 3, 3).order
    assert uneven[:, 3].tolist()[:2] == [3, 3]
    assert torch.equal(uneven[2:], uneven[:2].flip(1))
    short = build_scan("with_token(atrous, 9)", 3, 4)
    assert (short.order[:, -1] == 9).all()
    assert short.order.max() == 12
    assert build_scan("with_token(window(2), 4)", 3, 3).order.shape == (4, 17)
    assert build_scan("with_token(bidirectional, 0)", 1).order.tolist() == [[0, 1], [1, 0]]


def test_class_token_comes_last_where_no_other_direction_brings_it_the_rest():
    assert build_scan("with_token(column, 1, 'last')", 2, 2).order.tolist() == [[0, 3, 2, 4, 1]]
    assert build_scan("with_token(bidirectional, 1, 'last')", 2, 1).order.tolist() == [[0, 1, 2], [2, 1, 0]]
    mixed = build_scan("with_token(join(reverse(raster), column, raster), 0, 'last')", 2, 2).order
    assert mixed.tolist() == [[0, 4, 3, 2, 1], [1, 3, 2, 4, 0], [1, 2, 3, 4, 0]]
    assert (build_scan("with_token(atrous, 0, 'last')", 3, 4).order[:, -1] == 0).all()
    assert build_scan("with_token(raster, 0, 'last')", 2, 1).name == "with_token(raster, 0, 'last')"
    with pytest.raises(ValueError, match="unpaired='first' must be 'there' or 'last'"):
        build_scan("with_token(raster, 0, 'first')", 2, 2)


def test_empty_steps_filled_with_tokens_of_their_own():
    scan = build_scan("filled(local(['h', 'w2', 'w2_flip']))", 3, 3)
    assert (scan.m, scan.length, scan.size, scan.extra) == (16, 16, (3, 3), tuple(range(9, 16)))
    assert not scan.padded
    assert scan.order.sort().values.tolist() == [list(range(16))] * 3
    empty = build_scan("local(['h', 'w2', 'w2_flip'])", 3, 3).order < 0
    assert torch.equal(scan.order >= 9, empty)
    token = build_scan("filled(with_token(window(2), 4))", 3, 3)
    assert token.extra == (4, *range(10, 17))
    assert torch.equal(filled(ROWS).order, ROWS.order)
    parts = build_scan("filled(atrous)", 3, 3)
    assert torch.equal(parts.order, build_scan("atrous", 3, 3).order)


def test_two_class_tokens():
    scan = with_token(with_token(ROWS, 0), 0)
    assert scan.extra == (0, 1)
    assert scan.length == 8
    assert with_token(with_token(ROWS, 3), 2).extra == (2, 4)
    for bad in (-1, 7, "end", 1.0):
        with pytest.raises(ValueError, match="must be 'middle' or an index from 0 to 6"):
            with_token(ROWS, bad)  # pyright: ignore[reportArgumentType]


def test_statistics_by_hand():
    found = ROWS.statistics(window=2)
    # moves: 1, 1, sqrt(5), 1, 1; pairs: four within rows with gap 1, three between rows with gap 3
    assert found["jump_mean"] == pytest.approx((4 + 5**0.5) / 5)
    assert found["jump_max"] == pytest.approx(5**0.5)
    assert found["adjacent"] == pytest.approx(4 / 5)
    assert found["near"] == found["near_any"] == pytest.approx(4 / 7)
    assert found["gap_mean"] == pytest.approx((4 * 1 + 3 * 3) / 7)
    assert (found["directions"], found["steps"], found["empty"], found["lost"]) == (1, 6, 0, 0)
    cross = build_scan("cross", 2, 3).statistics(window=2)
    assert cross["near_any"] == 1
    assert cross["gap_best_mean"] == pytest.approx(1)


def test_statistics_of_padded_partial_and_tiny_scans():
    atrous = build_scan("atrous", 3, 3).statistics()
    assert atrous["lost"] == 1, "no direction visits two neighbours"
    assert atrous["empty"] == pytest.approx(7 / 16)
    assert atrous["gap_best_mean"] == 0
    tiny = build_scan("raster", 1, 1).statistics()
    assert tiny["jump_max"] == tiny["near"] == tiny["gap_mean"] == 0
    padded = build_scan("first(window(2))", 1, 4).statistics()  # 0 1 . . 2 3 . .
    assert padded["gap_mean"] == pytest.approx((1 + 3 + 1) / 3), "empty steps count as steps"
    assert build_scan("with_token(raster)", 2, 3).statistics()["adjacent"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("hilbert", (5, 4)), ("atrous", (3, 3)), ("with_token(window(2))", (3, 3)), ("raster", (1, 1)),
        ("both_ways(random)", (4,)), ("zcurve", (2, 3, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_plot_saves_a_picture(spec, size, tmp_path):
    from matplotlib.image import imread

    scan = build_scan(spec, *size)
    figure = scan.plot(tmp_path / "scan.png", panel=1.0, dpi=50)
    assert len([axes for axes in figure.axes if axes.axison]) == scan.k
    assert as_pixels_differ(imread(tmp_path / "scan.png"))


def as_pixels_differ(picture) -> bool:
    return picture.min() < 0.5 < picture.max()


def test_plot_refuses_four_dimensions():
    with pytest.raises(ValueError, match="one to three dimensions"):
        build_scan("raster", 2, 2, 2, 2).plot()

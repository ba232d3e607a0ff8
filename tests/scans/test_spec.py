"""Specs, user scans, and tables inside compiled, exported and fake code."""

import copy
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from mamba_zoo.scans import (
    SCANS,
    Scan,
    as_spec,
    build_scan,
    list_scans,
    register_scan,
    scan_order,
    unregister_scan,
)


@pytest.fixture
def temporary():
    """Remove what a test registers."""
    before = set(SCANS)
    yield
    for name in set(SCANS) - before:
        unregister_scan(name)


@pytest.mark.parametrize(
    ("spec", "k"),
    [
        ("hilbert", 4), ("first(hilbert)", 1), ("first(hilbert, 2)", 2), ("first(hilbert, k=3)", 3),
        ("both_ways(first(raster))", 2), ("both_ways(transpose(hilbert))", 8), ("window(2)", 4),
        (" window( size = 2 ) ", 4), ("random(seed=3, k=2)", 2), ("random(3, 2)", 2), ("reverse(atrous(step=3))", 9),
        ("join(raster, column, first(window(2)))", 3), ("local(['h', 'w2_flip'])", 2), ("with_token(cross, 8)", 4),
        ("transpose(raster, axes=(0, 1))", 1),
    ],
)  # fmt: skip
def test_specs_build(spec, k):
    scan = build_scan(spec, 5, 4)
    assert scan.k == k
    assert scan.name == as_spec(spec)
    assert as_spec(scan.name) == scan.name
    assert torch.equal(scan_order(spec, (5, 4), "cpu").long(), scan.order)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hilbrt", r"no scan named 'hilbrt'; did you mean 'hilbert'"),
        ("both_ways(snak)", r"no scan named 'snak' in 'both_ways\(snak\)'; did you mean 'snake'"),
        ("qqqq", r"no scan named 'qqqq'; choose from atrous, "),
        ("window(", r"scan='window\(' does not parse"),
        ("", r"scan='' does not parse"),
        ("window(size=2", r"does not parse"),
        ("raster + column", r"'raster \+ column' is no scan; use names, calls and literals"),
        ("__import__('os').system('true')", r"is no scan"),
        ("window(__import__('os'))", r"must be a literal"),
        ("window(size=len)", r"'len' must be a literal"),
        ("window(7, 2)", r"window takes \(size\) after the grid size"),
        ("window(2, size=3)", r"window takes \(size\)"),
        ("window(sise=3)", r"window takes \(size\)"),
        ("window(**{'size': 3})", r"window takes \(size\)"),
        ("cross(3)", r"cross takes no options"),
        ("both_ways", r"both_ways is made of other scans; write for example 'both_ways\(raster\)'"),
        ("both_ways(3)", r"both_ways is made of other scans"),
        ("both_ways(raster, column)", r"does not fit: too many positional arguments"),
        ("first(raster, n=2)", r"does not fit: got an unexpected keyword argument 'n'"),
    ],
)
def test_bad_specs_are_refused_before_any_grid_is_known(spec, message):
    with pytest.raises(ValueError, match=message):
        as_spec(spec)
    with pytest.raises(ValueError, match=message):
        build_scan(spec, 4, 4)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("cross", (9,), r"scan 'cross' orders a grid of \(height, width\), but the size is \(9,\)"),
        ("cross", (), r"needs the size of its grid"),
        ("raster", (0, 3), r"every side >= 1, not \(0, 3\)"),
        ("window(0)", (3, 3), r"window: size=0 must be an integer >= 1"),
        ("atrous(step=-1)", (3, 3), r"atrous: step=-1"),
        ("random(k=0)", (3, 3), r"random: k=0"),
        ("local(['x'])", (3, 3), r"direction 'x' is unknown; use 'h', 'v' or 'w7'"),
        ("local(50)", (3, 3), r"local: directions=50 must be a list of names, such as \['h', 'w7_flip'\]"),
        ("local([])", (3, 3), r"directions is empty"),
        ("first(raster, 2)", (3, 3), r"k=2\) is impossible: 'raster' has 1"),
        ("first(atrous)", (3, 3), r"scan 'first\(atrous\)' never visits 5 of 9 tokens, token 1 first"),
        ("with_token(raster, 10)", (3, 3), r"position=10 must be 'middle' or an index from 0 to 9"),
        ("transpose(with_token(raster))", (3, 3), r"transpose needs a scan of a plain grid"),
        ("transpose(raster, (0, 0))", (3, 3), r"axes=\(0, 0\) must hold each of 0..1 once"),
    ],
)
def test_specs_that_do_not_fit_their_grid(spec, size, message):
    with pytest.raises(ValueError, match=message):
        build_scan(spec, *size)


def test_user_scan_in_five_lines(temporary):
    @register_scan("checkerboard")
    def checkerboard(height, width):
        h, w = np.indices((height, width)).reshape(2, -1)
        return np.argsort((h + w) % 2, kind="stable")

    want = [0, 2, 4, 1, 3, 5]
    assert build_scan("checkerboard", 2, 3).order.tolist() == [want]
    assert build_scan("both_ways(checkerboard)", 2, 3).order.tolist() == [want, want[::-1]]
    assert as_spec(checkerboard) == "checkerboard"
    assert "checkerboard" in list_scans(modality="image")
    assert "checkerboard" not in list_scans(modality="series")
    assert list_scans("check*") == ["checkerboard"]


def test_user_scan_with_options_and_lists(temporary):
    @register_scan("every", modality="series")
    def every(length, stride=2, backwards=False):
        path = [i for start in range(stride) for i in range(start, length, stride)]
        return path[::-1] if backwards else path

    assert build_scan("every", 5).order.tolist() == [[0, 2, 4, 1, 3]]
    assert build_scan("every(3, backwards=True)", 5).order.tolist() == [[2, 4, 1, 3, 0]]
    assert list_scans("every", modality="series") == ["every"]


def test_function_as_scan():
    def upside_down(height, width):
        return torch.arange(height * width).view(height, width).flip(0).flatten()

    spec = as_spec(upside_down)
    assert spec == as_spec(upside_down)
    assert spec not in list_scans()
    assert scan_order(spec, (2, 2), "cpu").tolist() == [[2, 3, 0, 1]]
    assert build_scan(upside_down, 2, 2).order.tolist() == [[2, 3, 0, 1]]
    assert build_scan(f"with_token({spec}, 0)", 2, 2).order.tolist() == [[0, 3, 4, 1, 2]]
    assert as_spec(lambda n: range(n)) != as_spec(lambda n: range(n)[::-1])


def test_scan_object_as_scan():
    scan = Scan(torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]]), 4, reduce="mean", size=(2, 2), name="mine")
    spec = as_spec(scan)
    assert spec == as_spec(Scan(scan.order.clone(), 4, reduce="mean", size=(2, 2), name="mine"))
    assert spec.isidentifier()
    built = build_scan(spec, 2, 2)
    assert (built.order.tolist(), built.reduce, built.name) == (scan.order.tolist(), "mean", "mine")
    with pytest.raises(ValueError, match=r"scan 'mine' is for size \(2, 2\), but the grid is \(4, 1\)"):
        build_scan(spec, 4, 1)
    loose = Scan(torch.tensor([[1, 0]]), 2, name="loose")
    assert build_scan(loose, 1, 2).size == (1, 2)
    with pytest.raises(ValueError, match=r"scan 'loose' is for 2 tokens, but the grid is \(2, 2\)"):
        build_scan(loose, 2, 2)
    with pytest.raises(TypeError, match="not Tensor"):
        as_spec(scan.order)  # pyright: ignore[reportArgumentType]


def test_scan_object_with_a_class_token_keeps_it():
    scan = build_scan("with_token(cross)", 2, 2)
    assert torch.equal(build_scan(scan, 2, 2).order, scan.order)
    assert build_scan(scan, 2, 2).extra == (2,)


ORDERS = """
import functools, settings
import numpy as np
STEP = {step}
def helper(n):
    return {{*"{letters}"}} and np.roll(np.arange(n), STEP)
def order(height, width):
    return helper(height * width)
def maker(step):
    def order(height, width):
        return [np.roll(np.arange(height * width), s * settings.sign())[0] for s in (step, settings.STEP)]
    return order
unlike = np.random.default_rng(0)
def random(height, width):
    return unlike.permutation(height * width)
made, partial, cached = maker({step}), functools.partial(order, width=2), functools.lru_cache(order)
"""
NAMES = ("order", "made", "partial", "cached", "random")


def names_of(folder, **values):
    """The specs of the functions of a file in this process."""
    found: dict[str, Any] = {"__name__": "orders"}
    settings = f"STEP = {values.pop('setting', 1)}\ndef sign(): return {values.pop('sign', 1)}"
    (folder / "settings.py").write_text(settings)
    sys.modules.pop("settings", None)
    exec(ORDERS.format(**{"step": 1, "letters": "abcdefgh", **values}), found)
    return {name: as_spec(found[name]) for name in NAMES}


def test_a_function_has_one_name_in_every_process_and_another_code_has_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    here = names_of(tmp_path)
    (tmp_path / "orders.py").write_text(ORDERS.format(step=1, letters="abcdefgh"))
    names = f"*(as_spec(getattr(orders, name)) for name in {NAMES})"
    code = f"import orders; from mamba_zoo.scans import as_spec; print({names})"
    env = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    printed = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()
    there = dict(zip(NAMES, printed, strict=True))
    assert here["random"] != there.pop("random")
    assert {name: here[name] for name in there} == there
    again = names_of(tmp_path)
    assert again.pop("random") != here["random"]
    assert again == {name: here[name] for name in again}
    for change, names in (
        ({"step": 2}, {"order", "made", "partial", "cached"}),
        ({"setting": 2}, {"made"}),
        ({"sign": -1}, {"made"}),
        ({"letters": "abcdefgx"}, {"order", "partial", "cached"}),
    ):
        other = names_of(tmp_path, **change)
        assert {name for name in NAMES if other[name] != here[name]} == names | {"random"}
    del sys.modules["settings"]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda n, step=1: range(n), lambda n, step=2: range(n)),
        (lambda n, *, step=1: range(n), lambda n, *, step=2: range(n)),
        (lambda n: np.arange(n), lambda n: np.zeros(n)),
        (lambda n: np.arange(n) + 1, lambda n: np.arange(n) + 1.0),
    ],
)
def test_functions_that_differ_have_different_names(one, two):
    two.__qualname__ = one.__qualname__
    assert as_spec(one) != as_spec(two)


@pytest.mark.parametrize("table", [np.arange(4), torch.arange(4), torch.tensor(1.0), [0, 1, 2, 3], {"a": (1, None)}])
def test_equal_values_make_equal_functions(table):
    def make(value):
        return lambda n: value

    assert as_spec(make(table)) == as_spec(make(copy.deepcopy(table)))
    assert as_spec(make(table)) != as_spec(make((table, 1)))


def test_functions_that_know_each_other_or_objects():
    def make(step):
        def even(n):
            return n == 0 or odd(n - step)

        def odd(n):
            return n > 0 and even(n - step)

        def alone(n):
            return n and alone(n - step)

        return even, odd, alone

    class Order:
        def __call__(self, n):
            return range(n)

        def method(self, n):
            return range(n)

    one, two = Order(), Order()
    names = [as_spec(function) for function in make(1)]
    assert len(set(names)) == 3
    assert names == [as_spec(function) for function in make(1)]
    assert not {as_spec(function) for function in make(2)} & set(names)
    assert as_spec(one) == as_spec(one) != as_spec(two)
    assert as_spec(one.method) == as_spec(one.method) != as_spec(two.method)


def test_unknown_object_of_another_process():
    with pytest.raises(ValueError, match="it stands for an object that this process never saw"):
        as_spec("_mine_0123456789")


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([0, 1, 2, 4], ValueError, r"scan 'broken': order holds 4, but tokens run from 0 to 3"),
        ([0, 1, 2, -2], ValueError, r"scan 'broken': order holds -2"),
        ([0, 1, 1, 2], ValueError, r"scan 'broken': direction 0 visits token 1 twice"),
        ([[0, 1], [2, 0]], ValueError, r"scan 'broken' never visits 1 of 4 tokens, token 3 first"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, r"scan 'broken' must return integer token indices .* not float64"),
        (np.zeros((1, 1, 4), int), TypeError, r"scan 'broken' must return integer .* of shape \(1, 1, 4\)"),
        (None, TypeError, r"scan 'broken' must return integer token indices"),
        (np.zeros((0, 4), int), ValueError, r"scan 'broken': order must be \(directions, steps\), both >= 1"),
    ],
)
def test_user_tables_are_checked(result, error, message, temporary):
    register_scan("broken")(lambda height, width: result)
    with pytest.raises(error, match=message):
        build_scan("broken", 2, 2)


def test_names_are_taken_once_and_replaced_on_request(temporary):
    register_scan("twice")(lambda n: range(n))
    assert scan_order("both_ways(twice)", (2,), "cpu").tolist() == [[0, 1], [1, 0]]

    def other(n):
        return list(range(n))[::-1]

    for name in ("twice", "cross", "both_ways"):
        with pytest.raises(ValueError, match=rf"scan name '{name}' is taken"):
            register_scan(name)(other)
    register_scan("twice", replace=True)(other)
    assert scan_order("both_ways(twice)", (2,), "cpu").tolist() == [[1, 0], [0, 1]], "an old table was kept"
    assert build_scan("twice", 2).order.tolist() == [[1, 0]]
    for name in ("no-dash", "_private", ""):
        with pytest.raises(ValueError, match="must be a Python identifier"):
            register_scan(name)
    unregister_scan("twice")
    with pytest.raises(ValueError, match="no scan named 'twice'"):
        scan_order("twice", (2,), "cpu")


def test_a_cell_run_again_replaces_its_scan(temporary):
    for step in (1, -1):

        @register_scan("again")
        def again(n, step=step):
            return list(range(n))[::step]

    assert build_scan("again", 3).order.tolist() == [[2, 1, 0]]


def test_built_scans_do_not_share_memory():
    build_scan("cross", 3, 3).order.zero_()
    assert build_scan("cross", 3, 3).order[0].tolist() == list(range(9))
    assert scan_order("cross", (3, 3), "cpu")[0].tolist() == list(range(9))


class Reorder(torch.nn.Module):
    """Reads a map through a scan; what a backbone does."""

    def __init__(self, scan):
        super().__init__()
        self.scan = as_spec(scan)

    def forward(self, x):
        b, h, w, d = x.shape
        return x.reshape(b, h * w, d)[:, scan_order(self.scan, (h, w), x.device)] * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(backend, dynamic, device):
    model = Reorder("both_ways(transpose(hilbert))").to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in [(2, 3, 4, 5), (2, 4, 4, 5), (3, 5, 6, 5)]:
        x = torch.randn(shape, device=device, requires_grad=True)
        assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2.0 * 8))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    model, x = Reorder("hilbert"), torch.randn(2, 3, 4, 5)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, strict=strict)
    x = torch.randn(3, 3, 4, 5)
    assert torch.equal(program.module()(x), model(x))


def test_works_under_fake_tensors_and_leaves_nothing_behind():
    model = Reorder("window(3)")
    with FakeTensorMode():
        assert model(torch.empty(2, 5, 7, 3)).shape == (2, 4, 54, 3)
        assert build_scan("window(3)", 5, 7).m == 54
    assert type(scan_order("window(3)", (5, 7), "cpu")) is torch.Tensor
    with FakeTensorMode():  # now with a table in the cache
        assert model(torch.empty(2, 5, 7, 3)).shape == (2, 4, 54, 3)
    assert model(torch.randn(1, 5, 7, 3)).shape == (1, 4, 54, 3)


def test_a_users_torch_function_is_called_outside_of_modes():
    spec = as_spec(lambda height, width: torch.arange(height * width).flip(0))
    with FakeTensorMode():
        assert scan_order(spec, (2, 3), "cpu").shape == (1, 6)
    with torch.device("meta"):
        assert scan_order(spec, (2, 4), "cpu").tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]
        assert build_scan(spec, 2, 2).order.tolist() == [[3, 2, 1, 0]]


def test_on_meta():
    assert Reorder("spiral")(torch.empty(2, 5, 7, 3, device="meta")).shape == (2, 2, 35, 3)
    scan = build_scan("window(3)", 5, 7, device="meta")
    x = torch.empty(2, 35, 3, device="meta")
    assert scan.order.is_meta
    assert scan.merge(scan.restore(scan.gather(x))).shape == x.shape


def test_tables_are_made_once_and_survive_inference_mode(device):
    with torch.inference_mode():
        table = scan_order("diagonal", (6, 5), device)
    assert not table.is_inference()
    assert scan_order("diagonal", (6, 5), device) is table
    assert table.dtype == torch.int32

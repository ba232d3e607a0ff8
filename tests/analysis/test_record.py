"""Recorded scans: the implicit matrices give the scans' outputs back, wherever the tokens are visited."""

import doctest
from typing import Any

import pytest
import timm
import torch

from mamba_zoo.analysis import RecordedScan, plot_scan_maps, record, record_scans
from mamba_zoo.kernels import selective_scan
from mamba_zoo.scans import build_scan

SCANS = ["raster", "cross", "snake", "hilbert", "window(2)", "atrous", "random", "with_token(cross)"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": ("vmamba_mini", {"depths": (1, 1), "dims": 8, "scan": "hilbert"}),
    "vim": ("vim_mini", {"depth": 2, "dim": 16}),
    "videomamba": ("videomamba_tiny", {"depth": 2, "dim": 16, "img_size": 64}),
    "plainmamba": ("plainmamba_l1", {"depth": 2, "dim": 16, "img_size": 64}),
    "efficientvmamba": ("efficient_vmamba_tiny", {"depths": (1, 1, 1), "dims": 16}),
    "localvmamba": ("local_vmamba_tiny", {"depths": (1, 1), "dims": 16, "directions": ("v", "w3_flip")}),
    "localvim": ("local_vim_tiny", {"depth": 2, "dim": 16, "img_size": 64, "directions": ("v", "w3")}),
}


def test_example_in_the_docstring():
    result = doctest.testmod(record)
    assert result.attempted >= 3
    assert result.failed == 0


class Layer(torch.nn.Module):
    """One scan over given inputs."""

    def __init__(self, **inputs: Any):
        super().__init__()
        self.inputs = inputs

    def forward(self, u):
        return selective_scan(u, **self.inputs)


def recorded(scan: str, size: tuple[int, int], dtype: torch.dtype = torch.float64, shared: bool = False):
    """A recorded scan of random inputs, and its output `(b, l, k, d)`."""
    table = build_scan(scan, *size)
    b, l, k, d, n = 2, table.length, table.k, 3, 4
    layer = Layer(
        dt=torch.randn(b, l, k, d, dtype=dtype),
        A=-torch.rand(k, d, n, dtype=dtype),
        B=torch.randn(b, l, k, n, dtype=dtype),
        C=torch.randn(b, l, k, n, dtype=dtype),
        D=torch.randn(k, d, dtype=dtype),
        order=table.order,
        dt_bias=torch.randn(k, d, dtype=dtype),
        dt_softplus=True,
    )
    u = torch.randn(b, l, d, dtype=dtype) if shared else torch.randn(b, l, k, d, dtype=dtype)
    with record_scans(layer) as scans:
        y = layer(u)
    (one,) = scans
    return one, u if u.dim() == 4 else u[:, :, None].expand(-1, -1, k, -1), y


@pytest.mark.parametrize("scan", SCANS)
def test_matrix_times_tokens_is_the_output(scan):
    one, u, y = recorded(scan, (3, 5), shared=scan == "cross")
    for sample in range(2):
        for direction in range(one.k):
            whole = one.matrix(direction, range(3), sample)
            got = torch.einsum("dts,sd->td", whole, u[sample, :, direction])
            torch.testing.assert_close(got, y[sample, :, direction], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scan", ["cross", "window(2)", "atrous"])
def test_weights_are_a_row_of_the_matrix_averaged_over_channels(scan):
    one, _, _ = recorded(scan, (3, 5))
    for query in (0, 7, 14):
        for absolute in (True, False):
            rows = [one.matrix(k, range(3), 1, skip=False)[:, query] for k in range(one.k)]
            wanted = torch.stack([(row.abs() if absolute else row).mean(0) for row in rows])
            torch.testing.assert_close(one.weights(query, 1, absolute), wanted)


def test_what_is_visited_later_has_no_weight():
    one, _, _ = recorded("cross", (3, 4))
    found = one.weights(5)
    for direction, path in enumerate(build_scan("cross", 3, 4).order.tolist()):
        before = set(path[: path.index(5) + 1])
        assert {int(i) for i in found[direction].nonzero()} == before


def test_states_and_steps_follow_the_recurrence():
    one, u, _ = recorded("window(2)", (3, 3))
    k, sample = 1, 1
    h, states, steps = torch.zeros(3, 4, dtype=torch.float64), {}, {}
    for i in build_scan("window(2)", 3, 3).order[k].tolist():
        raw = one.dt[sample, i, k] if i >= 0 else torch.zeros(3, dtype=torch.float64)
        delta = torch.nn.functional.softplus(raw + one.dt_bias[k])  # type: ignore[index]
        h = torch.exp(delta[:, None] * one.A[k]) * h
        if i >= 0:
            h = h + (delta * u[sample, i, k])[:, None] * one.B[sample, i, k]
            states[i], steps[i] = h.norm(), delta.mean()
    torch.testing.assert_close(one.states(sample)[k], torch.stack([states[i] for i in range(9)]))
    torch.testing.assert_close(one.steps(sample)[k], torch.stack([steps[i] for i in range(9)]))


@pytest.mark.parametrize("row", MODELS)
def test_scans_within_models(row):
    """What the model itself made of its tokens is what the matrices make of them."""
    architecture, settings = MODELS[row]
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, **settings).eval().double()
    outputs: list[torch.Tensor] = []
    layers = [module for module in model.modules() if type(module).__name__ in ("SelectiveSSM", "DirectionAwareSSM")]
    for layer in layers:
        layer.register_forward_hook(lambda module, x, y: outputs.append(y))
    with torch.no_grad(), record_scans(model) as scans:
        model(torch.randn(1, 3, 32, 64, dtype=torch.float64))
    assert len(scans) == len(layers) >= 2
    for one, layer, y in zip(scans, layers, outputs, strict=True):
        assert model.get_submodule(one.name) is layer
        assert one.grid is not None
        assert one.as_maps(one.weights(one.token_at(1, 2))).shape == (one.k, *one.grid)
        if row not in ("vim", "videomamba", "localvim"):  # those gate within the scan
            u = one.u if one.u.dim() == 4 else one.u[:, :, None].expand(-1, -1, one.k, -1)
            made = torch.zeros(one.tokens, 1, dtype=torch.float64)
            for k in range(one.k):
                visits = one.places[0, k].long()
                entry = torch.zeros(one.tokens, dtype=torch.long)
                entry[visits[visits >= 0]] = one.order[0, k].long()[visits >= 0]
                made += torch.einsum("dts,sd->td", one.matrix(k, [0]), u[0, :, k, :1][entry])
            y = y.sum(2) if y.dim() == 4 and row == "localvmamba" else y
            torch.testing.assert_close(made, y[0, :, :1], rtol=1e-8, atol=1e-10)


def test_a_class_token_is_left_out_of_maps():
    model: Any = timm.create_model("vim_mini", depth=1).eval()
    with torch.no_grad(), record_scans(model) as scans:
        model(torch.randn(1, 3, 8, 12))
    (one,) = scans
    assert (one.grid, one.extra, one.tokens) == ((4, 6), 12, 25)
    assert [one.token_at(0, 0), one.token_at(1, 5), one.token_at(2, 0)] == [0, 11, 13]
    values = torch.arange(25.0).expand(2, -1)
    assert one.as_maps(values)[0].flatten().tolist() == [i for i in range(25) if i != 12]
    with pytest.raises(ValueError, match=r"\(4, 0\) is no place of the grid \(4, 6\)"):
        one.token_at(4, 0)


def test_windows_and_videos():
    model: Any = timm.create_model("mambavision_t", depths=(1, 1, 1, 1), dim=8, stem_dim=4, heads=(1, 1)).eval()
    video: Any = timm.create_model("videomamba_tiny_video", dim=16, depth=1, img_size=32, num_frames=4).eval()
    with torch.no_grad(), record_scans(model) as scans:
        model(torch.randn(1, 3, 64, 64))
    assert [one.grid for one in scans] == [(14, 14), (7, 7)]
    with torch.no_grad(), record_scans(video) as scans:
        video(torch.randn(1, 3, 4, 32, 32))
    assert scans[0].weights(3).shape == (2, 17)
    with pytest.raises(ValueError, match=r"17 tokens of blocks\.0\.mixer\.ssm are not known to lie on a grid"):
        scans[0].as_maps(scans[0].weights(3))


def test_recording_changes_nothing_and_ends():
    model: Any = timm.create_model("vmamba_mini", depths=(1,)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        with record_scans(model) as scans:
            assert torch.equal(model(x), before)
        model(x)
    assert len(scans) == 1
    assert isinstance(scans[0], RecordedScan)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_is_said():
    one, _, _ = recorded("raster", (2, 2))
    with pytest.raises(ValueError, match="query=4 is no token; there are 4"):
        one.weights(4)
    with pytest.raises(ValueError, match="sample=2: there are 1 and 2"):
        one.states(2)
    with pytest.raises(ValueError, match="not known to lie on a grid"):
        one.as_maps(one.weights(0))
    with pytest.raises(ValueError, match="rows is empty"):
        plot_scan_maps({})


def test_a_picture_has_a_panel_for_each_direction(tmp_path):
    rows = {"first": torch.rand(4, 3, 5), "last": torch.rand(1, 3, 5)}
    figure = plot_scan_maps(rows, torch.rand(3, 12, 20), {"first": (1, 2), "last": None}, tmp_path / "m.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["", *(f"direction {i}" for i in range(4)), "sum", "", "direction 0", "", "", "", ""]
    assert (tmp_path / "m.png").stat().st_size > 1000

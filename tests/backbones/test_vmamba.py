"""VMamba beyond parity: scans, sizes, dtypes, layouts and the names of older checkpoints."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_zoo
from mamba_zoo.backbones import card
from mamba_zoo.backbones._embed import MapConv, PatchMerge
from mamba_zoo.backbones._mixer import SS2D
from mamba_zoo.backbones.vmamba import VMamba, checkpoint_filter_fn
from mamba_zoo.scans import build_scan

PUBLISHED = [name for name in mamba_zoo.list_models("vmamba*") if card(name).published]


def small(name="vmamba_mini", **kwargs) -> Any:
    if name == "vmamba_tiny_v0":
        kwargs = {"depths": (1, 1, 1), "dims": 16, "d_state": 2, **kwargs}
    return mamba_zoo.create_model(name, **{"num_classes": 5, **kwargs}).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name):
    model = mamba_zoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == card(name).params


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vmamba_mini", [(21, 27), (11, 14), (6, 7)]),  # 21 x 27 pixels, halved and rounded up twice
        ("vmamba_tiny_v0", [(5, 6), (3, 3), (2, 2)]),  # patches of 4, incomplete ones dropped; then rounded up
    ],
)
def test_takes_any_image_size(name, sizes):
    x = torch.randn(2, 3, 21, 27)
    found = small(name).forward_intermediates(x, intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in found] == sizes


def test_merging_pads_odd_maps_below_and_to_the_right():
    merge, x = PatchMerge(4, 8), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 2, 9), "one patch needs 4 x 4 pixels"),
        ((1, 4, 32, 32), r"expected images \(b, 3, h, w\)"),
        ((3, 32, 32), r"expected images \(b, 3, h, w\)"),
    ],
)
def test_refuses_what_is_no_image_for_it(shape, message):
    with pytest.raises(ValueError, match=message):
        small("vmamba_tiny_v0")(torch.randn(shape))


def rows(height, width):
    return torch.arange(height * width)


@pytest.mark.parametrize(("scan", "k"), [("cross", 4), ("raster", 1), ("first(cross, 2)", 2), (rows, 1)])
def test_parameters_follow_the_directions_of_the_scan(scan, k):
    model = small(scan=scan)
    assert {p.shape[0] for name, p in model.named_parameters() if ".ssm." in name} == {k}
    model(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_scan_object_is_for_the_grid_it_was_built_for():
    mixer_grid = build_scan("hilbert", 8, 8)
    model = small(scan=mixer_grid, depths=(1,), dims=16)
    named = small(scan="hilbert", depths=(1,), dims=16)
    named.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(model(x), named(x))
    with pytest.raises(ValueError, match="grid is"):
        model(torch.randn(1, 3, 10, 10))


def test_the_order_matters():
    model, other = small(), small(scan="hilbert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("x_proj.weight"):  # as published, B and C start so small that the state hardly counts
                parameter *= 100
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert (model(x) - other(x)).norm() > 1e-3 * model(x).norm()


def test_without_a_scan_the_rest_stays():
    model, control = small(), small(scan="none")
    kept = {name for name in model.state_dict() if ".ssm." not in name}
    assert set(control.state_dict()) == kept
    control(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in control.parameters())


def test_an_unknown_scan_is_refused():
    with pytest.raises(ValueError, match="hilbert"):
        small(scan="hilbrt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "cnov"}, "stem='cnov' is unknown; choose one of conv, patch"),
        ({"downsample": "max"}, "downsample='max' is unknown; choose one of conv, merge"),
        ({"depths": (1, 1), "dims": (8, 16, 32)}, "as many stages"),
        ({"patch_size": 3}, "choose 1, 2 or 4"),
        ({"dt_rank": 0}, "dt_rank=0"),
    ],
)
def test_refuses_arguments_that_cannot_work(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_maps_are_never_copied_between_layouts():
    x = torch.randn(2, 8, 9, 16)
    assert MapConv(16, 16, 3, padding=1, groups=16)(x).is_contiguous()
    assert MapConv(16, 32, 3, stride=2, padding=1)(x).is_contiguous()
    assert SS2D(16)(x).is_contiguous()


@pytest.mark.parametrize("name", ["vmamba_mini", "vmamba_tiny_v0"])
def test_bfloat16_stays_close_to_float32(name, device):
    model, x = small(name).to(device), torch.randn(2, 3, 24, 24, device=device)
    with torch.no_grad():
        want = model(x)
        got = model.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_autocast_keeps_the_state_space_parameters_in_float32(device):
    model, x = small().to(device), torch.randn(2, 3, 16, 16, device=device)
    want = model(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()
    got.sum().backward()
    ssm = [p for name, p in model.named_parameters() if ".ssm." in name]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ssm)


def test_float16_sums_over_directions_do_not_overflow(device):
    mixer = SS2D(8).to(device)
    assert mixer.ssm is not None
    nn.init.constant_(mixer.ssm.D, 200.0)
    nn.init.constant_(mixer.conv.weight, 10.0)
    with torch.no_grad():
        x = 3 * torch.randn(1, 6, 6, 8, device=device)
        want, got = mixer(x), mixer.half()(x.half())
    assert got.isfinite().all()
    assert (got.float() - want).norm() < 0.02 * want.norm()


def test_features_of_chosen_stages_keep_no_unused_parameter():
    model = mamba_zoo.create_model("vmamba_mini", features_only=True, out_norm=True, out_indices=(0, 1))
    features = model(torch.randn(2, 3, 8, 8))
    assert [tuple(y.shape) for y in features] == [(2, 32, 8, 8), (2, 64, 4, 4)]
    torch.stack([y.square().sum() for y in features]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(features[0].mean(1), torch.zeros(2, 8, 8), atol=1e-5, rtol=0)


def test_loads_the_names_of_the_first_release():
    model = small("vmamba_tiny_v0")
    older = [
        (r"^stem\.proj\.", "patch_embed.proj."),
        (r"^stem\.norm\.", "patch_embed.norm."),
        (r"^norm\.", "norm."),
        (r"^head\.fc\.", "head."),
        (r"\.norm1\.", ".ln_1."),
        (r"\.mixer\.", ".self_attention."),
        (r"\.conv\.", ".conv2d."),
        (r"\.ssm\.x_proj\.weight$", ".x_proj_weight"),
        (r"\.ssm\.dt_proj\.weight$", ".dt_projs_weight"),
        (r"\.ssm\.dt_bias$", ".dt_projs_bias"),
        (r"\.ssm\.A_log$", ".A_logs"),
        (r"\.ssm\.D$", ".Ds"),
        (r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"),
        (r"^stages\.", "layers."),
    ]
    state = {}
    for name, value in model.state_dict().items():
        for pattern, new in older:
            name = re.sub(pattern, new, name)
        state[name] = value.flatten(0, 1) if name.endswith(("A_logs", "Ds")) else value
    assert not set(state) & (set(model.state_dict()) - {"norm.weight", "norm.bias"})
    other = small("vmamba_tiny_v0")
    other.load_state_dict(checkpoint_filter_fn({"model": state}, other))
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_loads_linear_layers_kept_as_convolutions():
    model = small()
    state = {
        name: value[..., None, None] if re.search(r"(in_proj|out_proj|fc1|fc2)\.weight$", name) else value
        for name, value in model.state_dict().items()
    }
    loaded = checkpoint_filter_fn(state, model)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_rates_of_dropped_paths_rise_over_the_blocks():
    model: Any = VMamba(depths=(1, 2, 1), dims=8, drop_path_rate=0.3)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_starts_as_published():
    torch.manual_seed(0)
    ssm = small("vmamba_tiny_v0", dims=64, d_state=16).stages[0].blocks[0].mixer.ssm
    torch.testing.assert_close(ssm.A_log[2, 3].exp(), torch.arange(1.0, 17.0))
    assert torch.equal(ssm.D, torch.ones(4, 128))
    steps = F.softplus(ssm.dt_bias)
    assert 1e-3 <= steps.min() < 2e-3
    assert 0.08 < steps.max() <= 0.1
    assert ssm.dt_proj.weight.abs().max() <= ssm.dt_rank**-0.5

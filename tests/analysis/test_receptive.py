"""Effective receptive fields: those of convolutions are known; every backbone has one."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from mamba_zoo.analysis import contribution_area, plot_receptive_fields, receptive_field


def ones(*layers: nn.Conv2d) -> nn.Sequential:
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def test_three_convolutions_give_the_binomial_like_field_of_the_paper():
    # Section 2.1: with weights of one, the field is the kernel convolved with itself, once a layer.
    model = ones(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(3)))
    row = torch.tensor([0, 0, 0, 0, 1, 3, 6, 7, 6, 3, 1, 0, 0, 0, 0.0])
    found = receptive_field(model, torch.randn(2, 1, 15, 15))
    torch.testing.assert_close(found, row[:, None] * row)


@pytest.mark.parametrize(("size", "stride", "dilation"), [(3, 1, 1), (5, 1, 1), (3, 2, 1), (3, 1, 3), (4, 4, 1)])
def test_support_of_a_convolution_is_its_kernel(size, stride, dilation):
    model = ones(nn.Conv2d(2, 3, size, stride, dilation=dilation, bias=False))
    found = receptive_field(model, torch.randn(1, 2, 21, 24), at=(1, 2))
    wanted = torch.zeros(21, 24)
    offsets = torch.arange(size) * dilation
    wanted[(stride + offsets)[:, None], 2 * stride + offsets] = 2 * 3  # channels of the image and of the map
    torch.testing.assert_close(found, wanted)


def test_magnitudes_add_over_channels_and_are_averaged_over_images():
    model = nn.Conv2d(2, 1, 1, bias=False)
    model.weight.data = torch.tensor([[[[2.0]], [[-3.0]]]])
    assert receptive_field(model, torch.randn(4, 2, 1, 1)).item() == pytest.approx(5)

    class Squared(nn.Module):
        def forward(self, x):
            return [x, x.square() / 2]

    x = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    assert receptive_field(Squared(), x).item() == pytest.approx(1.5)
    assert receptive_field(Squared(), x, stage=0).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vmamba_mini", {"depths": (1, 1), "dims": 16}),
        ("vim_mini", {"depth": 2}),
        ("mambavision_t", {"depths": (1, 1, 1, 1), "dim": 8, "stem_dim": 4, "heads": (1, 1)}),
        ("resnet10t", {}),
        ("test_vit", {"img_size": 32}),
        ("test_convnext", {}),
    ],
)
def test_backbones_of_the_zoo_and_of_timm(name, settings):
    model: Any = timm.create_model(name, **settings).train()
    found = receptive_field(model, torch.randn(2, 3, 32, 32))
    assert found.shape == (32, 32)
    assert found.isfinite().all()
    assert found.any()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_scans_reach_where_their_order_leads():
    settings: dict[str, Any] = {"depths": (1,), "dims": 8, "patch_size": 1, "stem": "patch", "mlp_ratio": 0.0}
    fields = {}
    for scan in ("cross", "raster", "none"):
        torch.manual_seed(0)
        model: Any = timm.create_model("vmamba_mini", scan=scan, **settings)
        nn.init.zeros_(model.stages[0].blocks[0].mixer.conv.weight)
        model.stages[0].blocks[0].mixer.conv.weight.data[:, :, 1, 1] = 1
        fields[scan] = receptive_field(model, torch.randn(1, 3, 9, 9)) > 0
    assert fields["none"].nonzero().tolist() == [[4, 4]]
    assert fields["raster"].flatten().nonzero().flatten().tolist() == list(range(4 * 9 + 5))
    assert fields["cross"].all()


def test_area_that_holds_a_share():
    field = torch.ones(9, 9)
    assert contribution_area(field, 1.0) == 1.0
    assert contribution_area(field, 9 / 81) == pytest.approx(9 / 81)
    assert contribution_area(field, 10 / 81) == pytest.approx(25 / 81)
    assert contribution_area(field, 4 / 81, at=(0, 0)) == pytest.approx(4 / 81)
    point = torch.zeros(8, 10)
    point[4, 5] = 3
    assert contribution_area(point) == pytest.approx(1 / 80)


def test_what_cannot_be_is_said():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"images must be \(b, c, height, width\), not \(3, 8, 8\)"):
        receptive_field(model, torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"at=\(6, 0\) lies outside the feature map of \(6, 6\) positions"):
        receptive_field(model, torch.randn(1, 3, 8, 8), at=(6, 0))
    with pytest.raises(ValueError, match=r"Flatten gives \(1, 48\) instead of a feature map"):
        receptive_field(nn.Flatten(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="share=0 must lie above 0"):
        contribution_area(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="no pixel moves the feature"):
        contribution_area(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="fields is empty"):
        plot_receptive_fields({})


def test_a_picture_has_a_panel_for_each_field(tmp_path):
    figure = plot_receptive_fields({f"f{i}": torch.rand(5, 7) for i in range(5)}, tmp_path / "f.png", columns=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:6] == ["f0", "f1", "f2", "f3", "f4", ""]
    assert (tmp_path / "f.png").stat().st_size > 1000

"""MambaVision beyond parity: windows, the mixer against its definition, other scans, the licence."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import mamba_zoo
from mamba_zoo.backbones._windows import join_windows, split_windows
from mamba_zoo.backbones.mambavision import MambaVisionMixer, checkpoint_filter_fn
from mamba_zoo.scans import build_scan

SMALL: dict[str, Any] = {
    "depths": (1, 1, 3, 2), "dim": 16, "stem_dim": 8, "heads": (2, 4), "windows": (3, 2), "num_classes": 5,
}  # fmt: skip


def small(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("mambavision_t", **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 3), (2, 2)], ids=str)
def test_windows_are_cut_filled_up_and_put_back(size):
    h, w = size
    x = torch.randn(2, h, w, 3)
    windows = split_windows(x, 2)
    rows, columns = -(-h // 2), -(-w // 2)
    assert windows.shape == (2 * rows * columns, 4, 3)
    for b in range(2):
        for i in range(2 * rows):
            for j in range(2 * columns):
                got = windows[(b * rows + i // 2) * columns + j // 2, 2 * (i % 2) + j % 2]
                assert torch.equal(got, x[b, i, j] if i < h and j < w else torch.zeros(3))
    assert torch.equal(join_windows(windows, 2, h, w), x)


@pytest.mark.parametrize(("scan", "k"), [("raster", 1), ("hilbert", 4), ("window(2)", 4)])
def test_the_mixer_is_its_definition(scan, k, device):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(8, 3, scan, k, d_state=4, dt_rank=2, device=device, dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 9, 8, dtype=torch.float64, device=device)
    ssm: Any = mixer.ssm
    with torch.no_grad():
        joint = (x @ mixer.in_proj.weight.T).transpose(1, 2)
        taps = mixer.conv.weight.reshape(8, 1, 3)
        u, z = F.silu(F.conv1d(joint, taps, padding=1, groups=8)).transpose(1, 2).chunk(2, dim=-1)
        y = torch.zeros_like(u)
        for i, row in enumerate(build_scan(scan, 3, 3).order.tolist()):
            low, B, C = (u @ ssm.x_proj.weight[i].T).split([2, 4, 4], dim=-1)
            dt = F.softplus(low @ ssm.dt_proj.weight[i].T + ssm.dt_bias[i])
            A, h = -ssm.A_log[i].exp(), u.new_zeros(2, 4, 4)
            for t in row:
                if t < 0:
                    h = torch.exp(F.softplus(ssm.dt_bias[i])[:, None] * A) * h
                    continue
                h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None]
                y[:, t] += (h * C[:, t, None]).sum(-1) + ssm.D[i] * u[:, t]
        want = torch.cat([y, z], dim=-1) @ mixer.out_proj.weight.T
        torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 5, 8, 11])
def test_mixers_come_first_attention_after(depth):
    model: Any = timm.create_model("mambavision_t", device="meta", depths=(1, 1, depth, 1))
    kinds = [isinstance(block.mixer, MambaVisionMixer) for block in model.stages[2].blocks]
    assert kinds == [True] * -(-depth // 2) + [False] * (depth // 2)


def test_a_map_is_mixed_within_its_windows():
    model = small()
    x = torch.randn(1, 6, 9, 64, requires_grad=True)
    blocks = copy.deepcopy(model.stages[2])
    blocks.downsample = torch.nn.Identity()
    blocks(x)[0, 1, 4].sum().backward()  # in the upper window of three columns in the middle
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached[:3, 3:6].all()
    assert reached.sum() == 9


def test_maps_smaller_than_a_window_are_filled_up():
    model = small(windows=(14, 7))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("scan", ["hilbert", "snake", "both_ways(raster)", "none"])
def test_other_scans(scan):
    model = small(scan=scan)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    names = [name for name, _ in model.named_parameters()]
    assert any("ssm" in name for name in names) == (scan != "none")


def test_twice_the_published_step_bias_is_one_of_ours():
    bias = torch.randn(20)
    state = checkpoint_filter_fn({"levels.2.blocks.0.mixer.dt_proj.bias": bias}, small())
    assert list(state) == ["stages.2.blocks.0.mixer.ssm.dt_bias"]
    assert torch.equal(state["stages.2.blocks.0.mixer.ssm.dt_bias"], 2 * bias[None])


def test_weights_are_not_for_commercial_use():
    names = mamba_zoo.list_models("mambavision*")
    assert len(names) == 11
    assert not set(names) & set(mamba_zoo.list_models(commercial=True))
    assert "non-commercial" in mamba_zoo.model_card("mambavision_t").notes


def test_wrong_numbers_of_stages_are_refused():
    with pytest.raises(ValueError, match=r"depths=\(1, 2\) must have 4 entries"):
        small(depths=(1, 2))
    with pytest.raises(ValueError, match=r"windows=\(14,\) must have 2 entries"):
        small(windows=(14,))


def test_compiles_exports_and_traces():
    model = small(depths=(1, 0, 2, 1))
    x = torch.randn(2, 3, 48, 32)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    features: Any = timm.create_model(
        "mambavision_t", features_only=True, feature_cls="fx", out_indices=(2, 3), **SMALL
    )
    assert [m.shape[0] for m in features(x)] == [2, 2]

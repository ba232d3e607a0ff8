"""Vim beyond parity: the class token in the middle, image sizes, the residual stream, and the plain mixer."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import mamba_zoo
from mamba_zoo.backbones import card
from mamba_zoo.backbones._embed import resample_positions
from mamba_zoo.backbones._keys import Key, rename
from mamba_zoo.backbones._mixer import Mamba
from mamba_zoo.scans import scan_order

PUBLISHED = [name for name in mamba_zoo.list_models("vim*") if card(name).published]


def small(**kwargs) -> Any:
    kwargs = {"num_classes": 5, "depth": 3, "dim": 32, **kwargs}
    return mamba_zoo.create_model("vim_mini", **kwargs).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name):
    model = mamba_zoo.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == card(name).params


def test_the_class_token_stands_and_is_read_in_the_middle():
    model = small(patch_size=4, depth=1)  # 64 patches
    x = torch.randn(2, 3, 32, 32)
    tokens, order, grid = model.embed(x)
    assert grid == (8, 8)
    torch.testing.assert_close(tokens[:, 32], (model.cls_token + model.pos_embed[:, 32])[:, 0].expand(2, -1))
    assert order[0].tolist() == list(range(65))
    assert order[1].tolist() == list(range(65))[::-1]
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 32])
    model.reset_classifier(5, "avg")
    others = torch.cat([features[:, :32], features[:, 33:]], dim=1).mean(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), others)


@pytest.mark.parametrize("size", [(32, 32), (30, 41), (8, 8), (2, 2)])
def test_takes_any_image_size(size):
    model = small()
    features = model.forward_features(torch.randn(1, 3, *size))
    assert features.shape == (1, (size[0] // 2) * (size[1] // 2) + 1, 32)


def test_refuses_images_smaller_than_a_patch():
    with pytest.raises(ValueError, match="one patch needs 4 x 4 pixels"):
        small(patch_size=4)(torch.randn(1, 3, 3, 32))
    with pytest.raises(ValueError, match="smaller than a patch"):
        small(img_size=3, patch_size=4)


def test_resampled_positions_keep_the_class_token_apart():
    positions = torch.zeros(1, 17, 2)
    positions[:, 8] = 7.0  # of the class token; the grid is constant, so its resampled form is too
    resampled = resample_positions(positions, (4, 4), (6, 5))
    assert resampled.shape == (1, 31, 2)
    assert torch.equal(resampled[:, 15], torch.full((1, 2), 7.0))
    assert resampled.abs().sum() == 14.0


def test_a_checkpoint_for_another_image_size_is_resampled_as_the_model_would(tmp_path):
    trained, path = small(), tmp_path / "vim.pth"
    torch.save({"model": trained.state_dict()}, path)
    larger = small(img_size=44, checkpoint_path=path)
    assert larger.pos_embed.shape == (1, 22 * 22 + 1, 32)
    x = torch.randn(1, 3, 44, 44)
    torch.testing.assert_close(larger(x), trained(x))


def test_overlapping_patches():
    assert small(patch_size=4, stride=2).embed(torch.randn(1, 3, 32, 32))[2] == (15, 15)


def test_the_residual_stream_is_float32_in_a_bfloat16_model(device):
    model, x = small().to(device), torch.randn(2, 3, 16, 16, device=device)
    pairs = []
    with torch.no_grad():
        want = model(x)
        for block in model.bfloat16().blocks:
            block.register_forward_hook(lambda _, __, output: pairs.append(output))
        got = model(x.bfloat16())
    assert [(h.dtype, r.dtype) for h, r in pairs] == [(torch.bfloat16, torch.float32)] * 3
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


def test_autocast_and_float16_stay_close_to_float32(device):
    model, x = small().to(device), torch.randn(2, 3, 16, 16, device=device)
    with torch.no_grad():
        want = model(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = model(x)
        half = model.half()(x.half())
    assert (mixed.float() - want).norm() < 0.03 * want.norm()
    assert half.dtype == torch.float16
    assert (half.float() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize(("scan", "k"), [("cross", 4), ("raster", 1), ("both_ways(hilbert)", 8)])
def test_parameters_follow_the_directions_of_the_scan(scan, k):
    model = small(scan=scan)
    stacked = {p.shape[0] for name, p in model.named_parameters() if ".ssm." in name or ".conv." in name}
    assert stacked == {k}
    model(torch.randn(1, 3, 12, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_a_scan_the_rest_stays():
    model, control = small(), small(scan="none")
    assert set(control.state_dict()) == {name for name in model.state_dict() if ".ssm." not in name}
    control(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in control.parameters())


def test_each_block_drops_what_the_one_before_it_put_out():
    model = small(depth=4, drop_path_rate=0.3)
    rates = [getattr(module.drop_path, "drop_prob", 0.0) for module in (*model.blocks, model)]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])


def test_starts_as_published():
    model = small(depth=3)
    mixer = model.blocks[0].mixer
    assert mixer.out_proj.weight.abs().max() <= (64**-0.5) / math.sqrt(3)
    assert torch.equal(mixer.ssm.dt_bias[1], torch.zeros(64))
    steps = nn.functional.softplus(mixer.ssm.dt_bias[0])
    assert steps.min() >= 1e-4
    assert steps.max() <= 0.1 + 1e-6
    torch.testing.assert_close(mixer.ssm.A_log[1, 5].exp(), torch.arange(1.0, 9.0))


def test_a_pooling_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="global_pool='max' is unknown"):
        small(global_pool="max")


def test_reversing_the_tokens_exchanges_the_directions():
    mixer = Mamba(8, d_state=3, k=2, reduce="mean")
    twin = Mamba(8, d_state=3, k=2, reduce="mean")
    state = mixer.state_dict()
    twin.load_state_dict({name: v.flip(0) if name.startswith(("conv", "ssm")) else v for name, v in state.items()})
    x, order = torch.randn(2, 11, 8), scan_order("bidirectional", (11,), "cpu")
    torch.testing.assert_close(twin(x.flip(1), order), mixer(x, order).flip(1))


def test_the_plain_layer_is_causal():
    layer, x = Mamba(8), torch.randn(1, 12, 8)
    y = layer(x)
    x[:, 7:] += 1
    torch.testing.assert_close(layer(x)[:, :7], y[:, :7])
    assert (layer(x)[:, 7:] - y[:, 7:]).abs().min() > 0


def test_a_layer_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="reduce='max' is unknown"):
        Mamba(8, reduce="max")


def test_a_key_table_stacks_directions_and_keeps_what_it_does_not_know():
    keys = [Key(r"^a(\d)$", "all", slot=0), Key(r"^b(\d)$", "all", slot=1), Key(r"^c", "d")]
    state = {"b1": torch.ones(2), "a1": torch.zeros(2), "c": torch.ones(1), "own": torch.ones(3)}
    renamed = rename(state, keys)
    assert renamed["all"].tolist() == [[0, 0], [1, 1]]
    assert set(renamed) == {"all", "d", "own"}
    with pytest.raises(ValueError, match=r"directions \[1\] of 'all'"):
        rename({"b1": torch.ones(2)}, keys)
    with pytest.raises(ValueError, match="both mean 'd'"):
        rename({"c": torch.ones(1), "d": torch.ones(1)}, keys)


@pytest.mark.parametrize("name", ["vim_mini", "videomamba_mini_video"])
def test_without_a_scan_the_patches_are_read(name):
    assert mamba_zoo.create_model(name).global_pool == "token"
    assert mamba_zoo.create_model(name, scan="none").global_pool == "avg"
    assert mamba_zoo.create_model(name, scan="none", global_pool="token").global_pool == "token"


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini", "plainmamba_l1", "videomamba_tiny"])
def test_what_the_builder_takes_is_no_argument_of_the_model(name):
    with pytest.raises(TypeError, match=f"{name} takes no argument 'taps'"):
        mamba_zoo.create_model(name, taps=(0,))

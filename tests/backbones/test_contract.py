"""What timm and its users may expect of every registered model of images or videos.

All models are built on the meta device, where shapes are real and nothing is computed. Small ones, at least one for
each family, really run. A new family adds its row to `SMALL`.
"""

import copy
import pickle
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._registry import model_entrypoint
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import mamba_zoo

IMAGE = [*mamba_zoo.list_models(modality="image"), *mamba_zoo.list_models(modality="video")]
OTHERS = [name for name in mamba_zoo.list_models() if name not in IMAGE]
# Widths differ from the side of every map, so that a wrong layout cannot pass for the right one.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba_mini": ("vmamba_mini", {}),
    "vmamba v0": ("vmamba_tiny_v0", {"depths": (1, 2, 1, 1), "dims": 24, "d_state": 4}),
    "vmamba hilbert": ("vmamba_tiny", {"depths": (1, 1, 2), "dims": 24, "scan": "hilbert", "out_norm": True}),
    "vim_mini": ("vim_mini", {"depth": 4}),
    "mambavision": (
        "mambavision_t",
        {"depths": (1, 1, 3, 2), "dim": 24, "stem_dim": 8, "heads": (2, 4), "windows": (3, 2), "layer_scale": 0.1},
    ),
    "videomamba": ("videomamba_tiny", {"depth": 4, "dim": 48, "img_size": 64}),
    "plainmamba": ("plainmamba_l1", {"depth": 4, "dim": 48, "img_size": 64}),
    "videomamba video": (
        "videomamba_tiny_video",
        {"depth": 4, "dim": 48, "img_size": 64, "num_frames": 3, "scan": "hilbert_video"},
    ),
    "efficientvmamba": ("efficient_vmamba_tiny", {"depths": (1, 1, 2), "dims": 24, "d_state": 4}),
    "localvmamba": (
        "local_vmamba_tiny",
        {"depths": (1, 1, 1), "dims": 24, "d_state": 4, "directions": ("v", "w3", "w3_flip")},
    ),
    "localvim": (
        "local_vim_tiny",
        {"depth": 4, "dim": 48, "img_size": 64, "directions": ("h_flip", "w3"), "rms_norm": False, "out_norm": True},
    ),
    "localvim token": (
        "local_vim_tiny_middle_cls_token",
        {"depth": 4, "dim": 48, "img_size": 64, "d_state": 4, "directions": ("v_flip", "w3")},
    ),
    "vim stride 8": ("vim_tiny_stride8", {"depth": 4, "dim": 48, "img_size": 64, "global_pool": "avg"}),
}
SIZE = 64
STATE_SPACE = ("A_log", "D", "dt_bias")


@pytest.fixture(params=IMAGE)
def name(request) -> str:
    return request.param


@pytest.fixture(params=SMALL)
def small(request) -> Any:
    """A small model in evaluation mode, deterministic."""
    architecture, settings = SMALL[request.param]
    torch.manual_seed(0)
    return timm.create_model(architecture, **{"num_classes": 7, **settings}).eval()


def on_meta(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, device="meta", **kwargs)


@lru_cache(maxsize=128)
def built(name: str) -> Any:
    """The model on the meta device, shared by the tests that only look at it."""
    return on_meta(name)


@lru_cache(maxsize=128)
def ran(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features and intermediates of one pass on the meta device."""
    model = built(name)
    return model.forward_intermediates(images(model))


def images(model: Any, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    parameter = next(model.parameters())
    if parameter.is_meta:
        return torch.empty(batch, *model.input_shape(*model.pretrained_cfg["input_size"][1:]), device="meta")
    torch.manual_seed(1)
    return torch.randn(batch, *model.input_shape(*(size or (SIZE, SIZE))))


def test_every_family_has_a_small_model():
    families = {model_entrypoint(name).__module__ for name in IMAGE}
    assert families == {model_entrypoint(name).__module__ for name, _ in SMALL.values()}


def test_configuration_describes_the_model(name):
    model, card = built(name), mamba_zoo.model_card(name)
    cfg, weights = model.pretrained_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0] == model.in_chans
    assert cfg["num_classes"] == model.num_classes == len(weights[f"{cfg['classifier']}.weight"])
    assert weights[f"{cfg['first_conv']}.weight"].shape[1] == model.in_chans
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    if cfg.get("pool_size"):
        assert tuple(ran(name)[0].shape[1:3]) == tuple(cfg["pool_size"])
    if card.params is not None:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == card.params
    assert cfg["license"] == card.license.lower()
    if card.checkpoint is not None:
        assert cfg["url"].endswith(f"/{card.checkpoint}"), "the address must be that of the file, not of a page"
        assert name in timm.list_models(name, pretrained=True, include_tags=False)


def test_everything_is_made_and_made_again_on_the_device_and_in_the_dtype(name):
    model = on_meta(name, dtype=torch.bfloat16, in_chans=4).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [key for key, value in tensors.items() if not value.is_meta] == []
    floats = {key: value for key, value in tensors.items() if value.is_floating_point()}
    wide = {key.rsplit(".", 1)[-1] for key, value in floats.items() if value.dtype != torch.bfloat16}
    assert wide <= set(STATE_SPACE), "only state-space parameters may stay float32"
    assert tensors[f"{model.pretrained_cfg['first_conv']}.weight"].shape[1] == model.in_chans == 4
    model.reset_classifier(5)
    head = list(model.get_classifier().parameters())
    assert {(p.device.type, p.dtype) for p in head} == {("meta", torch.bfloat16)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("other", OTHERS)
def test_models_of_other_modalities(other):
    card, model = mamba_zoo.model_card(other), on_meta(other, dtype=torch.bfloat16)
    assert model.pretrained_cfg["architecture"] == other
    parameters = dict(model.named_parameters())
    assert all(p.is_meta for p in parameters.values())
    wide = {key.rsplit(".", 1)[-1] for key, p in parameters.items() if p.dtype != torch.bfloat16}
    assert wide <= set(STATE_SPACE)
    if card.params is not None:
        assert sum(p.numel() for p in parameters.values() if p.requires_grad) == card.params
    if card.url is not None:
        assert card.checkpoint is not None
    if hasattr(model, "no_weight_decay"):
        assert model.no_weight_decay() <= set(parameters)
    with pytest.raises(TypeError, match=f"{other} takes no argument 'windoow_size'"):
        on_meta(other, windoow_size=7)


def test_features_and_logits_have_the_promised_shapes(name):
    features, maps = ran(name)
    model = copy.deepcopy(built(name))
    assert features.shape[0] == 2
    assert features.shape[-1] == model.num_features
    assert features.ndim == {"NHWC": 4, "NLC": 3}[model.output_fmt]
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in model.feature_info]
    pixels = model.pretrained_cfg["input_size"][1]
    for found, entry in zip(maps, model.feature_info, strict=True):
        assert found.ndim == 1 + len(model.input_shape(1, 1))
        # Overlapping patches give a position or two less than pixels / stride.
        assert (
            pixels // entry["reduction"] - 1 <= found.shape[-2] == found.shape[-1] <= -(-pixels // entry["reduction"])
        )
    for classes in (1000, 5, 0, 9):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.forward_head(features).shape == (2, classes or model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape


def test_a_model_made_without_classes_has_no_classifier(name):
    model = on_meta(name, num_classes=0)
    assert model.num_classes == 0
    assert not list(model.get_classifier().parameters())
    assert model.forward_head(ran(name)[0]).shape == (2, model.head_hidden_size)


def test_unknown_arguments_raise(name):
    with pytest.raises(TypeError, match=f"{name} takes no argument 'windoow_size'.*it takes .*drop_path_rate"):
        on_meta(name, windoow_size=7)


def test_feature_extractor_describes_its_maps(name):
    whole = built(name).feature_info
    model = on_meta(name, features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [whole[0]["num_chs"], whole[2]["num_chs"]]
    assert model.feature_info.reduction() == [whole[0]["reduction"], whole[2]["reduction"]]
    if len(whole) > 3:
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in built(name).parameters())


def test_pruning_drops_what_comes_later(name):
    model = copy.deepcopy(built(name))
    everything = set(dict(model.named_parameters()))
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    kept = set(dict(model.named_parameters()))
    assert kept < everything
    last = len(built(name).feature_info) - 1
    if last > 1:
        assert not any(key.startswith(f"{built(name).feature_info[last]['module']}.") for key in kept)
    assert model.num_features == built(name).feature_info[1]["num_chs"]
    assert not list(model.get_classifier().parameters())


def test_weight_decay_spares_the_state_space(name):
    model = built(name)
    parameters = dict(model.named_parameters())
    spared = model.no_weight_decay()
    assert spared <= set(parameters), "names that match nothing protect nothing"
    for leaf in STATE_SPACE:
        ours = {key for key in parameters if key.rsplit(".", 1)[-1] == leaf}
        assert ours
        assert ours <= spared
    groups: Any = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert not decayed & {id(parameters[key]) for key in spared}


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_are_ordered_and_hold_every_parameter_once(name, coarse):
    model = built(name)
    groups: dict[int, list[str]] = group_parameters(model, model.group_matcher(coarse))
    members = [key for group in groups.values() for key in group]
    assert sorted(members) == sorted(key for key, _ in model.named_parameters())
    assert len(groups) >= 4
    first_conv, classifier = (model.pretrained_cfg[key] for key in ("first_conv", "classifier"))
    assert f"{first_conv}.weight" in groups[min(groups)]
    assert f"{classifier}.weight" in groups[max(groups)]
    depth = [min(i for i, group in groups.items() if any(key in part for part in group)) for key in _path(model)]
    assert depth == sorted(depth)


def _path(model: Any) -> list[str]:
    """Where data passes, from stage to stage."""
    return [f"{entry['module']}." for entry in model.feature_info]


def test_layer_decay_lowers_the_rate_towards_the_input(name):
    model = built(name)
    groups: Any = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=[])
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    stem, head = (model.get_parameter(f"{model.pretrained_cfg[key]}.weight") for key in ("first_conv", "classifier"))
    assert scales[id(stem)] == min(scales.values()) < scales[id(head)] == max(scales.values()) == 1


# From here on, models really run.


def test_values_do_not_depend_on_the_rest_of_the_batch(small):
    x = images(small, 3)
    with torch.no_grad():
        together, alone = small(x), torch.cat([small(row[None]) for row in x])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 96), (51, 37)], ids=str)
def test_any_size_of_image(small, size):
    with torch.no_grad():
        x = images(small, 1, size)
        assert small(x).shape == (1, 7)
        assert small(x).isfinite().all()
        for found, entry in zip(
            small.forward_intermediates(x, intermediates_only=True), small.feature_info, strict=True
        ):
            assert found.shape[1] == entry["num_chs"]
            for pixels, positions in zip(size, found.shape[-2:], strict=True):
                assert pixels // entry["reduction"] - 1 <= positions <= -(-pixels // entry["reduction"])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("row", SMALL)
def test_input_channels(row, channels):
    architecture, settings = SMALL[row]
    model: Any = timm.create_model(architecture, **{"num_classes": 7, **settings}, in_chans=channels)
    assert model(images(model)).shape == (2, 7)
    with pytest.raises(ValueError, match=rf"{channels}"):
        model(torch.randn(1, channels + 1, *images(model).shape[2:]))


@pytest.mark.parametrize("row", SMALL)
def test_feature_extractors_return_the_intermediates(row):
    architecture, settings = SMALL[row]
    torch.manual_seed(0)
    whole: Any = timm.create_model(architecture, **settings).eval()
    model: Any = timm.create_model(architecture, features_only=True, out_indices=(0, 2), **settings).eval()
    kept = model.state_dict()
    model.load_state_dict({f"model.{k}": v for k, v in whole.state_dict().items() if f"model.{k}" in kept}, strict=True)
    x = images(whole)
    with torch.no_grad():
        wanted = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        for got, want in zip(model(x), wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_bfloat16_in_and_out(small):
    half, x = copy.deepcopy(small).bfloat16(), images(small)
    with torch.no_grad():
        got, want = half(x.bfloat16()), small(x)
    assert got.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(got.float() - want) < 0.1 * torch.linalg.vector_norm(want)


def test_every_parameter_gets_a_gradient(small):
    small.train()
    x = images(small).requires_grad_()
    small(x).square().mean().backward()
    assert x.grad is not None
    unused = {"out_norms"}  # serve feature extraction only
    for key, parameter in small.named_parameters():
        if key.split(".")[0] not in unused:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


def test_checkpointing_changes_neither_output_nor_gradients(small):
    x = images(small)
    results = []
    for enable in (False, True):
        model = copy.deepcopy(small).train()
        model.set_grad_checkpointing(enable)
        out = model(x)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


def test_intermediates_end_in_the_features(small):
    x = images(small)
    with torch.no_grad():
        final, maps = small.forward_intermediates(x)
        torch.testing.assert_close(final, small.forward_features(x))
        torch.testing.assert_close(small.forward_head(final), small(x))
        assert len(small.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
        with pytest.raises(ValueError, match="output_fmt='NCWH'"):
            small.forward_intermediates(x, output_fmt="NCWH")
        early = small.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], maps[1])
        native = small.forward_intermediates(x, output_fmt=small.output_fmt, intermediates_only=True)
        torch.testing.assert_close(native[-1], maps[-1].movedim(1, -1).reshape(native[-1].shape))
        pruned = copy.deepcopy(small)
        pruned.prune_intermediate_layers([1], prune_norm=True)
        torch.testing.assert_close(pruned.forward_intermediates(x, indices=[1], intermediates_only=True)[0], maps[1])


def test_a_pruned_model_has_no_parameter_that_does_nothing(small):
    small.prune_intermediate_layers([1], prune_norm=True)
    small.train()
    small.forward_intermediates(images(small), indices=[1], intermediates_only=True)[0].square().mean().backward()
    assert [key for key, p in small.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("copied", ["state dict", "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("row", ["vmamba_mini", "vim_mini"])
def test_copies_compute_the_same(row, copied, tmp_path):
    architecture, settings = SMALL[row]
    model: Any = timm.create_model(architecture, **settings).eval()
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "file":
        torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
        other = mamba_zoo.create_model(architecture, checkpoint_path=tmp_path / "w.pth", **settings).eval()
    else:
        other = timm.create_model(architecture, **settings).eval()
        other.load_state_dict(model.state_dict(), strict=True)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_stochastic_depth_and_dropout_act_in_training_only():
    for architecture in ("vmamba_mini", "vim_mini"):
        model: Any = timm.create_model(architecture, drop_path_rate=0.5, drop_rate=0.5).train()
        x = images(model, 4)
        with torch.no_grad():
            assert not torch.equal(model(x), model(x))
            model.eval()
            assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("architecture", ["vmamba_mini", "vim_mini"])
class TestTools:
    """Compilation, export and tracing see through the custom ops."""

    def model(self, architecture: str) -> nn.Module:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"depths": (1, 1, 1)} if architecture == "vmamba_mini" else {"depth": 2}
        return timm.create_model(architecture, num_classes=7, **settings).eval()

    def test_compile_without_graph_breaks(self, architecture):
        model = self.model(architecture)
        x = images(model, size=(32, 32))
        torch._dynamo.reset()
        compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        got, want = compiled(x), model(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        got.square().mean().backward()
        want.square().mean().backward()
        for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)

    def test_export(self, architecture):
        model = self.model(architecture)
        x = images(model, size=(32, 32))
        program = torch.export.export(model, (x,))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    def test_fx_features(self, architecture):
        settings: dict[str, Any] = {"depths": (1, 1, 1)} if architecture == "vmamba_mini" else {"depth": 4}
        features: Any = timm.create_model(
            architecture, features_only=True, feature_cls="fx", out_indices=(0, 1), **settings
        )
        x = torch.randn(2, 3, 32, 32)
        assert [m.shape[0] for m in features(x)] == [2, 2]

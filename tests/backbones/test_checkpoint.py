"""Checkpoints load whole or not at all, into the model they belong to."""

import argparse
import collections
import logging
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model_ema import ModelEmaV3

import mamba_zoo
from mamba_zoo.backbones._checkpoint import load_checkpoint

from .toy import assert_holds, create

CONTAINERS = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
    "model beside its average": lambda w: {"model": w, "model_ema": {k: v + 1 for k, v in w.items()}},
    "average alone": lambda w: {"model_ema": w, "epoch": 1},
    "state_dict": lambda w: {"meta": {"time": "today"}, "state_dict": w},
    "deepspeed": lambda w: {"module": w, "dp_world_size": 8},
    "data parallel": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "average of data parallel": lambda w: {"state_dict": {f"module.module.{k}": v for k, v in w.items()}},
    "compiled": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "graphgym": lambda w: {"model_state": {f"model.{k}": v for k, v in w.items()}},
    "point-mae": lambda w: {"base_model": {f"module.{k}": v for k, v in w.items()}, "metrics": {"acc": 90.0}},
    "segmenter": lambda w: {
        "state_dict": {**{f"backbone.{k}": v for k, v in w.items()}, "decode_head.conv.weight": torch.ones(2)}
    },
    "our run": lambda w: {"pytorch-lightning_version": "2.6", "state_dict": {f"net.{k}": v for k, v in w.items()}},
    "our run with an average": lambda w: {
        "pytorch-lightning_version": "2.6",
        "state_dict": {f"net.{k}": v + 1 for k, v in w.items()},
        "ema": w,
    },
    "timm's scripts": lambda w: {
        "epoch": 3,
        "arch": "toy_small",
        "state_dict": {k: v + 1 for k, v in w.items()},
        "state_dict_ema": w,
    },
    "timm's scripts without an average": lambda w: {"epoch": 3, "arch": "toy_small", "state_dict": w},
    "published from timm's scripts": lambda w: {
        "epoch": 3,
        "arch": "their_toy",
        "state_dict": w,
        "state_dict_ema": {k: v + 1 for k, v in w.items()},
    },
    "ordered": collections.OrderedDict,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_model(container, weights, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(CONTAINERS[container](weights), path)
    assert_holds(create("toy_small", path), weights)


@pytest.mark.parametrize(
    ("container", "entry"),
    [
        ("model beside its average", "its entry 'model', not its 'model_ema'"),
        ("our run with an average", "its entry 'ema', not its 'state_dict'"),
        ("timm's scripts", "its entry 'state_dict_ema', not its 'state_dict'"),
        ("published from timm's scripts", "its entry 'state_dict', not its 'state_dict_ema'"),
        ("timm's scripts without an average", "its entry 'state_dict'"),
        ("average alone", "its entry 'model_ema'"),
        ("bare", ""),
    ],
)
def test_the_log_says_which_weights_were_taken(container, entry, weights, tmp_path, caplog):
    path = tmp_path / "file.pth"
    torch.save(CONTAINERS[container](weights), path)
    with caplog.at_level(logging.INFO, "mamba_zoo"):
        create("toy_small", path)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.endswith(f"; {entry}" if entry else str(path))


@pytest.mark.parametrize("arch", ["toy_small", "toy_small.tag"])
def test_a_run_of_timms_scripts_gives_what_timm_takes_from_it(arch, weights, tmp_path):
    model = timm.create_model("toy_small")
    average = ModelEmaV3(model)
    with torch.no_grad():
        average.module.get_parameter("head.bias").fill_(7.0)
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model=arch),
        model_ema=average,
        checkpoint_dir=tmp_path,
        recovery_dir=tmp_path,
    )
    saver.save_checkpoint(0, metric=1.0)
    path = tmp_path / "model_best.pth.tar"
    theirs = timm.create_model("toy_small", checkpoint_path=path).state_dict()
    assert theirs["head.bias"].tolist() == [7.0] * 5
    assert_holds(create("toy_small", path), theirs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_format_is_read_from_the_file_not_from_its_name(suffix, weights, tmp_path):
    save_file(weights, tmp_path / f"file{suffix}")
    assert_holds(create("toy_small", tmp_path / f"file{suffix}"), weights)


def test_old_format_of_torch_save(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(create("toy_small", tmp_path / "old.pth"), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_dtype_of_the_model(dtype, weights, tmp_path):
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "w.pth")
    model = create("toy_small", tmp_path / "w.pth")
    assert_holds(model, weights)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def drop_one(weights):
    del weights["norm.weight"]


def add_one(weights):
    weights["fc_norm.weight"] = torch.ones(8)


def reshape_one(weights):
    weights["norm.bias"] = torch.ones(9)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_one, r"1 weights of the model are not in it \(norm\.weight\)"),
        (add_one, r"1 of its weights have no place \(fc_norm\.weight\)"),
        (reshape_one, r"1 differ in shape \(norm\.bias: file \(9,\), model \(8,\)\)"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_what_does_not_fit_is_named_and_the_model_is_untouched(spoil, message, weights, tmp_path):
    model = timm.create_model("toy_small")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoil(weights)
    torch.save({"model": weights}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, tmp_path / "w.pth")
    assert_holds(model, before)


def test_an_old_file_may_lack_the_counter_of_a_batch_norm(weights, tmp_path):
    del weights["norm.num_batches_tracked"]
    torch.save({"model": weights}, tmp_path / "w.pth")
    assert_holds(create("toy_small", tmp_path / "w.pth"), weights)


def test_a_new_classifier_keeps_its_initialisation_and_says_so_once(file, weights, caplog):
    with caplog.at_level(logging.INFO, "mamba_zoo"):
        model = create("toy_small", file, num_classes=3)
    assert model.get_parameter("head.weight").shape == (3, 8)
    assert_holds(model, weights, but=["head."])
    (record,) = caplog.records
    assert "head.weight, head.bias left at initialisation for the new classes" in record.getMessage()


def test_no_classifier(file, weights):
    assert_holds(create("toy_small", file, num_classes=0), weights, but=["head."])


def test_a_fine_tuned_file_loads_whole_with_its_number_of_classes(file, weights, tmp_path):
    tuned = {**weights, "head.weight": torch.ones(3, 8), "head.bias": torch.ones(3)}
    torch.save(tuned, tmp_path / "tuned.pth")
    assert_holds(create("toy_small", tmp_path / "tuned.pth", num_classes=3), tuned)
    with pytest.raises(ValueError, match="classifier of 3 classes; pass num_classes=3"):
        create("toy_small", tmp_path / "tuned.pth")


def test_input_channels_are_adapted_when_asked_for(file, weights):
    model = create("toy_small", file, in_chans=1)
    torch.testing.assert_close(model.get_parameter("stem.weight"), weights["patch_embed.weight"].sum(1, keepdim=True))
    assert_holds(model, weights, but=["stem.weight"])


def test_a_position_table_is_resized_only_when_the_model_was_asked_for_another_size(file, weights):
    model = create("toy_small", file, img_size=16)
    assert model.pos_embed.shape == (1, 8, 4, 4)
    assert_holds(model, weights, but=["pos_embed"])
    # toy_fine differs from toy_small by the table alone: a resized table would give a model that nobody published.
    with pytest.raises(ValueError, match="is toy_small or toy_twin_small, not toy_fine"):
        create("toy_fine", file)


def test_the_right_variant_is_named(file):
    # The twins share every name and shape, as Vim and VideoMamba do, so both are named and none is guessed.
    with pytest.raises(ValueError, match=r"w\.pth is toy_small or toy_twin_small, not toy_large"):
        create("toy_large", file)


def test_other_arguments_of_the_right_variant(file):
    with pytest.raises(ValueError, match="holds toy_small, but this model was built with other arguments"):
        create("toy_small", file, dim=6)


def test_published_vmamba_is_recognised(tmp_path):
    published = mamba_zoo.create_model("vmamba_tiny_s2l5", num_classes=100)
    torch.save({"state_dict": published.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is vmamba_tiny_s2l5 with num_classes=100, not vmamba_tiny"):
        mamba_zoo.create_model("vmamba_tiny", checkpoint_path=tmp_path / "w.pth", device="cpu")


def test_features_load_what_they_use(tmp_path):
    torch.manual_seed(0)
    whole: Any = mamba_zoo.create_model("vmamba_mini").eval()
    state = whole.state_dict()
    torch.save(state, tmp_path / "whole.pth")
    bare = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    torch.save({"state_dict": {**bare, "decode_head.w": torch.ones(1)}}, tmp_path / "segmenter.pth")
    x = torch.randn(1, 3, 32, 32)
    wanted = whole.forward_intermediates(x, intermediates_only=True)
    for file in ("whole.pth", "segmenter.pth"):
        features = mamba_zoo.create_model("vmamba_mini", checkpoint_path=tmp_path / file, features_only=True).eval()
        for got, want in zip(features(x), wanted, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="4 weights of the model are not in it"):
        mamba_zoo.create_model("vmamba_mini", checkpoint_path=tmp_path / "segmenter.pth")


def test_a_model_without_memory_is_refused(file):
    with pytest.raises(ValueError, match="meta device; build it with device='cpu'"):
        create("toy_small", file, device="meta")


def test_a_state_dict_in_memory_is_checked_alike(weights):
    overlay = {"state_dict": weights}
    assert_holds(timm.create_model("toy_small", pretrained=True, pretrained_cfg_overlay=overlay), weights)
    del weights["norm.bias"]
    with pytest.raises(ValueError, match="the given state_dict does not fit"):
        timm.create_model("toy_small", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.usefixtures("_toys")
def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match=r"toy_small takes no argument 'img_sise' \(did you mean img_size\?\)"):
        timm.create_model("toy_small", img_sise=3)
    with pytest.raises(TypeError, match="out_indices= needs features_only=True"):
        timm.create_model("toy_small", out_indices=(1,))

"""Finding, describing and creating models by name."""

import dataclasses
import doctest
import pickle
from typing import Any

import pytest
import timm
import torch

import mamba_zoo
from mamba_zoo import _factory
from mamba_zoo.backbones import _checkpoint
from mamba_zoo.scans import build_scan

# Of each kind, and one of every family that has no mini model.
SMALL = sorted(
    {
        *mamba_zoo.list_models("*mini*"),
        *mamba_zoo.list_models(modality="graph"),
        *mamba_zoo.list_models(modality="points"),
        *mamba_zoo.list_models(modality="sequence"),
        *mamba_zoo.list_models(modality="series"),
        *mamba_zoo.list_models("*tiny"),
    }
)


def test_examples_in_the_docstrings():
    result = doctest.testmod(_factory)
    assert result.attempted >= 3
    assert result.failed == 0


def test_models_are_the_ones_timm_builds():
    torch.manual_seed(0)
    ours = mamba_zoo.create_model("vmamba_mini", num_classes=7)
    torch.manual_seed(0)
    theirs = timm.create_model("vmamba_mini", num_classes=7)
    assert type(ours) is type(theirs)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_timm_lists_every_model():
    names = mamba_zoo.list_models()
    assert set(names) <= set(timm.list_models())
    assert names == sorted(names)
    assert len(names) == len(set(names)) > 10


def test_a_tag_names_the_same_model():
    tagged: Any = mamba_zoo.create_model("vmamba_tiny.in1k", device="meta")
    assert tagged.pretrained_cfg["tag"] == "in1k"
    with pytest.raises((ValueError, RuntimeError), match="imagenet22k"):
        mamba_zoo.create_model("vmamba_tiny.imagenet22k", device="meta")


def test_models_of_timm_pass_through():
    model = mamba_zoo.create_model("resnet10t", num_classes=3, device="meta")
    assert type(model).__module__.startswith("timm.")


@pytest.mark.parametrize(
    ("name", "near"),
    [("vmamba-tiny", "'vmamba_tiny'"), ("Vim_small", "'vim_small'"), ("zzz", r"mamba_zoo\.list_models\(\)")],
)
def test_unknown_names_are_answered_with_close_ones(name, near):
    for function in (mamba_zoo.create_model, mamba_zoo.model_card):
        with pytest.raises(ValueError, match=f"no model named '{name}'; .*{near}"):
            function(name)


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match="name must be a string such as 'vmamba_tiny', not int"):
        mamba_zoo.create_model(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"vmamba_tiny takes no argument 'drop_path' \(did you mean drop_path_rate\?\)"):
        mamba_zoo.create_model("vmamba_tiny", drop_path=0.1)
    with pytest.raises(TypeError, match="out_indices= needs features_only=True"):
        mamba_zoo.create_model("vmamba_tiny", out_indices=(0,))
    with pytest.raises(ValueError, match="either checkpoint_path= or pretrained=True"):
        mamba_zoo.create_model("vmamba_tiny", checkpoint_path="w.pth", pretrained=True)
    with pytest.raises(ValueError, match=r"no scan named 'hilbrt'; did you mean 'hilbert'"):
        mamba_zoo.create_model("vmamba_tiny", scan="hilbrt", device="meta")
    with pytest.raises(ValueError, match="no address is known from which the weights of vmamba_mini"):
        mamba_zoo.create_model("vmamba_mini", pretrained=True)


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_empty_path_is_no_checkpoint(nothing, monkeypatch):
    def unreachable(name, *_):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(_checkpoint, "published_file", unreachable)
    for name in ("vim_tiny", "resnet10t"):
        mamba_zoo.create_model(name, checkpoint_path=nothing, device="meta")
    with pytest.raises(ConnectionError, match="no network for vim_tiny"):
        mamba_zoo.create_model("vim_tiny", checkpoint_path=nothing, pretrained=True, device="meta")


def test_an_empty_file_is_not_taken_for_the_published_one():
    with pytest.raises(ValueError, match='file="" in the configuration of vim_tiny is no file'):
        timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay={"file": ""})


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_model_is_made_under_a_default_device(name):
    with torch.device("meta"):
        model = mamba_zoo.create_model(name)
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("name", "argument", "order"),
    [
        ("vim_mini", "scan", lambda height, width: range(height * width)),
        ("vmamba_mini", "scan", build_scan("hilbert", 8, 8)),
        ("spmamba_mini", "freq_scan", lambda bins: range(bins)),
        ("pointmamba_mini", "scan", lambda xyz: xyz[..., 0].argsort(-1)),
        ("series_mamba", "scan", lambda steps: range(steps)),
    ],
)
def test_a_model_with_an_order_of_ones_own_can_be_stored_whole(name, argument, order):
    model: Any = mamba_zoo.create_model(name, **{argument: order})
    again = pickle.loads(pickle.dumps(model))
    assert getattr(again, argument) == getattr(model, argument)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_none_stands_for_the_default():
    model: Any = mamba_zoo.create_model("vmamba_mini", num_classes=None, drop_path_rate=None, device="meta")
    assert model.num_classes == 1000


def test_listing_by_pattern_modality_licence_and_weights():
    every = mamba_zoo.list_models()
    assert mamba_zoo.list_models("vim*") == [name for name in every if name.startswith("vim")]
    assert mamba_zoo.list_models("tiny") == [name for name in every if "tiny" in name]
    assert mamba_zoo.list_models("no_such_*") == []
    cards = {name: mamba_zoo.model_card(name) for name in every}
    assert set(mamba_zoo.list_models(modality="image")) == {n for n, c in cards.items() if c.modality == "image"}
    assert "vmamba_mini" not in mamba_zoo.list_models(pretrained=True)
    assert "vmamba_tiny" in mamba_zoo.list_models(pretrained=True)
    free, other = mamba_zoo.list_models(commercial=True), mamba_zoo.list_models(commercial=False)
    assert sorted(free + other) == every
    assert "vmamba_tiny" in free
    with pytest.raises(ValueError, match=r"modality='pictures' is unknown; choose one of .*image"):
        mamba_zoo.list_models(modality="pictures")


def test_a_card_says_what_is_published():
    card = mamba_zoo.model_card("vmamba_tiny_s2l5")
    assert dataclasses.is_dataclass(card)
    assert card.params == 30_705_832
    assert card.counted_params is None
    table = str(card)
    for text in ("vmamba_tiny_s2l5", "30,705,832", "4.9 G", "82.5 %", "MIT", "arXiv:2401.10166", "vssm_tiny_0230_ckpt"):
        assert text in table
    assert len({line.index(line.split("  ")[-1].strip()) for line in table.splitlines()}) == 1, "one column of values"


def test_parameters_and_operations_are_counted_without_memory():
    card = mamba_zoo.model_card("vmamba_tiny_s2l5", count=True)
    assert card.counted_params == card.params
    assert card.input_size == (3, 224, 224)
    assert card.counted_gmacs == pytest.approx(card.gflops, rel=0.15)
    assert "counted" in str(card)
    sequence = mamba_zoo.model_card("mamba", count=True)
    assert sequence.counted_params
    assert sequence.counted_gmacs is None, "no default input"


def test_a_file_of_one_vim_is_not_taken_for_another(tmp_path):
    # Only the position table tells these two apart, and a resized one would load without a word.
    fine: Any = mamba_zoo.create_model("vim_tiny_stride8")
    torch.save({"model": fine.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"is vim_tiny_stride8( or \w+)*, not vim_tiny;"):
        mamba_zoo.create_model("vim_tiny", checkpoint_path=tmp_path / "w.pth")
    coarse: Any = mamba_zoo.create_model("vim_tiny")
    torch.save({"model": coarse.state_dict()}, tmp_path / "w.pth")
    larger: Any = mamba_zoo.create_model("vim_tiny", checkpoint_path=tmp_path / "w.pth", img_size=384)
    assert larger.pos_embed.shape == (1, 24 * 24 + 1, 192)
    torch.testing.assert_close(larger.blocks[3].mixer.in_proj.weight, coarse.blocks[3].mixer.in_proj.weight)

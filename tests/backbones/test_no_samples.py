"""A batch of no samples, as the last one of a process may be: an empty result, and gradients that are zero."""

from typing import Any

import pytest
import torch

import mamba_zoo

IMAGE: dict[str, Any] = {"num_classes": 3, "d_state": 2}
MODELS: dict[str, dict[str, Any]] = {
    "vmamba_mini": {"num_classes": 3},
    "vmamba_tiny_v0": {**IMAGE, "depths": (1, 1), "dims": 16},
    "efficient_vmamba_tiny": {**IMAGE, "depths": (1, 1, 1), "dims": 16},
    "local_vmamba_tiny": {**IMAGE, "depths": (1, 1), "dims": 16, "directions": ("v", "w3")},
    "vim_mini": {"num_classes": 3, "depth": 2},
    "plainmamba_l1": {**IMAGE, "depth": 2, "dim": 16, "img_size": 32},
    "videomamba_tiny_video": {**IMAGE, "depth": 2, "dim": 16, "img_size": 32, "num_frames": 2},
    "mambavision_t": {
        **IMAGE, "depths": (1, 1, 1, 1), "dim": 16, "stem_dim": 8, "heads": (2, 4), "windows": (2, 1), "d_state": 2,
    },
    "ssamba_tiny": {"num_classes": 3, "depth": 2, "frames": 32},
    "s_mamba": {"in_chans": 3, "dim": 16, "depth": 1},
    "mambats": {"in_chans": 3, "dim": 16, "depth": 1},
    "timemachine": {"in_chans": 3},
    "series_mamba": {"in_chans": 3, "dim": 16, "depth": 1},
    "mamba_sequence": {"dim": 16, "depth": 1},
}  # fmt: skip


def check(model: Any, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    y = model.train()(x.requires_grad_())
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert not parameter.grad.any(), name  # nor NaN, which is not zero either


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_no_samples(name):
    model: Any = mamba_zoo.create_model(name, **MODELS[name])
    card = mamba_zoo.model_card(name)
    if name == "mamba_sequence":
        check(model, torch.zeros(0, 5, 1), (0, 5, 1))
    elif card.modality == "series":
        steps, variates = model.input_shape()
        check(model, torch.zeros(0, steps, variates), (0, model.pred_len, variates))
    elif card.modality == "audio":
        check(model, torch.zeros(0, model.frames, model.mel_bins), (0, 3))
    else:
        check(model, torch.zeros(0, *model.input_shape(32, 32)), (0, 3))


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3", "mamba3_mimo"])
@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_other_mixers(name, mixer):
    model: Any = mamba_zoo.create_model(name, mixer=mixer, **MODELS[name])
    check(model, torch.zeros(0, *model.input_shape(32, 32)), (0, 3))


def test_models_that_need_a_sample_say_so():
    with pytest.raises(ValueError, match="b >= 1"):
        mamba_zoo.create_model("pointmamba_mini")(torch.zeros(0, 512, 3))
    with pytest.raises(ValueError, match="b >= 1"):
        mamba_zoo.create_model("pointmamba_mini_parts")(torch.zeros(0, 512, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one sample"):
        mamba_zoo.create_model("semamba_mini", dim=8, depth=1)(torch.zeros(0, 800))

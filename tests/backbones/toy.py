"""Two small families with the same weight names, to test the loading of checkpoints without a real backbone."""

import contextlib
import sys
import types
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import _registry, generate_default_cfgs, register_model
from torch import nn

from mamba_zoo.backbones._checkpoint import build_with_weights


class Toy(nn.Module):
    """A convolution, a position table and a classifier."""

    def __init__(self, in_chans=3, num_classes=5, dim=8, img_size=8, global_pool="avg", device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.global_pool = global_pool
        self.stem = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, img_size // 4, img_size // 4, **dd))
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.head = nn.Linear(dim, num_classes, **dd) if num_classes else nn.Identity()
        self.feature_info = [{"num_chs": dim, "reduction": 4, "module": "norm"}]

    def forward(self, x):
        """Images to logits."""
        return self.head(self.norm(self.stem(x) + self.pos_embed).mean((2, 3)))


def checkpoint_filter_fn(state_dict, model):
    """Published names to ours, with the position table resized."""
    new = {name.replace("patch_embed.", "stem."): value for name, value in state_dict.items()}
    if "pos_embed" in new and new["pos_embed"].shape != model.pos_embed.shape:
        new["pos_embed"] = F.interpolate(new["pos_embed"], model.pos_embed.shape[-2:], mode="bicubic")
    return new


FAMILIES = {
    "toy": {"toy_small": {"dim": 8}, "toy_large": {"dim": 12}, "toy_fine": {"dim": 8, "img_size": 16}},
    "toy_twin": {"toy_twin_small": {"dim": 8}},
}


def _family(module_name, models):
    module = types.ModuleType(f"mamba_zoo.backbones.{module_name}")
    sys.modules[module.__name__] = module
    source = {"input_size": (3, 8, 8), "num_classes": 5, "first_conv": "stem", "classifier": "head"}
    cfgs = generate_default_cfgs({name: {**source, "url": "http://127.0.0.1:9/x.pth"} for name in models})
    vars(module).update(default_cfgs=cfgs, checkpoint_filter_fn=checkpoint_filter_fn)
    for name, settings in models.items():

        def entry(pretrained=False, _name=name, _settings=settings, **kwargs):
            arguments = {**_settings, **kwargs}
            return build_with_weights(Toy, _name, pretrained, filter_fn=checkpoint_filter_fn, **arguments)

        entry.__name__, entry.__module__ = name, module.__name__
        register_model(entry)
    return module.__name__


@contextlib.contextmanager
def registered():
    """Within the block, the toy models are registered as if they were part of the package."""
    modules = [_family(name, models) for name, models in FAMILIES.items()]
    try:
        yield
    finally:
        for name in timm.list_models("toy_*"):
            _registry._clear_model_entries(name)
            _registry._model_entrypoints.pop(name)
        for name in modules:
            del sys.modules[name]


def create(name, path, **kwargs):
    """What `mamba_zoo.create_model` does for a registered model; the toys have no card."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def assert_holds(model, weights, but=()):
    """The model has these published weights, except for names of ours that start with one of `but`."""
    ours = model.state_dict()
    for name, value in weights.items():
        name = name.replace("patch_embed.", "stem.")
        if not name.startswith(tuple(but)):
            torch.testing.assert_close(ours[name], value)

"""What an optimizer asks of every model: which layer a parameter belongs to, and whether it is decayed."""

import re
from typing import Any

import pytest
from timm.models import group_parameters
from timm.models._registry import model_entrypoint
from timm.optim._param_groups import param_groups_layer_decay

import mamba_zoo
from mamba_zoo.backbones._exchange import MIXERS
from mamba_zoo.tasks.optim import parameter_groups

# Their parameters have other names than those of the smallest model of their family.
OTHERS = ["graph_mamba_layer", "pcm_tiny_parts", "pointmamba_mini_pretraining", "pointmamba_v1", "ssamba_tiny_pretrain",
          "videomamba_tiny_video"]  # fmt: skip
WEIGHTS = {"weight", "mimo_x", "mimo_z", "mimo_o"}  # the last three between channels and the ranks of Mamba-3
INPUT = re.compile(r"cls_|patch_|pos_|order_|embed|encoder|lift|squeeze|stem|scale")
LINEAR = "series_linear"  # no scan, and no layers one after another


def _smallest() -> list[str]:
    found: dict[str, tuple[float, str]] = {}
    for name in mamba_zoo.list_models():
        family = model_entrypoint(name).__module__
        found[family] = min(found.get(family, (float("inf"), name)), (mamba_zoo.model_card(name).params or 1e12, name))
    return [name for _, name in found.values()]


NAMES = sorted({*_smallest(), *OTHERS} - {"dlinear", "nlinear"} | {LINEAR})


def on_meta(name: str, **kwargs: Any) -> Any:
    return mamba_zoo.create_model(name, device="meta", **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_told_apart_from_the_input_to_the_head(name):
    model = on_meta(name)
    if not hasattr(model, "group_matcher"):
        assert name in ("graph_mamba_layer", "mamba", "mamba2", "mamba3", "pointmamba_mini_pretraining")
        return
    names = [key for key, _ in model.named_parameters()]
    for coarse in (False, True):
        groups: dict[int, list[str]] = group_parameters(model, model.group_matcher(coarse))
        assert sorted(key for group in groups.values() for key in group) == sorted(names)
        if name == LINEAR:
            continue
        assert len(groups) >= 3
        place = {key: i for i, group in groups.items() for key in group}
        assert {
            i for key, i in place.items() if re.match(r"(cls_|patch_|pos_|embed|encoder|lift|stem|scale)", key)
        } == {0}
        assert {i for key, i in place.items() if key.startswith("head")} <= {max(groups)}
        for stack in ("blocks", "layers", "stages"):
            deep = [place[key] for key in names if key.startswith(f"{stack}.")]
            assert deep == sorted(deep)
            assert 0 not in deep
    groups_of_timm: Any = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=[])
    assert sum(len(group["params"]) for group in groups_of_timm) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_weights_alone_are_decayed(name):
    """No bias, scale, shift, embedding or state-space parameter, whatever its shape, and whichever the mixer."""
    count = 1 if name in ("mamba2", "mamba3", LINEAR) else 3 if name == "mamba2_130m" else len(MIXERS)
    for mixer in MIXERS[:count]:
        model = on_meta(name, mixer=mixer)
        parameters = dict(model.named_parameters())
        named = {id(p): key for key, p in parameters.items()}
        if hasattr(model, "no_weight_decay"):
            spared = model.no_weight_decay()
            assert spared < set(parameters)
            assert {key.rsplit(".", 1)[-1] for key in set(parameters) - spared} <= WEIGHTS, mixer
        for layer_decay in (None, 0.5) if hasattr(model, "group_matcher") else (None,):
            groups = parameter_groups(model, 0.1, 0.05, layer_decay)
            decayed = {named[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
            assert {key.rsplit(".", 1)[-1] for key in decayed} <= WEIGHTS, mixer
            assert all(parameters[key].dim() >= 2 for key in decayed)
            assert any(key.endswith(("in_proj.weight", "head.weight")) for key in decayed)

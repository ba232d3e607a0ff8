"""Every published variant of images and videos is built with its number of parameters, and has a card.

`published/vision.json` lists them with the arguments of their authors' constructors; `test_parity.py` turns these into
ours. Each registered name builds what the arguments of its variant build, scans and windows included.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import mamba_zoo

from .test_parity import FAMILIES, FIXTURES

ENTRIES: dict[str, dict[str, Any]] = {
    entry["model"]: entry for entry in json.loads((Path(__file__).parent / "published" / "vision.json").read_text())
}
COMPARED = {Path(name).name.removesuffix(".json.gz") for name in FIXTURES}
# Fixtures with position embeddings of another size than those of the weights that a card names.
OTHER_SIZES = {"videomamba_tiny_video_f16_res112", "videomamba_middle_video_f8_res112"}
CLASSIFIERS = {name for name, entry in ENTRIES.items() if "out_indices" not in entry["kwargs"]} - OTHER_SIZES
# What registered models leave to whoever trains them.
UNTRAINED = {"drop_path_rate": 0.0, "drop_rate": 0.0}


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - CLASSIFIERS - COMPARED))
def test_parameters_are_as_many_as_published(name):
    assert count(published(name)) == ENTRIES[name]["params"]


@pytest.mark.parametrize("family", sorted({entry["family"] for entry in ENTRIES.values()}))
def test_registered_models_are_built_as_published(family):
    names = {name for name in CLASSIFIERS if ENTRIES[name]["family"] == family}
    models = {name: published(name, **UNTRAINED) for name in names}
    assert {name: count(model) for name, model in models.items()} == {name: ENTRIES[name]["params"] for name in names}
    counts = {ENTRIES[name]["params"] for name in names}
    registered = [
        parts(mamba_zoo.create_model(name, device="meta"))
        for name in [*mamba_zoo.list_models(modality="image"), *mamba_zoo.list_models(modality="video")]
        if mamba_zoo.model_card(name).params in counts
    ]
    assert {name for name, model in models.items() if parts(model) not in registered} == set()


def test_every_classifier_has_a_card():
    cards = [mamba_zoo.model_card(name) for name in mamba_zoo.list_models()]
    counts = {card.params for card in cards if card.paper is not None and card.source != "mamba_zoo"}
    assert {name for name in CLASSIFIERS if ENTRIES[name]["params"] not in counts} == set()
    assert len(CLASSIFIERS) > 30


def published(name: str, **changes: Any) -> Any:
    """The model that the authors' arguments describe, built by ours."""
    architecture, arguments = FAMILIES[ENTRIES[name]["family"]].arguments(ENTRIES[name]["kwargs"])
    return mamba_zoo.create_model(architecture, device="meta", **{**arguments, **changes})


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parts(model: Any) -> list[Any]:
    """Every module with its plain settings, and the shape of every parameter."""
    plain = (bool, int, float, str, tuple)
    found: list[Any] = [(name, p.shape) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        own = {key: x for key, x in vars(module).items() if isinstance(x, plain) and key not in ("training", "columns")}
        found.append((name, type(module), own))
    return found

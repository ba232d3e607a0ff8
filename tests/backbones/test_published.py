"""Every published variant of images and videos is built with its number of parameters, and has a card.

`published/vision.json` lists them with the arguments of their authors' constructors; `test_parity.py` turns these into
ours. Variants whose outputs are compared there are not built again here.
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


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - COMPARED))
def test_parameters_are_as_many_as_published(name):
    entry = ENTRIES[name]
    architecture, arguments = FAMILIES[entry["family"]].arguments(entry["kwargs"])
    model = mamba_zoo.create_model(architecture, device="meta", **arguments)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == entry["params"]


def test_every_classifier_has_a_card():
    classifiers = {name for name, entry in ENTRIES.items() if "out_indices" not in entry["kwargs"]} - OTHER_SIZES
    cards = [mamba_zoo.model_card(name) for name in mamba_zoo.list_models()]
    counts = {card.params for card in cards if card.paper is not None and card.source != "mamba_zoo"}
    assert {name for name in classifiers if ENTRIES[name]["params"] not in counts} == set()
    assert len(classifiers) > 30

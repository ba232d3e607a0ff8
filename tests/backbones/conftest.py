"""A small published checkpoint."""

from pathlib import Path

import pytest
import timm
import torch

from . import toy


@pytest.fixture(scope="module")
def _toys():
    with toy.registered():
        yield


@pytest.fixture
def weights(_toys) -> dict[str, torch.Tensor]:
    """A published state dict of toy_small: other names than ours, no two tensors alike."""
    state = timm.create_model("toy_small").state_dict()
    values = {name: torch.full_like(value, i + 1) for i, (name, value) in enumerate(state.items())}
    return {name.replace("stem.", "patch_embed."): value for name, value in values.items()}


@pytest.fixture
def file(weights, tmp_path) -> Path:
    """The same in a file."""
    torch.save({"model": weights}, tmp_path / "w.pth")
    return tmp_path / "w.pth"

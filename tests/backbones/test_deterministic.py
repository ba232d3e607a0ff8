"""`torch.use_deterministic_algorithms(True)` on a GPU: no op of a model refuses it, and gradients repeat to the bit."""

from typing import Any

import pytest
import torch

import mamba_zoo

from .test_mixers import FAMILIES, example, loss


@pytest.fixture
def deterministic(monkeypatch):
    """Torch's deterministic mode, with what cuBLAS asks for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize("row", FAMILIES)
def test_training_repeats_to_the_bit(row, mixer, precision, deterministic):
    name, settings = FAMILIES[row]
    model: Any = mamba_zoo.create_model(name, **settings, mixer=mixer).cuda().train()
    x = example(row, model).to("cuda")
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(model(x))
        value.backward()
        runs.append({"loss": value.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert runs[0]["loss"].isfinite()
    for key, first in runs[0].items():
        assert torch.equal(first, runs[1][key]), key

"""Whole published models under torch.compile on a GPU: one graph, and the outputs and gradients of the eager model."""

import copy
from typing import Any

import pytest
import torch

import mamba_zoo


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("name", ["vmamba_tiny", "vim_small"])
def test_one_graph(name):
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model(name, num_classes=10).cuda().eval()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    got.square().mean().backward()
    want.square().mean().backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-12)
        assert float(error) < 1e-2
    with torch.autocast("cuda", torch.bfloat16):
        assert compiled(x).isfinite().all()

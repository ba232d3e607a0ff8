"""Models under torch.compile: one graph, and the outputs and gradients of the eager model.

Orders of points and of graphs follow from the data of each sample and are computed outside the graph.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_zoo

from ..conftest import ON_A_GPU
from .test_mixers import FAMILIES, example, loss

DATA_DEPENDENT = {"pointmamba", "pointmamba_v1", "mamba3d", "pcm", "graph_mamba", "gmn"}
pytestmark = [  # torch's own import, and its look at tensors that a graph break hands over
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def assert_same(model: Any, x: Any, whole: bool = True, precision: float = 1e-4) -> Any:
    """Compile the model for the input, as a whole or in parts, and compare."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=whole, backend="aot_eager")
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=10 * precision, atol=precision)
    loss(got).backward()
    loss(want).backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            assert float((ours.grad - theirs.grad).norm()) <= 100 * precision * float(theirs.grad.norm()) + 1e-12
    return compiled


@pytest.mark.parametrize("name", ["vmamba_tiny", "vim_small"])
class TestOnAGpu:
    pytestmark = ON_A_GPU

    def test_one_graph(self, name):
        model: Any = mamba_zoo.create_model(name, num_classes=10).cuda().eval()
        x = torch.randn(2, 3, 224, 224, device="cuda")
        compiled = assert_same(model, x)
        with torch.autocast("cuda", torch.bfloat16):
            assert compiled(x).isfinite().all()


def test_a_model_that_orders_its_data():
    """NumPy and SciPy compute the order, in a call that the compiler leaves alone."""
    model: Any = mamba_zoo.create_model("graph_mamba", depth=1).eval()
    x = example("graph_mamba", model)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(copy.deepcopy(model), backend="eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize("row", FAMILIES)
def test_every_family(row, mixer):
    name, settings = FAMILIES[row]
    model: Any = mamba_zoo.create_model(name, **settings, mixer=mixer).eval()
    x = example(row, model)
    if isinstance(model(x), Tensor):
        assert_same(model, x, whole=row not in DATA_DEPENDENT)
    else:
        with torch.no_grad():
            compiled: Any = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), model(x))

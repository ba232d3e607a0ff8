"""Planted NaN and infinities are found where they were planted."""

import pytest
import torch
from torch import nn

from mamba_zoo.doctor import find_nonfinite


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(8), inner, nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.inner(self.norm(x)))


class Logarithm(nn.Module):
    def forward(self, x):
        return torch.log(x.clamp(max=0) - 1)


class RootAtZero(nn.Module):
    """Finite values, infinite gradient."""

    def forward(self, x):
        return x + (x - x.detach()).abs().sqrt()


class OwnCode(nn.Module):
    """NaN between two healthy children."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x) * float("nan"))


def network(inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 8),
        Residual(nn.Identity()),
        Residual(inner),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 3),
    )


def test_a_healthy_model_is_left_as_it_was():
    model = network(nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(4, 8), torch.get_rng_state()
    assert not find_nonfinite(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_first_bad_output_is_named_not_those_after_it():
    found = find_nonfinite(network(Logarithm()), torch.randn(4, 8))
    assert found.forward is not None
    assert (found.forward.name, found.forward.module) == ("2.inner", "Logarithm")
    assert found.forward.nan == 32
    assert not found.weights
    assert not found.inputs


def test_code_between_modules_is_told_from_its_children():
    found = find_nonfinite(network(OwnCode()), torch.randn(4, 8))
    assert found.forward is not None
    assert found.forward.name == "2.inner"
    assert "before 2.inner.second" in found.forward.detail


def test_the_first_bad_gradient_is_named():
    found = find_nonfinite(network(RootAtZero()), torch.randn(4, 8))
    assert found.forward is None
    assert found.backward is not None
    assert (found.backward.name, found.backward.module) == ("2.inner", "RootAtZero")


def test_a_bad_weight_is_named_itself():
    model = network(nn.Identity())
    with torch.no_grad():
        model.get_parameter("2.out.weight")[0, 0] = float("inf")
        model.get_buffer("3.running_mean")[1] = float("nan")
    found = find_nonfinite(model.eval(), torch.randn(4, 8))
    assert [(p.kind, p.name) for p in found.weights] == [("parameter", "2.out.weight"), ("buffer", "3.running_mean")]
    assert found.forward is None
    assert "1 infinite of 64 values" in str(found)


def test_a_bad_input_is_flagged_as_such():
    x = torch.randn(4, 8)
    x[1, 2] = float("nan")
    found = find_nonfinite(network(nn.Identity()), x)
    assert [(p.kind, p.name, p.nan) for p in found.inputs] == [("input", "0", 1)]
    assert found.forward is None
    assert found.backward is None


def test_half_precision_overflow_names_its_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    with torch.no_grad():
        model.get_parameter("1.weight").fill_(6e4)
    found = find_nonfinite(model, torch.full((2, 8), 100.0, dtype=torch.float16))
    assert found.forward is not None
    assert found.forward.name == "1"
    assert found.forward.inf + found.forward.nan > 0
    assert "float16" in found.forward.detail


def test_a_model_without_floating_output_is_refused():
    class Names(nn.Module):
        def forward(self, x):
            return "cat"

    with pytest.raises(TypeError, match="returned str"):
        find_nonfinite(Names(), torch.ones(1))

"""Models as CUDA graphs: the same answers, gradients and random numbers as without."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import mamba_zoo
from mamba_zoo._capture import _Recording

from .conftest import ON_A_GPU


def make(name: str, **arguments) -> tuple[nn.Module, torch.Tensor]:
    model: Any = mamba_zoo.create_model(name, num_classes=5, **arguments).cuda().eval()
    return model, torch.randn(4, *model.input_shape(32, 32), device="cuda")


def test_on_a_cpu_the_model_is_called():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    fast = mamba_zoo.capture(model)
    assert torch.equal(fast(x), model(x))
    fast(x).sum().backward()
    assert model.weight.grad is not None
    assert list(fast.parameters()) == list(model.parameters())


def test_needs_room_for_a_graph():
    with pytest.raises(ValueError, match="most=0 must be at least 1"):
        mamba_zoo.capture(nn.Identity(), most=0)


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_what_a_recording_is_of(name):
    """Progressive unfreezing, parts in another mode, weights elsewhere: an old graph would miss them without a word."""
    model: Any = mamba_zoo.create_model(name, num_classes=5)
    model.stages[0].requires_grad_(False) if name == "vmamba_mini" else model.patch_embed.requires_grad_(False)
    recording = _Recording(model, lambda: None)
    assert not recording.is_stale()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert not recording.is_stale()
    for change in (
        lambda: model.requires_grad_(True),
        lambda: next(model.children()).eval(),
        lambda: model.double(),
        lambda: torch.use_deterministic_algorithms(True),
    ):
        recording = _Recording(model, lambda: None)
        change()
        try:
            assert recording.is_stale()
        finally:
            torch.use_deterministic_algorithms(False)


class _Wide(nn.Module):
    """A layer that leaves autocast, for what float16 cannot hold."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(1e6 * x) * 1e-6


class TestAutocast:
    pytestmark = ON_A_GPU

    def test_does_not_reach_the_backward_pass(self):
        model, x = _Wide().cuda(), torch.randn(5, 4, device="cuda")

        def gradients(forward: nn.Module) -> tuple[torch.Tensor, ...]:
            with torch.autocast("cuda", torch.float16):
                loss = forward(x).square().sum()
            return torch.autograd.grad(loss, list(model.parameters()))

        for expected, captured in zip(gradients(model), gradients(mamba_zoo.capture(model)), strict=True):
            assert captured.isfinite().all()
            torch.testing.assert_close(captured, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
class TestOnAGpu:
    pytestmark = ON_A_GPU

    def test_same_answers_for_every_shape_and_dtype(self, name):
        model, x = make(name)
        fast = mamba_zoo.capture(model)
        for batch in (x, torch.randn_like(x), x[:2], x):
            with torch.inference_mode():
                assert torch.equal(fast(batch), model(batch))
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                assert torch.equal(fast(batch), model(batch))

    def test_sees_new_weights_in_place_and_elsewhere(self, name):
        model, x = make(name)
        fast = mamba_zoo.capture(model)
        with torch.no_grad():
            before = fast(x)
            for p in model.parameters():
                p.mul_(1.1)
            assert torch.equal(fast(x), model(x))
            assert not torch.equal(fast(x), before)
            model.cpu().cuda()
            assert torch.equal(fast(x), model(x))

    def test_gradients_add_up(self, name):
        model, x = make(name)
        fast = mamba_zoo.capture(model)
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        for times in (1, 2):
            fast(x).square().sum().backward()
            for p, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, times * grad, rtol=1e-3, atol=1e-4)

    def test_gradient_of_the_input(self, name):
        model, x = make(name)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        (found,) = torch.autograd.grad(mamba_zoo.capture(model)(x).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    def test_drops_other_paths_in_every_replay(self, name):
        model, x = make(name, drop_path_rate=0.5)
        fast = mamba_zoo.capture(model.train())
        results = [fast(x).detach() for _ in range(4)]
        assert any(not torch.equal(results[0], other) for other in results[1:])

    def test_gradients_are_not_those_of_another_call(self, name):
        model, x = make(name)
        fast = mamba_zoo.capture(model)
        first, second = fast(x), fast(x * 2)
        torch.testing.assert_close(first, model(x), rtol=1e-3, atol=1e-4)
        second.sum().backward()
        with pytest.raises(RuntimeError, match="came after its next call"):
            first.sum().backward()

    def test_forgets_the_oldest(self, name):
        model, x = make(name)
        fast = mamba_zoo.capture(model, most=1)
        with torch.no_grad():
            for batch in (x, x[:2], x, x[:3]):
                assert torch.equal(fast(batch), model(batch))


class Waits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Collects(nn.Module):
    """Notes whether garbage would be collected while it is called."""

    def __init__(self):
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(gc.isenabled())
        return x * 2


class TestGarbage:
    pytestmark = ON_A_GPU

    def test_is_not_collected_while_a_graph_is_recorded(self):
        model = Collects()
        with torch.no_grad():
            mamba_zoo.capture(model)(torch.ones(3, device="cuda"))
        assert model.seen
        assert not any(model.seen)
        assert gc.isenabled()


class TestRefusals:
    pytestmark = ON_A_GPU

    def test_a_model_that_waits_for_the_gpu(self):
        with pytest.raises(RuntimeError, match="Waits cannot be recorded as a CUDA graph"), torch.no_grad():
            mamba_zoo.capture(Waits())(torch.ones(3, device="cuda"))
        assert torch.rand(3, device="cuda").isfinite().all()

    def test_statistics_of_batch_norms_move_once_a_call(self):
        plain, graphed = (nn.BatchNorm1d(3).cuda() for _ in range(2))
        fast = mamba_zoo.capture(graphed)
        for _ in range(3):
            x = torch.randn(8, 3, device="cuda")
            plain(x)
            fast(x)
        torch.testing.assert_close(graphed.state_dict(), plain.state_dict())

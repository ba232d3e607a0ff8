"""Weights cast together: what autocast computes, and nothing left behind."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import mamba_zoo
from mamba_zoo.backbones import _base


def build(name: str) -> Any:
    torch.manual_seed(0)
    return mamba_zoo.create_model(name, num_classes=8).train()


def autocast(enabled: bool = True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with autocast():
        y = model(x)
    y.float().logsumexp(-1).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_equals_autocast(name, monkeypatch):
    model, x = build(name), torch.randn(2, 3, 64, 64)
    model.head.requires_grad_(False)
    ours = gradients(model, x)
    monkeypatch.setattr(_base, "weights_cast", lambda model, x: nullcontext())
    theirs = gradients(model, x)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("on", [False, True])
def test_layers_see_the_dtype_of_autocast(on):
    model, seen = build("vmamba_mini").eval(), []
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    forward = layer.forward
    layer.forward = lambda x: (seen.append(layer.weight.dtype), forward(x))[1]  # type: ignore[method-assign]
    with autocast(on), torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert seen == [torch.bfloat16 if on else torch.float32]


def test_hooks_meet_the_parameters_themselves():
    """Such as a limit on the norm of weights, set before every call."""
    model = build("vmamba_mini").eval()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))

    def limit(layer: nn.Module, _: Any) -> None:
        layer.get_parameter("weight").data.clamp_(-(2**-10), 2**-10)

    layer.register_forward_pre_hook(limit)
    with autocast(), torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert float(layer.weight.detach().abs().max()) <= 2**-10


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_what_is_frozen_keeps_nothing(name):
    """Features of a frozen backbone lead to nothing that has a gradient; those after a trained block do."""
    model, x = build(name), torch.randn(2, 3, 64, 64)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    with autocast():
        assert not model.forward_features(x).requires_grad
        assert model(x).requires_grad
    found = gradients(model, x)
    assert found.keys() == {"y"} | {f"head.{key}" for key, _ in model.head.named_parameters()}


def test_weights_are_back_after_an_error():
    model = build("vmamba_mini")
    before = dict(model.named_parameters())
    with autocast(), pytest.raises(ValueError, match="expected images"):
        model(torch.randn(1, 4, 64, 64))
    assert all(p is before[name] for name, p in model.named_parameters())


def test_weights_may_be_exchanged_between_calls():
    """Loaded with `assign`, moved to another dtype, or in layers that came later."""
    model, x = build("vmamba_mini").eval(), torch.randn(1, 3, 64, 64)
    with autocast(), torch.no_grad():
        before = model(x)
        model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()}, assign=True)
        assert float(model(x).abs().max()) == 0 != float(before.abs().max())
        model.reset_classifier(3)
        nn.init.ones_(model.head.fc.bias)
        assert model(x).shape == (1, 3)
        model.bfloat16()
        assert model(x).dtype == torch.bfloat16


def test_weights_are_cast_again_after_a_round_trip_through_other_dtypes():
    model, x = build("vmamba_mini").eval(), torch.randn(1, 3, 64, 64)
    with autocast(), torch.no_grad():
        wanted = model(x)
        assert model.double()(x.double()).isfinite().all()
        model.bfloat16()(x)  # nothing is cast
        model.float()
        seen, layer = [], model.stages[0].blocks[0].mixer.in_proj
        layer.forward = watched_linear(layer, seen)
        found = model(x)
    assert seen == [torch.bfloat16]
    assert float((found - wanted).norm()) < 0.1 * float(wanted.norm())


def watched_linear(layer: nn.Linear, seen: list[torch.dtype]) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer.weight.dtype)
        return nn.functional.linear(x, layer.weight, layer.bias)

    return forward


def test_threads_take_turns():
    """One that does not learn must not lend its casts to one that does."""
    model, x = build("vmamba_mini"), torch.randn(1, 3, 64, 64)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(5)

    handle = model.stages[0].blocks[0].norm1.register_forward_hook(wait)

    def look() -> None:
        with autocast(), torch.no_grad():
            model(x)

    with ThreadPoolExecutor(2) as threads:
        looking = threads.submit(look)
        assert inside.wait(5)
        learning = threads.submit(gradients, model, x)
        time.sleep(0.2)
        handle.remove()
        go_on.set()
        looking.result()
        found = learning.result()
    assert found.keys() >= {name for name, _ in model.named_parameters()}


def test_a_model_is_freed_with_a_hook_that_refers_to_it():
    model, x = build("vmamba_mini"), torch.randn(1, 3, 64, 64)
    keeper = [model]
    model.head.fc.register_forward_hook(partial(lambda keeper, *_: None, keeper))
    with autocast(), torch.no_grad():
        model(x)
    alive = weakref.ref(model)
    del model, keeper
    gc.collect()
    assert alive() is None

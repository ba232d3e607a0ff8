"""The MLP of map blocks as one node of autograd: what it replaces, and when it stands back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import mamba_zoo
from mamba_zoo.backbones import _block
from mamba_zoo.backbones._block import LeanMlp
from mamba_zoo.backbones._cast import weights_cast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def made_by(mlp: nn.Module, x: torch.Tensor) -> str:
    return type(mlp(x).grad_fn).__name__


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block, "in_one_node", lambda *tensors: False)


@pytest.mark.parametrize("cast", [False, True], ids=["apart", "cast together"])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(96, 384), (20, 50), (7, 13)])
def test_autocast_gives_what_the_plain_layers_give(dim, hidden, half, cast, monkeypatch):
    mlp: Any = LeanMlp(dim, hidden).cuda()
    x = torch.randn(3, 17, 5, dim, device="cuda", requires_grad=True)
    seed = torch.randn(3, 17, 5, dim, device="cuda")

    def result() -> list[torch.Tensor]:
        with torch.autocast("cuda", half, enabled=half is not None), weights_cast(mlp, x) if cast else nullcontext():
            y = mlp(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], seed.to(y.dtype))]

    assert made_by(mlp, x) == "MlpBackward"
    found = result()
    plain(monkeypatch)
    assert made_by(mlp, x) != "MlpBackward"
    wanted = result()
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert float((a - b).norm() / b.norm()) < (1e-5 if half is None else 8e-3)


def test_stands_back_where_it_would_change_or_hide_something():
    x = torch.randn(2, 3, 4, 8, device="cuda", requires_grad=True)

    def node(*given: Any, change: Any = None, **options: Any) -> str:
        mlp: Any = LeanMlp(8, 32, *given, **options).cuda()
        if change is not None:
            change(mlp)
        return made_by(mlp, x)

    assert node() == node(bias=False) == "MlpBackward"
    assert node(drop=0.1, change=lambda mlp: mlp.eval()) == "MlpBackward"
    others = [
        node(drop=0.1),
        node(act_layer=nn.SiLU),
        node(act_layer=lambda: nn.GELU("tanh")),
        node(norm_layer=GlobalResponseNorm),
        node(change=lambda mlp: mlp.act.register_forward_hook(lambda *_: None)),
        node(change=lambda mlp: mlp.fc1.register_full_backward_hook(lambda *_: None)),
        node(change=lambda mlp: setattr(mlp.fc2, "forward", mlp.fc2.forward)),
        node(change=lambda mlp: nn.utils.parametrizations.weight_norm(mlp.fc1)),
        node(change=lambda mlp: setattr(mlp, "fc1", nn.Sequential(mlp.fc1))),
    ]
    assert "MlpBackward" not in others
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert node() != "MlpBackward"
    finally:
        handle.remove()
    assert node() == "MlpBackward"


def test_no_gradient_no_node():
    mlp = LeanMlp(8, 32).cuda()
    x = torch.randn(2, 3, 8, device="cuda")
    with torch.no_grad():
        assert not mlp(x).requires_grad
    with torch.inference_mode():
        mlp(x)
    mlp.requires_grad_(False)
    assert mlp(x).grad_fn is None


def test_less_is_kept_than_by_plain_layers(monkeypatch):
    mlp = LeanMlp(64, 256).cuda()
    x = torch.randn(8, 32, 32, 64, device="cuda", requires_grad=True)

    def held() -> int:
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            y = mlp(x)
        held = torch.cuda.memory_allocated() - before
        del y
        return held

    held()  # workspaces of cuBLAS
    found = held()
    plain(monkeypatch)
    activations = 8 * 32 * 32 * 256 * 2
    assert held() - found > 0.7 * activations  # blocks of the allocator may be larger than asked for


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_model_has_the_same_gradients(checkpointing, monkeypatch):
    model: Any = mamba_zoo.create_model("vmamba_mini", num_classes=8, drop_path_rate=0.2).cuda().train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(4, 3, 32, 32, device="cuda")

    def gradients(call: Any) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            y = call(x)
        y.float().logsumexp(-1).sum().backward()
        return [y.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]

    found = gradients(model)
    plain(monkeypatch)
    wanted = gradients(model)
    assert len(found) == len(wanted) > 30
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 2e-2


def test_a_captured_model_replays_it():
    model: Any = mamba_zoo.create_model("vmamba_mini", num_classes=8).cuda().train()
    captured = mamba_zoo.capture(model)
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 32, 32, device="cuda")
        results = []
        for call in (captured, model):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                y = call(x)
            y.float().logsumexp(-1).sum().backward()
            results.append([y.detach().clone(), *[p.grad.clone() for n, p in model.named_parameters() if "mlp" in n]])
        assert len(results[0]) > 8
        for a, b in zip(*results, strict=True):
            assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 1e-2

"""What the backward pass computes again: nothing but memory and time may tell."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import mamba_zoo
from mamba_zoo.backbones import _recompute
from mamba_zoo.backbones._block import LeanMlp
from mamba_zoo.backbones._map_block import MapBlock
from mamba_zoo.backbones._mixer import SS2D
from mamba_zoo.backbones._recompute import recomputed

from .leaks import assert_nothing_stays

NEVER = 2**60


class Counted:
    """A function, how often it was called, and whether its last result lives."""

    def __init__(self, function: Any):
        self.function, self.calls = function, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.function(x)
        self.last = StorageWeakRef(y.untyped_storage())
        return y

    def lives(self) -> bool:
        return not self.last.expired()


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    monkeypatch.setattr(_recompute, "LEAST", 1)


def nested(x: torch.Tensor, outer: Counted, inner: Counted) -> torch.Tensor:
    """`outer(x)` is kept by three operations, one of them within the context of `inner`, whose result two keep."""
    y = outer(x)
    with recomputed(y, outer, x):
        w = y.sin()
        z = inner(w)
        with recomputed(z, inner, w):
            return z.square().sum() + z.exp().cos().sum() + y.square().sum() + y.cos().sum()


def test_nested_contexts_make_their_tensors_once():
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    outer, inner = Counted(lambda x: x * 2), Counted(lambda x: x * 3)
    y = nested(x, outer, inner)
    assert (outer.lives(), inner.lives()) == (False, False)
    (found,) = torch.autograd.grad(y, x, retain_graph=True)
    assert (outer.calls, inner.calls) == (2, 2)
    assert (outer.lives(), inner.lives()) == (False, False)
    (again,) = torch.autograd.grad(y, x)
    assert (outer.calls, inner.calls) == (3, 3)
    (wanted,) = torch.autograd.grad(plain(x), x)
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


def plain(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y.sin() * 3
    return z.square().sum() + z.exp().cos().sum() + y.square().sum() + y.cos().sum()


def test_others_who_decide_what_is_kept_are_left_to_it():
    x = torch.randn(5, requires_grad=True)
    double, seen = Counted(lambda x: x * 2), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = double(x)
        with recomputed(y, double, x):
            z = y.sin().sum()
    assert y.data_ptr() in seen
    z.backward()
    assert double.calls == 1


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_norms_and_activations_of_a_block_do_not_outlive_its_forward_pass(gate, half, device, monkeypatch):
    torch.manual_seed(0)
    block: Any = MapBlock(8, lambda dim: SS2D(dim, gate=gate, k=4), drop_path=0.3).to(device)
    x = torch.randn(3, 6, 5, 8, device=device, requires_grad=True)
    parts = {"norm1": block.norm1, "norm2": block.norm2, "out_norm": block.mixer.out_norm, "act": block.mlp.act}

    def alive() -> tuple[set[str], Any]:
        made: dict[str, StorageWeakRef] = {}

        def remember(name: str) -> Any:
            def hook(layer: nn.Module, inputs: Any, y: Any) -> None:
                made.setdefault(name, StorageWeakRef((y[1] if isinstance(y, tuple) else y).untyped_storage()))

            return hook

        hooks = [layer.register_forward_hook(remember(name)) for name, layer in parts.items()]
        torch.manual_seed(1)  # the same samples skip a branch
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = block(x)
        lives = {name for name, storage in made.items() if not storage.expired()}
        grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        for hook in hooks:
            hook.remove()
        return lives, grads

    lives, found = alive()
    assert lives == ({"out_norm"} if gate else set())
    monkeypatch.setattr(_recompute, "LEAST", NEVER)
    lives, wanted = alive()
    assert lives == set(parts)
    for a, b in zip(found, wanted, strict=True):
        if device.type == "cpu":
            assert torch.equal(a, b)
        else:  # four directions add in any turn
            assert float((a - b).norm() / b.norm()) < 1e-2


def gradients(model: nn.Module, x: torch.Tensor, call: Any = None) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = (call or model)(x)
    y.float().logsumexp(-1).sum().backward()
    return [y.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_models_have_the_same_gradients(name, checkpointing, monkeypatch):
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model(name, num_classes=8, drop_path_rate=0.2).train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 32, 32)
    found = gradients(model, x)
    monkeypatch.setattr(_recompute, "LEAST", NEVER)
    wanted = gradients(model, x)
    assert len(found) == len(wanted) > 30
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_nothing_stays_of_a_forward_pass_without_a_backward_pass(name):
    model: Any = mamba_zoo.create_model(name)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, model.in_chans, size, size)
    assert_nothing_stays(lambda: model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_a_compiled_block_is_one_graph():
    torch.manual_seed(0)
    block = MapBlock(8, lambda dim: SS2D(dim, k=4))
    x = torch.randn(2, 4, 4, 8)
    torch._dynamo.reset()
    compiled: Any = torch.compile(block, fullgraph=True, backend="eager")
    for a, b in zip(*(torch.autograd.grad(f(x).sum(), [*block.parameters()]) for f in (compiled, block)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_captured_models_have_the_same_gradients():
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model("vmamba_mini", num_classes=8).cuda().train()
    x = torch.randn(4, 3, 32, 32, device="cuda")
    for a, b in zip(gradients(model, x, mamba_zoo.capture(model)), gradients(model, x), strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 1e-2


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight", "fc2.bias"])
def test_weights_changed_too_early_are_noticed(name):
    """As torch notices them where nothing is computed again: `fc2.bias` alone is not needed."""
    layer = LeanMlp(4, 8)
    y = layer(torch.randn(2, 3, 4, requires_grad=True))
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    if name == "fc2.bias":
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_inputs_changed_too_early_are_noticed():
    """What is computed again from them would be another tensor."""
    x = torch.randn(5, requires_grad=True)
    w = x * 2
    y = w.exp()
    with recomputed(y, torch.exp, w):
        z = y.square().sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_weights_of_the_forward_pass_make_it_again(gate, monkeypatch):
    """Weights that a functional call puts in the place of others are gone by the time of the backward pass."""
    torch.manual_seed(0)
    block, x = MapBlock(8, lambda dim: SS2D(dim, gate=gate, k=4)), torch.randn(2, 4, 4, 8)
    weights = {name: (1.1 * p.detach() + 0.1).requires_grad_() for name, p in block.named_parameters()}
    found = []
    for least in (1, NEVER):
        monkeypatch.setattr(_recompute, "LEAST", least)
        y = torch.func.functional_call(block, weights, (x,))
        found.append(torch.autograd.grad(y.square().sum(), [*weights.values()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)

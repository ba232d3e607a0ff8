"""The halves of a map block as one function each: what they replace, and when they stand back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mamba_zoo
from mamba_zoo import kernels
from mamba_zoo.backbones import _map_nodes, _recompute
from mamba_zoo.backbones._block import LayerNorm, LeanMlp
from mamba_zoo.backbones._cast import weights_cast
from mamba_zoo.backbones._map_block import MapBlock
from mamba_zoo.backbones._mixer import SS2D

from .leaks import assert_nothing_stays
from .plain_kernels import PLAIN

HALVES = ["_WithMlpBackward", "_MixedBackward"]


@pytest.fixture(autouse=True)
def functions(device, monkeypatch) -> None:
    """Takes the functions on every device: on a CPU with plain torch in the place of kernels."""
    monkeypatch.setattr(_map_nodes, "DEVICES", ("cpu", "cuda"))
    if device.type == "cpu":
        monkeypatch.setattr(_map_nodes, "_serving", lambda dtype: PLAIN)
        monkeypatch.setattr(_map_nodes.DepthwiseConv, "has_kernels", lambda self: self._as_built())


def plainly(monkeypatch, run: Any) -> Any:
    """`run()` as operations."""
    with monkeypatch.context() as patch:
        patch.setattr(_map_nodes, "DEVICES", ())
        return run()


def made(device, dim: int = 16, drop_path: float = 0.0, mlp_ratio: float = 2.0, **options: Any) -> Any:
    block = MapBlock(dim, partial(SS2D, **options), mlp_ratio, drop_path)
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name.endswith(("bias", ".D")) or "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return block.to(device)


def tokens(
    device, dim: int = 16, dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (2, 5, 4)
) -> torch.Tensor:
    return torch.randn(*size, dim).to(device, dtype).requires_grad_()


def results(block: Any, x: torch.Tensor, half: torch.dtype | None = None, cast: bool = True) -> list[torch.Tensor]:
    block.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    seed = torch.randn(x.shape).to(x.device)
    with (
        torch.autocast(x.device.type, half, enabled=half is not None),
        weights_cast(block, x) if cast else nullcontext(),
    ):
        y = block(x)
    (dx,) = torch.autograd.grad((y.float() * seed).sum(), x, retain_graph=True)
    (y.float() * seed).sum().backward()
    x.grad = None
    return [y.detach(), dx, *[p.grad for p in block.parameters()]]


def agree(found: list[torch.Tensor], wanted: list[torch.Tensor], most: float) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert float((a - b).norm()) <= most * float(b.norm()) + 1e-12, f"number {i} of output and gradients"


def nodes_of(y: torch.Tensor) -> list[str]:
    """The last two nodes that made `y`."""
    last: Any = y.grad_fn
    found = [type(last).__name__]
    return found + [type(before[0]).__name__ for before in last.next_functions[:1] if before[0] is not None]


@pytest.mark.parametrize("least", [1, 2**60], ids=["large", "small"])
@pytest.mark.parametrize(
    ("options", "half"),
    [
        ({}, None),
        ({"conv_bias": True, "d_state": 4, "scan": "snake", "k": 4}, None),
        ({"ssm_ratio": 2.0, "scan": "raster", "k": 1}, None),
        ({"drop_path": 0.5}, None),
        ({}, torch.bfloat16),
        ({"conv_bias": True, "d_state": 16, "scan": "bidirectional", "k": 2}, torch.bfloat16),
        ({"ssm_ratio": 2.0}, torch.float16),
    ],
    ids=str,
)
def test_is_what_the_layers_compute(options, half, least, device, monkeypatch):
    if half is torch.float16 and device.type == "cpu":
        half = torch.bfloat16  # torch multiplies float16 on few CPUs
    monkeypatch.setattr(_recompute, "LEAST", least)
    block, x = made(device, **options).train(), tokens(device)
    assert nodes_of(block(x)) == HALVES
    found = results(block, x, half)
    wanted = plainly(monkeypatch, lambda: results(block, x, half))
    agree(found, wanted, 2e-2 if half else 1e-5 if device.type == "cpu" else 1e-3)


def test_weights_that_are_not_cast_together(device, monkeypatch):
    block, x = made(device, conv_bias=True), tokens(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert nodes_of(block(x)) == HALVES
    found = results(block, x, torch.bfloat16, cast=False)
    assert {grad.dtype for grad in found[1:]} == {torch.float32}
    agree(found, results(block, x, torch.bfloat16), 1e-2)


def test_half_weights_without_autocast(device, monkeypatch):
    block, x = made(device).bfloat16(), tokens(device, dtype=torch.bfloat16)
    assert nodes_of(block(x)) == HALVES
    agree(results(block, x), plainly(monkeypatch, lambda: results(block, x)), 3e-2)


@pytest.mark.parametrize("least", [1, 2**60], ids=["large", "small"])
def test_large_tensors_are_not_kept(least, device, monkeypatch):
    monkeypatch.setattr(_recompute, "LEAST", least)
    block, x = made(device, scan="cross", k=4), tokens(device, size=(2, 8, 8))
    _, y = _map_nodes.mixed(block, x) or (x, x)
    saved: Any = y.grad_fn and y.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    shapes = [tuple(t.shape) for t in saved if t is not None]
    # Maps and rows of tokens: the input, what is convolved, what is scanned and normed.
    assert sum(shape in ((2, 8, 8, 16), (2, 64, 16)) for shape in shapes) == (3 if least == 1 else 6)
    assert ((2, 64, 4, 16) in shapes) == (least > 1)  # step sizes


def test_an_mlp_behind_another_mixer_and_a_mixer_without_an_mlp(device, monkeypatch):
    x = tokens(device)
    for block, node in (
        (made(device, gate=True), "_WithMlpBackward"),
        (made(device, k=0), "_WithMlpBackward"),
        (made(device, mlp_ratio=0.0), "_MixedBackward"),
    ):
        assert node in nodes_of(block(x))
        agree(results(block, x), plainly(monkeypatch, lambda block=block: results(block, x)), 1e-3)


def test_without_gradients_nothing_is_recorded(device, monkeypatch):
    block, x = made(device), tokens(device)
    calls, forward = [], _map_nodes._Mixed.forward
    monkeypatch.setattr(_map_nodes._Mixed, "forward", lambda *args: calls.append(1) or forward(*args))

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [block(x)]
        with torch.inference_mode():
            return [*found, block(x)]

    found = run()
    assert len(calls) == 2
    assert not any(y.requires_grad for y in found)
    agree(found, plainly(monkeypatch, run), 1e-5)
    agree(found[:1], [block(x).detach()], 1e-6)
    block.requires_grad_(False)(x.detach())
    assert len(calls) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device, monkeypatch):
    monkeypatch.setattr(_recompute, "LEAST", 1)
    block, x = made(device), tokens(device)
    found = []
    for run in (partial(checkpoint, block, use_reentrant=reentrant), block):
        block.zero_grad(set_to_none=True)
        y: Any = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad for p in block.parameters()]])
        x.grad = None
    agree(found[0], found[1], 1e-4)


def test_a_weight_changed_before_the_backward_pass_is_an_error(device):
    block, x = made(device), tokens(device)
    for name in ("norm1.weight", "mixer.in_proj.weight", "mixer.ssm.D", "mlp.fc2.weight"):
        y = block(x).sum()
        with torch.no_grad():
            block.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_differentiable_once(device):
    block, x = made(device), tokens(device)
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Shifted(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1


def as_attribute(path: str) -> Any:
    """Puts a tensor in the place of a parameter, as hypernetworks do."""

    def change(block: Any) -> None:
        layer, _, name = path.rpartition(".")
        layer = block.get_submodule(layer)
        weight = getattr(layer, name)
        weight = torch.ones(16, device=block.norm1.weight.device) if weight is None else 3 * weight.detach()
        delattr(layer, name)
        setattr(layer, name, weight)

    return change


def parametrized(path: str, name: str) -> Any:
    return lambda block: nn.utils.parametrize.register_parametrization(block.get_submodule(path), name, Shifted())


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def hooked(path: str) -> Any:
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None)


def frozen(path: str) -> Any:
    return lambda block: block.get_parameter(path).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "mixed", "fed"),
    [
        (hooked("mixer"), False, True),
        (hooked("mixer.ssm.dt_proj"), False, True),
        (hooked("norm2"), True, False),
        (hooked("mlp.act"), True, False),
        (lambda block: block.mixer.in_proj.register_full_backward_hook(lambda *_: None), False, True),
        (lambda block: setattr(block.mixer, "forward", block.mixer.forward), False, True),
        (lambda block: setattr(block.mixer, "out_proj", Doubled(16, 16, bias=False)), False, True),
        (lambda block: setattr(block.mlp, "fc1", Doubled(16, 32)), True, False),
        (lambda block: setattr(block.mlp, "act", nn.GELU("tanh")), True, False),
        (lambda block: setattr(block.mlp, "drop1", nn.Dropout(0.1)), True, False),
        (lambda block: setattr(block, "drop_path2", nn.Dropout(0.1)), True, False),
        (lambda block: setattr(block.mixer.conv, "dilation", (2, 2)), None, None),
        (lambda block: setattr(block.mixer.conv, "activation", None), False, True),
        (frozen("mixer.ssm.A_log"), False, True),
        (frozen("mlp.fc2.bias"), True, False),
        (lambda block: block.mixer.in_proj.double(), None, None),
        (lambda block: block.mixer.in_proj.bfloat16(), None, None),
        (lambda block: block.mixer.ssm.dt_proj.bfloat16(), None, None),
        (lambda block: setattr(block.mixer, "in_proj", nn.Linear(16, 16)), False, True),
        (lambda block: setattr(block.mixer, "out_proj", nn.Linear(16, 16)), False, True),
        (lambda block: setattr(block.mlp.fc1, "__class__", Doubled), True, False),
        (parametrized("mixer.in_proj", "weight"), False, True),
        (parametrized("norm1", "bias"), False, True),
        (parametrized("mlp.fc1", "bias"), True, False),
        (as_attribute("mlp.fc1.bias"), True, False),
        (as_attribute("norm2.bias"), True, False),
        (as_attribute("mixer.out_norm.bias"), False, True),
        (as_attribute("mixer.in_proj.bias"), False, True),
        (lambda block: setattr(block, "norm2", LayerNorm(8)), None, None),
        (lambda block: setattr(block.mixer.conv, "weight", nn.Parameter(torch.ones(8, 1, 3, 3))), None, None),
        (lambda block: setattr(block.mixer.out_norm, "weight", nn.Parameter(torch.ones(8))), None, None),
        (lambda block: setattr(block, "drop_path2", DropPath(0.5, scale_by_keep=False)), True, False),
        (lambda block: block.mlp.fc1.compile(backend="eager"), True, False),
    ],
)
def test_stands_back_where_it_would_change_or_hide_something(change, mixed, fed, device, monkeypatch):
    block, x = made(device), tokens(device)
    assert nodes_of(block(x)) == HALVES  # and what was found for the block is not used for another
    change(block)
    block.to(device)
    if mixed is None:  # the layers' own errors
        with pytest.raises((RuntimeError, ValueError)) as ours:
            block(x)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            plainly(monkeypatch, lambda: block(x))
        assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
        return
    found = graph_of(block(x))
    assert ("_MixedBackward" in found, "_WithMlpBackward" in found) == (mixed, fed)
    block.eval()  # nothing random
    agree([block(x).detach()], plainly(monkeypatch, lambda: [block(x).detach()]), 1e-3)


def graph_of(y: torch.Tensor) -> set[str]:
    """All nodes that made `y`."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is not None:
            found.add(type(node).__name__)
            todo += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_without_biases(bias, device, monkeypatch):
    block, x = made(device), tokens(device)
    block.mlp = LeanMlp(16, 32, bias=(bias, False)).to(device)
    assert nodes_of(block(x)) == HALVES
    agree(results(block, x), plainly(monkeypatch, lambda: results(block, x)), 1e-3)


def test_a_single_channel_goes_a_shorter_way(device):
    block = made(device, dim=16, ssm_ratio=1 / 16)
    assert "_MixedBackward" not in graph_of(block(tokens(device)))


def test_counters_see_operations(device):
    block, x = made(device), tokens(device)
    with FlopCounterMode(display=False) as seen:
        assert not graph_of(block(x)) & set(HALVES)
    assert seen.get_total_flops() > 0


def test_two_threads(device):
    block = made(device)
    inputs = [tokens(device), tokens(device)]
    wanted = [torch.autograd.grad(block(x).square().sum(), x)[0] for x in inputs]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.autograd.grad(block(x).square().sum(), x)[0] for _ in range(20)]).mean(0)

    with ThreadPoolExecutor(2) as threads:
        agree([*threads.map(run, inputs)], wanted, 1e-3)


def test_two_backward_passes_of_one_graph_in_threads(device):
    block, x = made(device), tokens(device)
    y = block(x).square().sum()
    (wanted,) = torch.autograd.grad(y, x, retain_graph=True)
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda _: torch.autograd.grad(y, x, retain_graph=True)[0], range(20))
    agree([*found], 20 * [wanted], 1e-3)


def test_forward_mode_is_an_error(device):
    block, x = made(device).requires_grad_(False), tokens(device).detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError)):
            block(dual)


def test_a_block_is_freed_with_a_hook_that_refers_to_it(device):
    block, x = made(device), tokens(device)
    block(x)
    keeper = SimpleNamespace(block=block)
    block.mixer.register_forward_hook(partial(lambda keeper, *_: None, keeper))
    block(x)
    alive = weakref.ref(block)
    del block, keeper
    gc.collect()
    assert alive() is None


def test_hooks_may_come_and_go(device):
    block, x = made(device), tokens(device)
    handle = block.mixer.register_forward_hook(lambda *_: None)
    assert "_MixedBackward" not in graph_of(block(x))
    handle.remove()
    assert nodes_of(block(x)) == HALVES


def test_other_dtypes_devices_and_sizes_go_their_own_way(device):
    block = made(device)
    one = torch.randn(2, 1, 1, 16, device=device, requires_grad=True)
    assert "_MixedBackward" not in graph_of(block(one))
    assert block(torch.empty(0, 4, 4, 16, device=device)).shape == (0, 4, 4, 16)
    assert block.to("meta")(torch.empty(2, 4, 4, 16, device="meta")).shape == (2, 4, 4, 16)
    double = made(device).double()
    assert not graph_of(double(tokens(device, dtype=torch.float64))) & set(HALVES)


def test_strided_maps(device, monkeypatch):
    block = made(device)
    x = torch.randn(2, 16, 5, 4, device=device).permute(0, 2, 3, 1).requires_grad_()
    assert nodes_of(block(x)) == HALVES
    agree(results(block, x), plainly(monkeypatch, lambda: results(block, x)), 1e-3)


def test_a_copy_has_layers_of_its_own(device):
    block, x = made(device), tokens(device)
    wanted = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            other.mixer.in_proj.weight.zero_()
            other.mlp.fc2.weight.zero_()
        assert not torch.equal(other(x), wanted)
    assert torch.equal(block(x), wanted)


def test_weights_may_be_replaced(device):
    block, x = made(device), tokens(device)
    before = block(x)
    block.mlp.fc2.weight = nn.Parameter(torch.zeros_like(block.mlp.fc2.weight))
    block.mlp.fc2.bias = nn.Parameter(torch.zeros_like(block.mlp.fc2.bias))
    after = block(x)
    assert nodes_of(after) == HALVES
    assert not torch.equal(before, after)


def test_stochastic_depth_drops_whole_samples(device):
    block, x = made(device, drop_path=0.9).train(), tokens(device, size=(64, 3, 3))
    y = block(x)
    assert nodes_of(y) == HALVES
    untouched = (y == x).flatten(1).all(1).float().mean()
    assert 0.6 < float(untouched) < 0.95
    assert isinstance(block.drop_path2, DropPath)


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_model_has_the_same_gradients(checkpointing, half, device, monkeypatch):
    model: Any = mamba_zoo.create_model("vmamba_mini", num_classes=8).to(device).train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 32, 32, device=device, requires_grad=True)

    def run() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half is not None):
            y = model(x)
        y.float().square().mean().backward()
        return [y.detach().float(), *[p.grad for p in model.parameters()]]

    found, wanted = run(), plainly(monkeypatch, run)
    assert "_WithMlpBackward" in graph_of(model(x))
    agree(found, wanted, 0.1 if half else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_stands_back_for_other_backends(device):
    block, x = made(device), tokens(device)
    with kernels.use("reference"):
        assert not graph_of(block(x)) & set(HALVES)


def test_nothing_stays_of_a_forward_pass_without_a_backward_pass(device):
    block, x = made(device), tokens(device)
    assert_nothing_stays(lambda: block(x))


class Narrowed(nn.Module):
    """Does nothing, in bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


def test_a_stream_that_is_narrower_than_the_result(device, monkeypatch):
    block = MapBlock(16, lambda dim: Narrowed(), 2.0).to(device)
    x = tokens(device, dtype=torch.bfloat16)
    with torch.autocast(device.type, torch.float16):
        y = block(x)
    assert nodes_of(y)[0] == HALVES[0]
    assert y.dtype == torch.float32
    found, wanted = results(block, x, torch.float16), plainly(monkeypatch, lambda: results(block, x, torch.float16))
    agree(found, wanted, 3e-2)

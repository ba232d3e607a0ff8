"""The projections and the scan as one node: what it computes, in every gradient, and where it is not taken."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mamba_zoo
from mamba_zoo.backbones import _map_nodes, _projected_scan, _recompute
from mamba_zoo.backbones._cast import weights_cast
from mamba_zoo.backbones._ssm import SelectiveSSM

EVERYWHERE = ("cpu", "cuda")


@pytest.fixture
def nodes(monkeypatch) -> list[bool]:
    """Takes the function on every device, and lists whether its calls keep states."""
    calls, forward = [], _projected_scan.scan_keeping

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["keep"])
        return forward(*args, **options)

    monkeypatch.setattr(_projected_scan, "DEVICES", EVERYWHERE)
    monkeypatch.setattr(_map_nodes, "DEVICES", ())  # which call the function themselves
    monkeypatch.setattr(_projected_scan, "scan_keeping", counted)
    return calls


def plainly(monkeypatch, run: Any) -> Any:
    """`run()` as separate operations."""
    with monkeypatch.context() as patch:
        patch.setattr(_projected_scan, "DEVICES", ())
        return run()


def layer_and_tokens(device, dtype, k: int, n: int, shared: bool, gate: str = "none", b: int = 2, l: int = 9) -> tuple:
    ssm = SelectiveSSM(6, n, 3, k=k).to(device, dtype)
    with torch.no_grad():
        ssm.D.copy_(torch.randn_like(ssm.D))
    directions = () if shared else (k,)
    u = torch.randn(b, l, *directions, 6).to(device, dtype).requires_grad_()
    z = {"none": None, "shared": torch.randn(b, l, 12)[..., 6:], "apart": torch.randn(b, l, k, 6)}[gate]
    return ssm, u, z if z is None else z.to(device, dtype).requires_grad_()


def visits(kind: str, b: int, l: int, k: int, device) -> torch.Tensor | None:
    if kind == "none":
        return None
    tables = torch.stack([torch.stack([torch.randperm(l) for _ in range(k)]) for _ in range(b)])
    if kind == "some":
        tables[:, 0, ::3] = -1
    return (tables if kind == "samples" else tables[0]).to(device)


def results(call: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    y = call()
    seed = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).cos()
    return [y.detach(), *torch.autograd.grad(y, inputs, seed)]


def agree(found: list[torch.Tensor], wanted: list[torch.Tensor], atol: float) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert float((a - b).norm()) <= atol * float(b.norm()) + 1e-12, f"number {i} of output and gradients"


@pytest.mark.parametrize("reduce", [None, "sum", "mean"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    ("n", "gate", "order"),
    [(1, "none", "all"), (1, "apart", "samples"), (5, "shared", "some"), (9, "shared", "none"), (9, "apart", "all")],
)
def test_is_what_separate_operations_compute(n, gate, order, k, shared, reduce, device, nodes, monkeypatch):
    double = device.type == "cpu"  # the kernels for GPUs are float32 at most
    dtype = torch.float64 if double else torch.float32
    ssm, u, z = layer_and_tokens(device, dtype, k, n, shared, gate)
    table = visits(order, 2, 9, k, device)
    inputs = [u, *([] if z is None else [z]), *ssm.parameters()]
    found = results(lambda: ssm(u, z, table, reduce), inputs)
    assert nodes == [True]
    wanted = plainly(monkeypatch, lambda: results(lambda: ssm(u, z, table, reduce), inputs))
    assert nodes == [True]
    agree(found, wanted, 1e-12 if double else 1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_packed_sequences(k, device, nodes, monkeypatch):
    ssm, u, z = layer_and_tokens(device, torch.float32, k, 4, False, "shared", b=1, l=12)
    cuts, inputs = torch.tensor([0, 5, 6, 12], device=device), [u, z, *ssm.parameters()]
    table = visits("all", 1, 12, k, device)
    found = results(lambda: ssm(u, z, table, "sum", cuts), inputs)
    assert nodes == [True]
    agree(found, plainly(monkeypatch, lambda: results(lambda: ssm(u, z, table, "sum", cuts), inputs)), 1e-4)


@pytest.mark.parametrize("cast", ["each weight", "together", "kept in half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "n", "shared"), [(1, 16, False), (2, 16, False), (4, 1, True)])
def test_half_precision_is_as_close_to_float64(k, n, shared, dtype, cast, device, nodes, monkeypatch):
    ssm, u, z = layer_and_tokens(device, torch.float32, k, n, shared, "shared", l=40)
    if cast == "kept in half":
        ssm, u, z = ssm.to(dtype), *(x.detach().to(dtype).requires_grad_() for x in (u, z))
    inputs = [u, z, *ssm.parameters()]

    def run() -> list[torch.Tensor]:
        enabled = cast != "kept in half"
        with torch.autocast(device.type, dtype, enabled=enabled):
            if cast == "together":
                with weights_cast(ssm, u):
                    return results(lambda: ssm(u, z, reduce="sum"), inputs)
            return results(lambda: ssm(u, z, reduce="sum"), inputs)

    found, wanted = run(), plainly(monkeypatch, run)
    assert nodes == [True]
    exact, exact_inputs = ssm.double().cpu(), [x.detach().double().cpu().requires_grad_() for x in (u, z)]
    truth = results(lambda: exact(*exact_inputs, reduce="sum"), [*exact_inputs, *exact.parameters()])
    for i, (a, b, c) in enumerate(zip(found, wanted, truth, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        ours, theirs = (float((x.detach().double().cpu() - c).norm() / c.norm()) for x in (a, b))
        assert ours < 0.02, f"number {i}"
        assert ours < 1.5 * theirs + 1e-3, f"number {i}"


@pytest.mark.parametrize("learned", range(7))
@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 2), (2, 16)])
def test_any_part_may_be_frozen(learned, k, n, nodes, monkeypatch):
    ssm, u, z = layer_and_tokens("cpu", torch.float64, k, n, False, "shared")
    everything = [u, z, *ssm.parameters()]
    for x in everything:
        x.requires_grad_(False)
    only = everything[learned].requires_grad_()
    found = results(lambda: ssm(u, z), [only])
    assert nodes == [True]
    agree(found, plainly(monkeypatch, lambda: results(lambda: ssm(u, z), [only])), 1e-12)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    ("k", "n", "shared", "gate"), [(1, 4, False, "none"), (4, 1, True, "shared"), (2, 16, False, "apart")]
)
def test_without_gradients_and_without_learning_nothing_is_kept(k, n, shared, gate, mixed, device, nodes, monkeypatch):
    ssm, u, z = layer_and_tokens(device, torch.float32, k, n, shared, gate)
    order = visits("some", 2, 9, k, device)

    def run() -> list[Any]:
        with torch.no_grad():
            first = ssm(u, z, order)
        with torch.inference_mode():
            return [first, ssm(u, z, order, "sum")]

    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        found = [*run(), ssm(u, z, order).detach()]
        ssm.requires_grad_(False)(u.detach(), None if z is None else z.detach(), order)
        assert nodes == [False, False, True, False]
        wanted = [*plainly(monkeypatch, run), found[0]]
    agree(found, wanted, 2e-2 if mixed else 1e-5 if device.type == "cpu" else 1e-4)


@pytest.mark.parametrize("least", [1, 2**60], ids=["large", "small"])
@pytest.mark.parametrize(("k", "n"), [(1, 4), (2, 16), (4, 1)])
def test_large_steps_are_computed_again_and_gradients_may_be_asked_for_twice(k, n, least, device, nodes, monkeypatch):
    monkeypatch.setattr(_recompute, "LEAST", least)
    ssm, u, z = layer_and_tokens(device, torch.float32, k, n, False, "shared")
    steps, kept = [], _projected_scan.scan_keeping

    def watched(u: torch.Tensor, dt: torch.Tensor, *args: Any, **options: Any) -> Any:
        steps.append(StorageWeakRef(dt.untyped_storage()))
        return kept(u, dt, *args, **options)

    monkeypatch.setattr(_projected_scan, "scan_keeping", watched)
    inputs = [u, z, *ssm.parameters()]
    y = ssm(u, z)
    assert steps[0].expired() == (least == 1)
    grads = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for _ in range(2)]
    wanted = plainly(monkeypatch, lambda: torch.autograd.grad(ssm(u, z).square().sum(), inputs))
    for other in grads:
        agree(list(other), list(wanted), 1e-5 if device.type == "cpu" else 1e-4)
    assert nodes == [True]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device, nodes, monkeypatch):
    monkeypatch.setattr(_recompute, "LEAST", 1)
    ssm, u, z = layer_and_tokens(device, torch.float32, 2, 4, False, "shared")

    def run() -> list[Any]:
        ssm.zero_grad()
        u.grad = None
        y: Any = checkpoint(ssm, u, z, use_reentrant=reentrant)
        y.square().sum().backward()
        return [y.detach(), u.grad, *[p.grad for p in ssm.parameters()]]

    found = run()
    assert nodes == [not reentrant, True]
    agree(found, plainly(monkeypatch, run), 1e-5 if device.type == "cpu" else 1e-4)


def test_autocast_around_the_backward_pass_changes_nothing(device, nodes):
    ssm, u, z = layer_and_tokens(device, torch.float32, 2, 16, False, "shared")
    inputs = [u, z, *ssm.parameters()]
    wanted, y = results(lambda: ssm(u, z), inputs), ssm(u, z)
    with torch.autocast(device.type, torch.bfloat16):
        found = results(lambda: y, inputs)
    assert len(nodes) == 2
    agree(found, wanted, 1e-6 if device.type == "cpu" else 1e-4)


def test_those_who_look_on_see_the_layers(nodes):
    ssm, u, _ = layer_and_tokens("cpu", torch.float32, 2, 4, False)
    seen: list[nn.Module] = []
    hook = ssm.x_proj.register_forward_hook(lambda layer, x, y: seen.append(layer))
    ssm(u)
    hook.remove()
    assert seen == [ssm.x_proj]
    with FlopCounterMode(display=False) as counter:
        ssm(u)
    assert "mamba_zoo.selective_scan" in map(str, counter.get_flop_counts()["Global"])
    torch.func.grad(lambda x: ssm.dt_bias.sum() + ssm.x_proj(x).sum())(u.detach())
    torch.export.export(ssm, (u.detach(),))
    assert nodes == []
    ssm(u)
    assert nodes == [True]


def test_a_wrong_argument_is_the_same_error(nodes, monkeypatch):
    ssm, u, z = layer_and_tokens("cpu", torch.float32, 2, 4, False, "shared")
    mixed, _, _ = layer_and_tokens("cpu", torch.float32, 2, 4, False, "shared")
    mixed.dt_proj.bfloat16()
    calls = {
        "z": lambda: ssm(u, z[:, 1:]),
        "order": lambda: ssm(u, z, torch.zeros(3, 9, dtype=torch.long)),
        "tokens": lambda: ssm(u[..., :5], z),
        "reduce": lambda: ssm(u, z, reduce="most"),
        "dtype": lambda: ssm(u.half(), z),
        "dtypes of weights": lambda: mixed(u, z),
    }
    for call in calls.values():
        with pytest.raises((ValueError, RuntimeError)) as ours:
            call()
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            plainly(monkeypatch, call)
        assert type(ours.value) is type(theirs.value)
        if ours.type is ValueError:
            assert str(ours.value) == str(theirs.value)


def test_differentiable_once(nodes):
    ssm, u, _ = layer_and_tokens("cpu", torch.float32, 2, 4, False)
    (du,) = torch.autograd.grad(ssm(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        du.sum().backward()


def gradients(model: Any, x: torch.Tensor, half: bool = True, call: Any = None) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        y = (call or model)(x)
    y.float().square().mean().backward()
    return [y.detach().float(), *[p.grad for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_models_have_the_same_gradients(name, half, checkpointing, device, nodes, monkeypatch):
    model: Any = mamba_zoo.create_model(name, num_classes=8, drop_path_rate=0.2).to(device).train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 32, 32, device=device)
    found = gradients(model, x, half)
    assert nodes
    wanted = plainly(monkeypatch, lambda: gradients(model, x, half))
    assert len(found) == len(wanted) > 30
    agree(found, wanted, 0.1 if half else 1e-3)


def test_other_projections_are_called(nodes):
    model = mamba_zoo.create_model("mambats", in_chans=3, seq_len=32, pred_len=8, patch_size=8, depth=1)  # has dropout
    model.train()(torch.randn(2, 32, 3)).sum().backward()
    assert nodes == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("name", ["vmamba_mini", "vim_mini"])
def test_captured_models_have_the_same_gradients(name, monkeypatch):
    model: Any = mamba_zoo.create_model(name, num_classes=8).cuda().train()
    x = torch.randn(4, 3, 32, 32, device="cuda")
    wanted = plainly(monkeypatch, lambda: gradients(model, x))
    agree(gradients(model, x, call=mamba_zoo.capture(model)), wanted, 0.1)

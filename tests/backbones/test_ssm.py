"""Projections per direction, on each device and for each form of input; steps that are computed twice, not kept."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mamba_zoo.backbones import _projected_scan, _recompute
from mamba_zoo.backbones._block import LeanMlp
from mamba_zoo.backbones._ssm import DirectionLinear, SelectiveSSM
from mamba_zoo.kernels import selective_scan


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_direction_linear_is_one_map_per_direction(device, shared, k):
    layer = DirectionLinear(k, 5, 7, device=device, dtype=torch.float64)
    x = torch.randn(2, 4, 5) if shared else torch.randn(2, 4, k, 9)[..., 2:7]  # a slice, as dt is of x_proj's rows
    x = x.to(device, torch.float64).requires_grad_()
    wanted = torch.einsum("bli,koi->blko" if shared else "blki,koi->blko", x, layer.weight)
    seed = torch.randn_like(wanted)
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    ours, theirs = (torch.autograd.grad(out, [x, layer.weight], seed) for out in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def steps_and_gradients(
    ssm: SelectiveSSM, u: torch.Tensor, half: bool, monkeypatch: pytest.MonkeyPatch, checkpointed: bool = False
) -> tuple:
    """Whether the steps outlive the forward pass, how often they were computed, and all gradients."""
    made = []
    product = ssm.dt_proj.product

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = product(x, weight)
        made.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(ssm.dt_proj, "product", watched)
    with torch.autocast(u.device.type, torch.bfloat16, enabled=half):
        y: Any = checkpoint(ssm, u, reduce="sum", use_reentrant=False) if checkpointed else ssm(u, reduce="sum")
    kept = not made[0].expired()
    grads = torch.autograd.grad(y.square().sum(), [u, *ssm.parameters()])
    monkeypatch.setattr(ssm.dt_proj, "product", product)
    return kept, len(made), grads


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_large_steps_are_computed_again_instead_of_kept(half, device, monkeypatch):
    monkeypatch.setattr(_projected_scan, "DEVICES", ())  # which has a test of its own
    torch.manual_seed(0)
    ssm = SelectiveSSM(8, 4, 2, k=2).to(device)  # sums of two are the same in every run
    u = torch.randn(2, 9, 8, device=device, requires_grad=True)
    kept, count, wanted = steps_and_gradients(ssm, u, half, monkeypatch)
    assert (kept, count) == (True, 1)
    monkeypatch.setattr(_recompute, "LEAST", 1)
    kept, count, found = steps_and_gradients(ssm, u, half, monkeypatch)
    assert (kept, count) == (False, 2)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    kept, count, found = steps_and_gradients(ssm, u, half, monkeypatch, checkpointed=True)
    assert (kept, count) == (False, 2)  # by the checkpoint alone
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert ssm(u).isfinite().all()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_large_activations_are_computed_again_instead_of_kept(half, device, monkeypatch):
    torch.manual_seed(0)
    mlp = LeanMlp(8, 32).to(device)
    x = torch.randn(2, 5, 7, 8, device=device, requires_grad=True)

    def activation_and_gradients() -> tuple:
        made = []
        hook = mlp.act.register_forward_hook(lambda layer, x, y: made.append(StorageWeakRef(y.untyped_storage())))
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = mlp(x)
        kept = not made[0].expired()
        grads = torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])
        hook.remove()
        return kept, len(made), grads

    kept, count, wanted = activation_and_gradients()
    assert (kept, count) == (True, 1)
    monkeypatch.setattr(_recompute, "LEAST", 1)
    kept, count, found = activation_and_gradients()
    assert (kept, count) == (False, 2)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduce", [None, "sum", "mean"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("complete", [True, False], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize(("dim", "l"), [(1, 9), (6, 1), (1, 1)], ids=["one channel", "one token", "both"])
def test_one_channel_or_one_token_is_the_same_scan(dim, l, complete, shared, reduce, device):
    torch.manual_seed(0)
    # The kernels for GPUs are float32 at most.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    close: Any = {} if device.type == "cpu" else {"atol": 1e-4, "rtol": 1e-4}
    ssm = SelectiveSSM(dim, 4, 2, k=3, device=device, dtype=dtype)
    u, z = (torch.randn(37, l, *shape, dim, dtype=dtype) for shape in ([] if shared else [3], []))
    u, z = (x.to(device).requires_grad_() for x in (u, z))
    order = torch.stack([torch.randperm(l) for _ in range(3)]).to(device)
    if not complete:
        order[1, l // 2] = -1
    low, B, C = ssm.x_proj(u).split([2, 4, 4], dim=-1)
    wanted = selective_scan(
        u, ssm.dt_proj(low), ssm.decay(), B, C, ssm.D, z, order, ssm.dt_bias, dt_softplus=True, reduce=reduce
    )
    found = ssm(u, z, order, reduce)
    torch.testing.assert_close(found, wanted, **close)
    inputs, seed = [u, z, *ssm.parameters()], torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, inputs, seed) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "l"), [(1, 9), (6, 1)], ids=["one channel", "one token"])
def test_one_channel_or_one_token_in_half_precision(dim, l, dtype, device):
    torch.manual_seed(0)
    ssm = SelectiveSSM(dim, 4, 1, device=device)
    u = 300 * torch.randn(5, l, dim, device=device)  # whose squares float16 does not hold
    with torch.no_grad():
        wanted = ssm(u, reduce="sum")
        with torch.autocast(device.type, dtype):
            found = ssm(u.to(dtype), reduce="sum")
    assert found.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.03

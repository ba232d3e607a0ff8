"""The MLP as one node of autograd against the same in float64 and in plain torch, on every backend that runs here."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from mamba_zoo.kernels import refusals
from mamba_zoo.kernels._backend import implementation
from mamba_zoo.kernels.mlp import in_one_node, mlp

from .problems import INTERPRETED

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
# Shapes: tokens, hidden width, width of the result.
CASES: list[dict[str, Any]] = [
    {"shape": (2, 5, 7, 24), "hidden": 96, "out": 24},
    {"shape": (3, 11), "hidden": 33, "out": 7},
    {"shape": (13,), "hidden": 5, "out": 1},
    {"shape": (1, 700, 8), "hidden": 130, "out": 9, "biases": ()},
    {"shape": (300, 3), "hidden": 17, "out": 5, "biases": ("bias1",), "strided": True},
    {"shape": (2, 3, 16), "hidden": 64, "out": 16, "frozen": ("weight1", "bias1", "weight2", "bias2")},
    {"shape": (2, 3, 16), "hidden": 64, "out": 16, "frozen": ("x", "weight1", "bias1")},
    {"shape": (2, 3, 16), "hidden": 64, "out": 16, "frozen": ("x", "weight2")},
    {"shape": (2, 3, 16), "hidden": 64, "out": 16, "frozen": ("x", "weight1", "weight2", "bias2")},
    {"shape": (2, 3, 16), "hidden": 64, "out": 16, "frozen": ("x", "weight1", "bias1", "weight2")},
    {"shape": (4, 0, 8), "hidden": 32, "out": 8},
    {"shape": (2, 5, 24), "hidden": 96, "out": 24, "late_autocast": torch.bfloat16},
    {"shape": (2, 90, 32), "hidden": 128, "out": 32, "dtype": torch.bfloat16},
    {"shape": (3, 50, 20), "hidden": 75, "out": 20, "dtype": torch.float16, "strided": True},
    {"shape": (2, 90, 32), "hidden": 128, "out": 32, "autocast": torch.bfloat16},
    {"shape": (2, 90, 32), "hidden": 128, "out": 32, "autocast": torch.bfloat16, "cast": True, "frozen": ("weight2",)},
]


def make(device, shape, hidden, out, dtype=torch.float32, biases=("bias1", "bias2"), strided=False, **case) -> dict:
    """Arguments of `mlp`, those that are not frozen with a gradient."""
    autocast = case.get("autocast")

    def tensor(name: str, *size: int) -> torch.Tensor:
        x = torch.randn(*size[:-1], 2 * size[-1])[..., ::2] if strided else torch.randn(size)
        cast = autocast if autocast is not None and (name == "x" or case.get("cast")) else dtype
        return (
            (x if name != "weight2" else x / hidden**0.5)
            .to(device, cast)
            .requires_grad_(name not in case.get("frozen", ()))
        )

    sizes = {"x": shape, "weight1": (hidden, shape[-1]), "bias1": (hidden,), "weight2": (out, hidden), "bias2": (out,)}
    return {name: None if "bias" in name and name not in biases else tensor(name, *sizes[name]) for name in NAMES}


def check(device, backend, **case):
    torch.manual_seed(0)
    given = make(device, **case)
    autocast = case.get("autocast")
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        y = mlp(**given, backend=backend)
    wanted = {name: t for name, t in given.items() if t is not None and t.requires_grad}
    exact: dict[str, Any] = {name: None if t is None else t.detach().double() for name, t in given.items()}
    for name in wanted:
        exact[name].requires_grad_()
    expected = F.linear(
        F.gelu(F.linear(exact["x"], exact["weight1"], exact["bias1"])), exact["weight2"], exact["bias2"]
    )
    seed = torch.randn_like(y)
    kernels = backend != "reference" and (INTERPRETED or device.type == "cuda")
    late = case.get("late_autocast")  # a backward pass under autocast, as some call it
    with torch.autocast(device.type, late) if late and kernels else nullcontext():
        ours = torch.autograd.grad(y, list(wanted.values()), seed)
    theirs = torch.autograd.grad(expected, [exact[name] for name in wanted], seed.double())
    computed = autocast or case.get("dtype", torch.float32)
    assert (y.dtype, y.shape) == (computed, expected.shape)
    for name, a, b in (("y", y, expected), *zip(wanted, ours, theirs, strict=True)):
        if name != "y":
            assert a.dtype == given[name].dtype, name
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-9)
        assert error < TOLERANCE[computed], f"{name} is off by {error:.1e}"


if INTERPRETED:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_interpreted(case):
        check(torch.device("cpu"), "triton", **case)

    def test_gelu_far_from_zero():
        from mamba_zoo.kernels._triton.mlp import gelu_gradient

        h = torch.cat([torch.linspace(-12, 12, 2494), torch.tensor([0.0, -0.0, 1e4, -1e4, 1e18, -1e18])]).view(-1, 125)
        exact = h.double()
        below = torch.special.erfc(-exact / 2**0.5) / 2  # F.gelu loses its digits in 1 + erf
        slope = below + exact * torch.exp(exact.square() / -2) / (2 * torch.pi) ** 0.5
        found, y, total = gelu_gradient(h, torch.ones_like(h), True, True)
        assert y is not None
        assert total is not None
        torch.testing.assert_close(y.double(), exact * below, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(found.double(), slope, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.double(), slope.sum(0), rtol=1e-6, atol=0)

    def test_a_block_takes_it(monkeypatch):
        from mamba_zoo.backbones import _block, _recompute
        from mamba_zoo.backbones._cast import weights_cast
        from mamba_zoo.backbones._map_block import MapBlock

        monkeypatch.setattr(_recompute, "LEAST", 1)  # the normed tokens, which it takes, are computed again
        block: Any = MapBlock(8, lambda dim: torch.nn.Linear(dim, dim), drop_path=0.2)
        x = torch.randn(3, 5, 4, 8, requires_grad=True)
        nodes, results = set(), []
        for one_node in ("triton", None):
            monkeypatch.setattr(_block, "in_one_node", lambda *tensors, answer=one_node: answer)
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16), weights_cast(block, x):
                y = block(x)
                nodes.add(type(block.mlp(x).grad_fn).__name__)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
        assert len(nodes) == 2
        assert "MlpBackward" in nodes
        for a, b in zip(*results, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-2

else:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_float64(case, device):
        check(device, "auto", **case)
        check(device, "reference", **case)
        if device.type == "cuda" and refusals("cuda", op="mlp")["triton"] is None:
            check(device, "triton", **case)

    def test_float64_and_second_gradients_are_left_to_torch(device):
        given = make(device, (3, 4), 6, 2, dtype=torch.float64)
        assert not in_one_node(*given.values())
        assert torch.autograd.gradgradcheck(mlp, tuple(given.values()))

    def test_bad_arguments_are_named():
        x, weight1, bias1, weight2, bias2 = make("cpu", (2, 4), 6, 3).values()
        with pytest.raises(ValueError, match="weight1 has shape"):
            mlp(x, weight2, bias1, weight2, bias2)
        with pytest.raises(ValueError, match="weight2 has shape"):
            mlp(x, weight1, bias1, weight1, bias2)
        with pytest.raises(ValueError, match="bias1 has shape"):
            mlp(x, weight1, bias2, weight2, bias2)
        with pytest.raises(ValueError, match="bias2 has shape"):
            mlp(x, weight1, bias1, weight2, bias1)
        with pytest.raises(ValueError, match="backend='cpu'"):
            mlp(x, weight1, bias1, weight2, bias2, backend="cpu")
        with pytest.raises(ValueError, match="runs on NVIDIA GPUs, not on cpu"):
            mlp(x, weight1, bias1, weight2, bias2, backend="cuda")
        with pytest.raises(ValueError, match="Triton kernels need a GPU"):
            mlp(x, weight1, bias1, weight2, bias2, backend="triton")
        with pytest.raises(ValueError, match="one dtype"):
            mlp(x, weight1.double(), bias1, weight2, bias2, backend="triton")
        with pytest.raises(TypeError, match="weight2"):
            mlp(x, weight1, bias1, None, bias2)  # pyright: ignore[reportArgumentType]

    def test_the_kernels_spill_nothing_and_load_16_bytes():
        pytest.importorskip("triton")
        from mamba_zoo.kernels._triton import _mlp_kernels as kernels
        from mamba_zoo.kernels._triton import mlp as host

        from .compiled import compile_kernel, stack_bytes

        tile = {"BLOCK": host.BLOCK, "TILE": host.TILE, "columns": 384}
        for kernel in (kernels.gelu_backward, kernels.column_sums):
            for tokens in ("bf16", "fp16", "fp32"):
                compiled = compile_kernel(kernel, tile, 90, tokens=tokens, num_warps=4)
                assert stack_bytes(compiled) == 0
                assert "v4.b32" in compiled.asm["ptx"]
        # A sum over threads in every turn of the loop would cost more than memory does.
        loop = compiled_loop(compile_kernel(kernels.gelu_backward, tile, 90, num_warps=4))
        assert "tt.store" in loop
        assert "tt.reduce" not in loop
        assert "convert_layout" not in loop

    def compiled_loop(compiled: Any) -> str:
        code = compiled.asm["ttgir"]
        return code[code.index("scf.for") : code.index("scf.yield")]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
    def test_keeps_tokens_and_what_the_activation_takes():
        kept = []
        given = make("cuda", (4, 64, 32), 128, 32, autocast=torch.bfloat16, cast=True)
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = mlp(**given)
        assert in_one_node(*given.values())
        assert sorted(t.numel() for t in kept) == sorted(
            [given["x"].numel(), 4 * 64 * 128, given["weight1"].numel(), given["weight2"].numel()]
        )
        y.sum().backward()
        assert all(t.grad is not None for t in given.values())

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_large_maps_are_the_same_in_every_run(backend):
        if reason := refusals("cuda", torch.bfloat16, "mlp")[backend]:
            pytest.skip(reason)
        kernels = implementation(backend, "mlp")
        gelu_gradient, sum_columns = kernels.gelu_gradient, kernels.sum_columns
        torch.manual_seed(0)
        h = torch.randn(401408, 384, device="cuda", dtype=torch.bfloat16)
        g = torch.randn_like(h)
        found, y, total = gelu_gradient(h, g.clone(), True, True)
        wanted = torch.ops.aten.gelu_backward(g, h)
        assert y is not None
        assert total is not None
        # The error functions differ in their last digits, and so a few roundings.
        assert float((y != F.gelu(h)).float().mean()) < 2e-2
        torch.testing.assert_close(y, F.gelu(h), rtol=8e-3, atol=4e-6)
        torch.testing.assert_close(found, wanted, rtol=8e-3, atol=4e-6)
        for sums, x in ((total, wanted), (sum_columns(found), found)):
            assert float((sums.double() - x.double().sum(0)).norm() / x.double().sum(0).norm()) < 5e-3
        for _ in range(3):
            again = gelu_gradient(h, g.clone(), True, True)
            assert all(torch.equal(a, b) for a, b in zip(again, (found, y, total), strict=True))  # pyright: ignore[reportArgumentType]

"""The fused addition and norm against the same in float64, on every backend that runs here."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mamba_zoo.kernels import add_norm, refusals

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CASES = [
    {"shape": (2, 5, 7, 96)},
    {"shape": (3, 4, 1), "kind": "rms"},
    {"shape": (3, 9, 200), "branch": False},
    {"shape": (2, 3, 65), "kind": "rms", "scale": True, "out": torch.bfloat16},
    {"shape": (4, 2, 384), "scale": True, "branch_dtype": torch.bfloat16, "out": torch.bfloat16},
    {"shape": (1, 300, 33), "dtype": torch.float16, "branch_dtype": torch.float16, "bias": False},
    {"shape": (2, 3, 130), "dtype": torch.bfloat16, "branch_dtype": torch.bfloat16, "scale": True, "strided": True},
    {"shape": (2, 3, 2500), "dtype": torch.bfloat16, "branch_dtype": torch.float32},
    {"shape": (2, 5, 64), "dtype": torch.bfloat16, "branch_dtype": torch.float16, "out": torch.bfloat16},
    {"shape": (2, 40, 1023), "dtype": torch.bfloat16, "scale": True},
    {"shape": (1, 3, 5001), "kind": "rms", "scale": True, "branch_dtype": torch.float16},
    {"shape": (2, 3, 40), "dtype": torch.bfloat16, "weight_dtype": torch.float16},  # and a bias that it cannot hold
]


def check(device, backend, shape, kind="layer", branch=True, scale=False, bias=True, strided=False, **dtypes):
    torch.manual_seed(0)
    dtype = dtypes.get("dtype", torch.float32)
    branch_dtype = dtypes.get("branch_dtype", dtype)
    d = shape[-1]

    def make(*size, dtype=torch.float32):
        x = torch.randn(*size[:-1], 2 * size[-1])[..., ::2] if strided else torch.randn(size)
        return x.to(device, dtype).requires_grad_()

    weight_dtype = dtypes.get("weight_dtype", torch.float32)
    given: dict[str, Any] = {"x": make(*shape, dtype=dtype), "weight": make(d, dtype=weight_dtype)}
    if kind == "layer" and bias:
        given["bias"] = make(d)
        if weight_dtype == torch.float16:
            given["bias"].data[0] = 1e5
    if branch:
        given["branch"] = make(*shape, dtype=branch_dtype)
    factor = torch.tensor([0.0, 2.0, 1.5, 1.0], device=device)[: shape[0]] if scale else None
    stream, y = add_norm(**given, scale=factor, kind=kind, out_dtype=dtypes.get("out"), backend=backend)
    wide = torch.promote_types(dtype, branch_dtype) if branch else dtype
    assert (stream.dtype, y.dtype) == (wide, dtypes.get("out") or wide)

    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    expected = exact["x"]
    if branch:
        drop = 1.0 if factor is None else factor.double().view(-1, *[1] * (len(shape) - 1))
        expected = expected + drop * exact["branch"]
    rounded = expected + (stream.double() - expected).detach()  # the norm sees the stream as it is stored
    if kind == "rms":
        normed = F.rms_norm(rounded, (d,), exact["weight"], 1e-5)
    else:
        normed = F.layer_norm(rounded, (d,), exact["weight"], exact.get("bias"), 1e-5)
    seeds = [torch.randn_like(t) for t in (stream, y)]
    ours = torch.autograd.grad([stream, y], list(given.values()), seeds)
    theirs = torch.autograd.grad([expected, normed], list(exact.values()), [s.double() for s in seeds])
    results = [("stream", stream, expected, wide), ("y", y, normed, y.dtype)]
    results += [(f"d{n}", a, b, given[n].dtype) for n, a, b in zip(given, ours, theirs, strict=True)]
    for name, a, b, kept in results:
        assert a.dtype == kept, name
        coarsest = max((kept, wide, y.dtype), key=lambda t: TOLERANCE[t])
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-9)
        assert error < TOLERANCE[coarsest], f"{name} is off by {error:.1e}"


if INTERPRETED:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_interpreted(case):
        check("cpu", "triton", **case)

    def test_second_gradients_are_refused():
        x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
        _, y = add_norm(x, weight, kind="rms", backend="triton")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.square().sum().backward()

else:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_float64(case, device):
        check(device, "auto", **case)
        check(device, "reference", **case)
        if device.type == "cuda" and refusals("cuda", op="add_norm")["triton"] is None:
            check(device, "triton", **case)

    def test_only_the_stream_or_only_the_norm_is_used(device):
        for used in (0, 1):
            x, branch, weight = (torch.randn(2, 3, 8, device=device).requires_grad_() for _ in range(3))
            weight = weight[0, 0].detach().requires_grad_()
            grads = torch.autograd.grad(add_norm(x, weight, branch=branch)[used].sum(), [x, branch], allow_unused=True)
            assert all(g is not None and g.isfinite().all() for g in grads)

    def test_bad_arguments_are_named():
        x, weight = torch.randn(2, 3, 8), torch.ones(8)
        with pytest.raises(ValueError, match="weight has shape"):
            add_norm(x, torch.ones(7))
        with pytest.raises(ValueError, match="bias"):
            add_norm(x, weight, bias=weight, kind="rms")
        with pytest.raises(ValueError, match="kind='batch'"):
            add_norm(x, weight, kind="batch")
        with pytest.raises(ValueError, match="branch has shape"):
            add_norm(x, weight, branch=x[:1])
        with pytest.raises(ValueError, match="scale"):
            add_norm(x, weight, scale=torch.ones(2))
        with pytest.raises(ValueError, match="backend='cpu' is unknown"):
            add_norm(x, weight, backend="cpu")
        with pytest.raises(ValueError, match="runs on NVIDIA GPUs, not on cpu"):
            add_norm(x, weight, backend="cuda")

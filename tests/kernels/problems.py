"""Random problems for the kernels, their float64 answers, and how close each dtype must come."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_zoo.kernels import refusals, selective_scan

# Relative error ‖ours - exact‖ / ‖exact‖ of what is stored in that dtype. Both sides get the same rounded inputs, so
# this is the rounding of the result (half a unit in the last place) plus float32 arithmetic.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def backend_params() -> list[Any]:
    """`(backend, device)` pairs for parametrisation; those this machine cannot run are skipped with their reason."""
    pairs = [("reference", "cpu"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")]
    if INTERPRETED:
        pairs = [("triton", "cpu")]
    params = []
    for backend, device in pairs:
        marks = []
        if device == "cuda":
            marks.append(pytest.mark.gpu)
            if not torch.cuda.is_available():
                marks.append(pytest.mark.skip(reason="this machine has no CUDA device"))
            elif reason := refusals(device)[backend]:
                marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param((backend, device), marks=marks, id=f"{backend}-{device}"))
    return params


def random_order(k: int, l: int, m: int | None = None, b: int | None = None, empty: int = 0) -> Tensor:
    """`(k, m)` or `(b, k, m)` random visits of `m` of `l` tokens, `empty` of whose steps are -1."""
    rows = []
    for _ in range(k * (b or 1)):
        row = torch.randperm(l)[: l if m is None else m]
        row[torch.randperm(len(row))[:empty]] = -1
        rows.append(row)
    order = torch.stack(rows)
    return order if b is None else order.view(b, k, -1)


def make_problem(
    b: int = 2,
    l: int = 33,
    k: int = 2,
    d: int = 5,
    n: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    order: Tensor | str | None = "random",
    u_per_direction: bool = False,
    z: str | None = "shared",
    bias: bool = True,
    skip: bool = True,
    softplus: bool = True,
    state: bool = False,
    sequences: tuple[int, ...] = (),
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `selective_scan`, random and alive: decays neither vanish nor saturate."""
    l = sum(sequences) or l

    def tokens(*shape: int, scale: float = 1.0) -> Tensor:
        if not strided:
            return (scale * torch.randn(shape)).to(device, dtype)
        wide = (scale * torch.randn(*shape[:-1], 2 * shape[-1] + 1)).to(device, dtype)
        return wide[..., shape[-1] :][..., : shape[-1]]

    def exact(x: Tensor) -> Tensor:
        return x.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

    problem: dict[str, Any] = {
        "u": tokens(b, l, k, d) if u_per_direction else tokens(b, l, d),
        "dt": tokens(b, l, k, d, scale=0.5),
        "A": exact(-torch.rand(k, d, n) - 0.1),
        "B": tokens(b, l, k, n),
        "C": tokens(b, l, k, n),
        "dt_softplus": softplus,
        **options,
    }
    if not softplus:
        problem["dt"] = (0.05 + 0.4 * torch.rand(b, l, k, d)).to(device, dtype)
    if bias:
        problem["dt_bias"] = exact(torch.randn(k, d) - (1 if softplus else -0.5)).abs() * (-1 if softplus else 0.1)
    if skip:
        problem["D"] = exact(torch.randn(k, d))
    if z:
        problem["z"] = tokens(b, l, d) if z == "shared" else tokens(b, l, k, d)
    if isinstance(order, Tensor):
        problem["order"] = order.to(device)
    elif order == "random":
        problem["order"] = random_order(k, l).to(device)
    rows = b
    if sequences:
        problem["cu_seqlens"] = torch.tensor([0, *torch.tensor(sequences).cumsum(0).tolist()], device=device)
        rows = len(sequences)
    if state:
        problem["initial_state"] = exact(torch.randn(rows, k, d, n))
        problem["return_final_state"] = True
    return problem


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """‖ours - exact‖ / ‖exact‖ in float64; infinite if anything is not finite."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-30))


def solve(problem: dict[str, Any], seeds: list[Tensor] | None = None, **changes: Any) -> tuple[dict, list[Tensor]]:
    """Outputs and the gradient of every float input, by name, for random output gradients `seeds`."""
    leaves = {
        key: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in problem.items()
    }
    result = selective_scan(**{**leaves, **changes})
    outputs = list(result) if isinstance(result, tuple) else [result]
    if seeds is None:
        seeds = [torch.randn(o.shape).to(o) for o in outputs]
    inputs = {key: value for key, value in leaves.items() if isinstance(value, Tensor) and value.requires_grad}
    grads = torch.autograd.grad(outputs, list(inputs.values()), [g.to(o) for g, o in zip(seeds, outputs, strict=True)])
    found = dict(zip(("y", "final_state"), outputs, strict=False))
    found |= {f"gradient of {key}": g for key, g in zip(inputs, grads, strict=True)}
    return found, seeds


def exact_answer(problem: dict[str, Any], seeds: list[Tensor]) -> dict[str, Tensor]:
    """The same in float64 on the CPU by the reference, whose gradient is checked numerically on its own."""
    as64 = {
        key: value.double().cpu()
        if isinstance(value, Tensor) and value.is_floating_point()
        else (value.cpu() if isinstance(value, Tensor) else value)
        for key, value in problem.items()
        if key != "out_dtype"
    }
    return solve(as64, [g.double().cpu() for g in seeds], backend="reference")[0]


def assert_agrees(problem: dict[str, Any], backend: str) -> None:
    """`backend` agrees with float64 on every output and every gradient, within the dtype's tolerance."""
    found, seeds = solve(problem, backend=backend)
    wanted = exact_answer(problem, seeds)
    wrong = {}
    for name, ours in found.items():
        # A sum over directions of values that are each rounded may lose a bit more than one rounding.
        limit = TOLERANCE[ours.dtype]
        if (error := relative_error(ours, wanted[name])) > limit:
            wrong[name] = f"{error:.2e} > {limit:.0e}"
    assert not wrong, wrong

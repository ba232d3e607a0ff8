"""The kernels that would run here, held against float64: values, gradients, and how long the first call takes."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_zoo import kernels
from mamba_zoo.kernels import BACKENDS, refusals

from .environment import describe

# Largest relative error (in the 2-norm) of values and gradients: the rounding of the result, plus float32 arithmetic.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Check:
    """One op on one device and dtype.

    Attributes:
        op: Name in `mamba_zoo.kernels`.
        device: "cpu" or "cuda".
        dtype: Such as "float32".
        backend: The one that runs.
        refused: The faster ones, with the reason each cannot run.
        error: Largest relative error of value and gradients against float64; None if the op failed or is not finite.
        allowed: Largest error that passes.
        first_seconds: First call, forward and backward, compilation or reading of the cache included.
        next_seconds: The same call again.
        problem: Why the check failed; "" if it passed.
    """

    op: str
    device: str
    dtype: str
    backend: str
    refused: dict[str, str]
    error: float | None
    allowed: float
    first_seconds: float
    next_seconds: float
    problem: str

    @property
    def passed(self) -> bool:
        """Whether the kernel runs and is right."""
        return not self.problem


def check_kernels(device_types: list[str] | None = None) -> Iterator[Check]:
    """Run every op on every device of this machine, in each dtype, one check at a time."""
    found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in device_types or found:
        for op, case in _CASES.items():
            for dtype in TOLERANCE:
                yield _check(op, case, device, dtype)


def _check(op: str, case: Callable[[], dict], device: str, dtype: torch.dtype) -> Check:
    try:
        reasons = refusals(device, dtype, op)
    except Exception as error:
        reasons = {name: describe(error) if name != "reference" else None for name in BACKENDS}
    backend = next(name for name, why in reasons.items() if why is None and (name, device) != ("triton", "cpu"))
    faster = BACKENDS[: BACKENDS.index(backend)]
    refused = {name: why for name in faster if (why := reasons[name]) is not None}
    allowed, first, again, error, problem = TOLERANCE[dtype], 0.0, 0.0, None, ""
    try:
        inputs = {k: v.to(dtype).to(device) if _is_token(v) else _to(v, device) for k, v in case().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, first = _timed(op, inputs, backend, device)
            _, again = _timed(op, inputs, backend, device)
            exact = {k: _to(v.double() if _is_float(v) else v, "cpu") for k, v in inputs.items()}
            want, _ = _timed(op, exact, "reference", "cpu")
        errors = {name: _relative(got[name], want[name]) for name in want}
        worst = max(errors, key=errors.__getitem__)
        if bad := [name for name, value in errors.items() if not math.isfinite(value)]:
            problem = f"{bad[0]} is not finite"
        elif (error := errors[worst]) > allowed:
            problem = f"{worst} is off by {error:.1e}, more than the {allowed:.0e} allowed"
    except Exception as failure:
        problem = describe(failure)
    return Check(op, device, str(dtype).removeprefix("torch."), backend, refused, error, allowed, first, again, problem)


def _timed(op: str, inputs: dict, backend: str, device: str) -> tuple[dict[str, Tensor], float]:
    """Output and gradients of an op by name, and seconds."""
    given = {k: v.detach().clone().requires_grad_() if _is_float(v) else v for k, v in inputs.items()}
    _wait(device)
    started = time.perf_counter()
    y = getattr(kernels, op)(**given, backend=backend)
    y = torch.cat([part.flatten() for part in y]) if isinstance(y, tuple) else y
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y).sin().to(y.dtype)
    leaves = {k: v for k, v in given.items() if _is_float(v)}
    grads = torch.autograd.grad(y, list(leaves.values()), weight)
    _wait(device)
    seconds = time.perf_counter() - started
    named = {f"the gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {"the value": y.detach(), **named}, seconds


def _scan_case() -> dict:
    b, l, k, d, n = 2, 67, 2, 24, 4
    draw = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(l, generator=draw) for _ in range(k)])
    return {
        "u": torch.randn(b, l, d, generator=draw),
        "dt": torch.randn(b, l, k, d, generator=draw) - 1,
        "A": -torch.rand(k, d, n, generator=draw) - 0.2,
        "B": torch.randn(b, l, k, n, generator=draw),
        "C": torch.randn(b, l, k, n, generator=draw),
        "D": torch.randn(k, d, generator=draw),
        "order": order,
        "dt_bias": torch.randn(k, d, generator=draw) * 0.1,
        "dt_softplus": True,
    }


def _conv_case() -> dict:
    b, l, k, d, w = 2, 67, 2, 24, 4
    draw = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(l, generator=draw) for _ in range(k)])
    return {
        "x": torch.randn(b, l, d, generator=draw),
        "weight": torch.randn(k, d, w, generator=draw) * 0.5,
        "bias": torch.randn(k, d, generator=draw) * 0.1,
        "order": order,
        "activation": "silu",
    }


def _dual_case() -> dict:
    b, l, k, h, p, g, n = 2, 67, 2, 4, 16, 2, 16
    draw = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(l, generator=draw) for _ in range(k)])
    return {
        "x": torch.randn(b, l, h, p, generator=draw),
        "dt": torch.randn(b, l, k, h, generator=draw) - 1,
        "A": -torch.rand(k, h, generator=draw) - 0.2,
        "B": torch.randn(b, l, k, g, n, generator=draw),
        "C": torch.randn(b, l, k, g, n, generator=draw),
        "D": torch.randn(k, h, generator=draw),
        "order": order,
        "dt_bias": torch.randn(k, h, generator=draw) * 0.1,
        "dt_softplus": True,
    }


def _norm_case() -> dict:
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 67, 24, generator=draw),
        "weight": 1 + 0.1 * torch.randn(24, generator=draw),
        "bias": 0.1 * torch.randn(24, generator=draw),
        "branch": torch.randn(2, 67, 24, generator=draw),
    }


def _map_case() -> dict:
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 67, 5, 24, generator=draw),
        "weight": 0.5 * torch.randn(24, 1, 3, 3, generator=draw),
        "bias": 0.1 * torch.randn(24, generator=draw),
        "activation": "silu",
    }


_CASES: dict[str, Callable[[], dict]] = {
    "selective_scan": _scan_case,
    "causal_conv1d": _conv_case,
    "ssd": _dual_case,
    "add_norm": _norm_case,
    "depthwise_conv2d": _map_case,
}


def unchecked() -> list[str]:
    """Public ops that take a `backend` but have no check here."""
    ops = [name for name in kernels.__all__ if callable(getattr(kernels, name, None)) and name not in _CASES]
    return [name for name in ops if "backend" in inspect.signature(getattr(kernels, name)).parameters and name != "use"]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_token(value: Any) -> bool:
    """Per-token tensors follow the tested dtype; parameters stay float32."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == (2, 67)


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _relative(got: Tensor, want: Tensor) -> float:
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

"""Which implementation of an op runs, and why the faster ones were refused.

A backend is a folder `kernels/_<name>/` with `refuse()` in its `__init__` and one file per op. It is imported on first
use, so a machine without CUDA, Triton or numba imports none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import torch

# Fastest first. `reference` runs on every device and dtype, so a choice always exists.
BACKENDS = ("cuda", "triton", "cpu", "reference")
_override: list[str] = []


def refusals(
    device: torch.device | str, dtype: torch.dtype = torch.float32, op: str = "selective_scan"
) -> dict[str, str | None]:
    """For every backend, fastest first: None if it can serve `dtype` on `device`, else the reason it cannot."""
    kind = torch.device(device).type
    return {name: _refuse(name, kind, dtype, op) for name in BACKENDS}


def choose(requested: str, device: torch.device, dtype: torch.dtype, op: str = "selective_scan") -> str:
    """The backend that will run: the fastest that has `op` and serves `device` and `dtype`, unless one is `requested`.

    Within `use(name)` that is `name` for the ops that it has, and the fastest for the others.

    Raises:
        ValueError: `requested` is unknown, does not have the op, or cannot serve this device and dtype.
    """
    name = requested
    if name == "auto" and _override and _has(_override[-1], op):
        name = _override[-1]
    if name == "auto":
        return _fastest(device.type, dtype, op)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose 'auto' or one of {', '.join(BACKENDS)}")
    if not _has(name, op):
        raise ValueError(f"backend={name!r} has no {op}; use backend='auto'")
    if reason := _package(name).refuse(device.type, dtype):
        raise ValueError(f"backend={name!r} cannot run here: {reason}; use backend='auto'")
    return name


# torch.compile takes the choice as a constant. This is what torch.compiler.assume_constant_result sets; calling that
# would import the whole of dynamo along with mamba_zoo.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def gpu_backend(dtype: torch.dtype, op: str) -> str:
    """Whose kernels an op takes on a GPU that is plain torch without them: "reference", and no warning, without any.

    Within `use(name)` that is `name` if it has the op and serves it.
    """
    if _override and _has(_override[-1], op):
        return _override[-1] if serves(_override[-1], "cuda", dtype, op) else "reference"
    return next((name for name in ("cuda", "triton") if serves(name, "cuda", dtype, op)), "reference")


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, every op called with `backend="auto"` uses `backend`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    _override.append(backend)
    try:
        yield
    finally:
        _override.pop()


@lru_cache(maxsize=64)
def implementation(backend: str, op: str) -> ModuleType:
    """The module `kernels._<backend>.<op>`."""
    return importlib.import_module(f"mamba_zoo.kernels._{backend}.{op}")


@lru_cache(maxsize=8)
def _package(name: str) -> ModuleType:
    return importlib.import_module(f"mamba_zoo.kernels._{name}")


@lru_cache(maxsize=64)  # asking takes longer than a small kernel
def serves(name: str, kind: str, dtype: torch.dtype, op: str) -> bool:
    """Whether the backend `name` has `op` and runs it on devices of this kind."""
    return _refuse(name, kind, dtype, op) is None


def _refuse(name: str, kind: str, dtype: torch.dtype, op: str) -> str | None:
    return _package(name).refuse(kind, dtype) if _has(name, op) else f"it has no {op}"


@lru_cache(maxsize=64)
def _has(backend: str, op: str) -> bool:
    return backend == "reference" or importlib.util.find_spec(f"mamba_zoo.kernels._{backend}.{op}") is not None


@lru_cache(maxsize=64)
def _fastest(kind: str, dtype: torch.dtype, op: str) -> str:
    refused, name = {}, "reference"
    for name in BACKENDS:
        reason = _refuse(name, kind, dtype, op)
        if reason is None and (name, kind) != ("triton", "cpu"):  # its interpreter is only for whoever asks for it
            break
        refused[name] = reason
    if name == "reference" and dtype != torch.float64 and kind in ("cpu", "cuda"):
        why = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
        warnings.warn(f"mamba_zoo runs its slow reference kernels on {kind} ({why})", stacklevel=3)
    return name

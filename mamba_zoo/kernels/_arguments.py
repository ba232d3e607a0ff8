"""What every op asks of its arguments before it looks at their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that kernels read, and that autocast casts


def check_tensors(*given: tuple[str, Any, bool]) -> None:
    """Raise unless all are tensors on one device: a kernel would read an address of another device.

    Args:
        given: Names, values, and whether they may be None; the first is where the others must be.

    Raises:
        TypeError: no tensor.
        ValueError: another device.
    """
    device = None
    for name, value, optional in given:
        if value is None and optional:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
        if device is None:
            device = value.device
        elif value.device != device:
            raise ValueError(f"{name} is on {value.device}, but {given[0][0]} on {device}; move it there")


def check_floating(**dtypes: torch.dtype) -> None:
    """Raise TypeError for a dtype without fractions: what is computed would be cut off when it is stored."""
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating-point dtype, not {dtype}; convert it with .float()")


def autocast(tokens: Tensor, *others: Tensor | None) -> list[Any]:
    """All of them in the autocast dtype, if autocast is on for the device of the tokens, which are not float64."""
    given: list[Any] = [tokens, *others]
    kind = tokens.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tokens.dtype == torch.float64:
        return given
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None else x.to(dtype) for x in given]


def asked_for(tokens: torch.dtype, *others: Tensor | torch.dtype | None) -> torch.dtype:
    """The dtype that a backend has to serve: that of the tokens, unless an argument has one that no kernel reads."""
    for x in others:
        dtype = x.dtype if isinstance(x, Tensor) else x
        if dtype is not None and dtype not in DTYPES:
            return dtype
    return tokens


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Any:
    """`x` in one piece; asking takes a fifth of the time of a copy that is not needed."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, likewise."""
    return x if x.dtype == dtype else x.to(dtype)


def as_exact(name: str, value: Tensor, exact: torch.dtype) -> Tensor:
    """`value` in the dtype of states, which is not asked for again if it has it."""
    if value.dtype == exact:
        return value
    check_floating(**{name: value.dtype})
    return value.to(exact)

"""Tensors as the compiled loops take them: float32, addresses, strides in bytes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def token_rows(x: Tensor) -> Tensor:
    """`x` in float32, each token's channels next to each other; copied only if it is not so already."""
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def plain(x: Tensor | None) -> Tensor | None:
    """`x` in float32, contiguous."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def address(x: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if x is None else x.data_ptr()


def rows(name: str, x: Tensor | None) -> dict[str, int]:
    """Address and strides in bytes of float32 `(b, l, c)` or `(b, l, k, c)`; without directions their stride is 0."""
    if x is None:
        return dict.fromkeys(_fields(name), 0)
    b, l, *k = x.stride()
    return dict(zip(_fields(name), (x.data_ptr(), 4 * b, 4 * l, 4 * k[0] if len(k) == 2 else 0), strict=True))


@cache
def _fields(name: str) -> tuple[str, ...]:
    return name, f"{name}_b", f"{name}_l", f"{name}_k"


@cache
def zero_row(n: int) -> Tensor:
    """`n` float32 zeros, to read and never to write: B and C of an empty step."""
    return torch.zeros(n)


def visits(order: Tensor) -> dict[str, int]:
    """Address and strides in bytes of a table `(1 | b, k, m)`, whose rows may be one row expanded."""
    b, k, _ = order.stride()
    return {"order": order.data_ptr(), "order_b": 0 if len(order) == 1 else 4 * b, "order_k": 4 * k}


def new(shape: tuple[int, ...], complete: bool) -> Tensor:
    """A float32 tensor: uninitialised if every token will be written, else zeros."""
    return torch.empty(shape) if complete else torch.zeros(shape)

"""Tensors as the kernels see them: addresses, strides in bytes, and which can be read as they lie."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def address(x: Tensor | None) -> int:
    """Of the first element; 0 if there is no tensor."""
    return 0 if x is None else x.data_ptr()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Bytes from sample to sample, token to token and direction to direction."""
    if x is None:
        return 0, 0, 0
    size = x.element_size()
    sample, token, *direction = x.stride()[:-1]
    return sample * size, token * size, direction[0] * size if direction else 0


def aligned(x: Tensor, width: int) -> bool:
    """Whether any `width` neighbours that start at a multiple of `width` can be read at once, 16 bytes at a time."""
    size = x.element_size()
    step = min(16, width * size)
    return x.data_ptr() % step == 0 and all(stride * size % step == 0 for stride in x.stride()[:-1])


def unreadable(given: tuple[Tensor | None, ...], rows: Collection[int]) -> list[int]:
    """Places of the tensors that need a copy: `rows` of tokens or steps may be strided, others are contiguous."""
    return [
        place
        for place, x in enumerate(given)
        if x is not None and not x.is_contiguous()
        if place not in rows or (x.stride(-1) != 1 and x.shape[-1] != 1)
    ]


def readable(given: tuple[Tensor | None, ...], copied: Collection[int]) -> tuple[Tensor | None, ...]:
    """The tensors, those at the places `copied` as contiguous copies."""
    return tuple(x.contiguous() if x is not None and i in copied else x for i, x in enumerate(given))

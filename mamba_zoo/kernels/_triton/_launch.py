"""What the launches of every op share: the device, widths that loads may assume, and 64-bit offsets."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """Run `programs` programs on the device of `like`, which need not be the current one, where Triton launches."""
    if programs == 0:
        return
    on_cpu = like.device.type == "cpu"
    with contextlib.nullcontext() if on_cpu else torch.get_device_module(like.device).device(like.device):
        kernel[(programs,)](*args, **constants)


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor, per: int = 1) -> tuple[int, int, int]:
    """Strides of samples, tokens and directions in units of `per` elements; 0 for a tensor the directions share."""
    return x.stride(0) // per, x.stride(1) // per, x.stride(2) // per if x.dim() == 4 else 0


def common_width(tensors: list[Tensor | None], *sizes: int) -> int:
    """How many elements loads may take at once: the largest power of two, up to 16 bytes, that divides every stride,
    size and address.
    """
    width = 8
    for x in tensors:
        if x is None:
            continue
        width = min(width, 16 // x.element_size())
        whole = [x.data_ptr() // x.element_size(), *(s for s in x.stride()[:-1])]
        while any(value % width for value in whole):
            width //= 2
    while any(size % width for size in sizes):
        width //= 2
    return width


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether the offset of some row within its sample does not fit 32 bits."""
    return any(
        x is not None and sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in tensors
    )


def stored_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """What kernels write for results of `dtype` (that of `x` by default).

    The same, but for the interpreter: it truncates to bfloat16 instead of rounding, so there torch rounds afterwards.
    """
    dtype = x.dtype if dtype is None else dtype
    return torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype

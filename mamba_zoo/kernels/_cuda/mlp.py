"""What the MLP's backward pass needs between its products, on NVIDIA GPUs: arguments packed for mlp.cu."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from . import nvrtc
from ._rows import columns_launch, mlp_source, sum_parts, width_of
from ._tensors import address

_ARGS = struct.Struct("4Qq4i")  # Args of mlp.cu
_THREADS = 128


def gelu_gradient(h: Tensor, g: Tensor, again: bool, bias: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the backward pass needs of the GELU of `h`, in one pass over memory.

    Args:
        h: `(rows, columns)`, contiguous.
        g: The gradient of `gelu(h)`, contiguous, of the same dtype; overwritten.
        again: Whether to compute `gelu(h)`.
        bias: Whether to sum the gradient of `h` over rows.

    Returns:
        The gradient of `h`; `gelu(h)` or None; the sums `(columns,)` or None.
    """
    y = torch.empty_like(h) if again else None
    return g, y, _walk("gelu_backward", h, g, y, bias)


def sum_columns(x: Tensor) -> Tensor:
    """Sums `(columns,)` of a contiguous `(rows, columns)`, added in float32, in its dtype."""
    return _walk("column_sums", x, None, None, True)


def _walk(name: str, x: Tensor, g: Tensor | None, y: Tensor | None, summed: bool) -> Any:
    rows, columns = x.shape
    launch = columns_launch(rows, columns, width_of(columns, x.element_size(), x, g))
    source = mlp_source(x.dtype, launch.width)
    partial = x.new_empty((launch.parts, columns), dtype=torch.float32) if summed else None
    sizes = (rows, columns, launch.lanes, launch.parts, launch.blocks)
    arguments = _ARGS.pack(x.data_ptr(), address(g), address(y), address(partial), *sizes)
    nvrtc.load(source, name, x.get_device()).launch(launch.parts * launch.blocks, _THREADS, arguments)
    return None if partial is None else sum_parts(source, partial, columns, x.dtype)

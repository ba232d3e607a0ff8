"""Addition and norm on NVIDIA GPUs: arguments packed for the kernels of norm.cu (see docs/kernels.md)."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .._plans import Plans
from . import nvrtc
from ._rows import code, norm_launch, norm_source, sum_parts, width_of
from ._tensors import address

# Args of norm.cu in two parts.
_ADDRESSES = struct.Struct("13Q")
_SIZES = struct.Struct("2q7if")
_WHOLE = 256  # threads of the kernels for one wide row each


class _Plan(NamedTuple):
    """What shapes, dtypes and alignment decide, worked out once for all calls that share them."""

    source: str
    kernel: nvrtc.Kernel
    blocks: int
    threads: int
    sizes: bytes
    rows: int
    parts: int
    along: nvrtc.Kernel | None  # for the sums over rows too wide for a block


_plans: Plans[_Plan] = Plans()


def forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream, the normed tokens, and what the gradient needs of each row; all tensors are contiguous."""
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    branch_dtype = x.dtype if branch is None else branch.dtype
    low = (x.data_ptr() & 15, address(branch) & 15)  # apart, as their dtypes may differ
    key = (x.shape, low, x.dtype, branch_dtype, out_dtype, weight.dtype, code(scale), rms, eps, x.get_device())
    plan = _plans.get(key)
    if plan is None:
        dtypes = (x.dtype, branch_dtype, out_dtype, weight.dtype)
        plan = _plans.keep(key, _planned(x, dtypes, (x, branch), scale, rms, eps))
    y = torch.empty_like(x, dtype=out_dtype)
    stream = x if branch is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch_dtype))
    statistics = x.new_empty((2, plan.rows), dtype=torch.float32)
    addresses = _ADDRESSES.pack(
        x.data_ptr(), address(branch), 0, 0, 0, address(scale), weight.data_ptr(), address(bias),
        statistics.data_ptr(), 0, y.data_ptr(), stream.data_ptr(), 0,
    )  # fmt: skip
    if plan.rows:
        plan.kernel.launch(plan.blocks, plan.threads, addresses + plan.sizes)
    return stream, y, statistics


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    rms: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of x, branch (None without one, or if it is that of x), weight and bias; all tensors contiguous."""
    d = stream.shape[-1]
    low = ((stream.data_ptr() | address(dstream)) & 15, dy.data_ptr() & 15)
    dtypes = (x_dtype, branch_dtype or x_dtype, dy.dtype, weight.dtype)
    key = (stream.shape, low, dtypes, code(scale), rms, stream.get_device())
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _planned(stream, dtypes, (stream, dy, dstream), scale, rms, None))
    dx = torch.empty_like(stream, dtype=x_dtype)
    apart = branch_dtype is not None and (branch_dtype != x_dtype or scale is not None)
    dbranch = torch.empty_like(stream, dtype=branch_dtype) if apart else None
    partial = stream.new_empty((plan.parts, 2 * d), dtype=torch.float32)
    along = None if plan.along is None else torch.empty_like(statistics)
    arguments = _ADDRESSES.pack(
        0, 0, dy.data_ptr(), address(dstream), stream.data_ptr(), address(scale), weight.data_ptr(), 0,
        statistics.data_ptr(), address(along), dx.data_ptr(), address(dbranch), partial.data_ptr(),
    ) + plan.sizes  # fmt: skip
    if plan.along is not None:
        plan.along.launch(plan.rows, _WHOLE, arguments)
    plan.kernel.launch(plan.blocks, plan.threads, arguments)
    if bias_dtype in (None, weight.dtype):
        total = sum_parts(plan.source, partial, d if bias_dtype is None else 2 * d, weight.dtype)
        return dx, dbranch, total[:d], None if bias_dtype is None else total[d:]
    total = sum_parts(plan.source, partial, 2 * d, torch.float32)
    return dx, dbranch, total[:d].to(weight.dtype), total[d:].to(bias_dtype)


def _planned(
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    given: tuple[Tensor | None, ...],
    scale: Tensor | None,
    rms: bool,
    eps: float | None,
) -> _Plan:
    """The plan of the forward pass, or without `eps` of the backward pass, for rows `given` of which some have the
    first three `dtypes`, and the stream the wider one of the first two.
    """
    d, device = x.shape[-1], x.get_device()
    stream = torch.promote_types(dtypes[0], dtypes[1])
    width = width_of(d, max(t.itemsize for t in (stream, *dtypes[:3])), *given)
    rows = x.numel() // d if d else 0
    backward = eps is None
    launch = norm_launch(rows, d, width, backward)
    wide = launch.slices > 1
    source = norm_source(backward, *dtypes, width, wide)
    name = f"norm_{'backward' if backward else 'forward'}_{'wide' if wide and not backward else launch.packs}"
    blocks, threads = launch.parts * launch.slices, launch.threads
    if wide and not backward:
        blocks, threads = rows, _WHOLE
    sizes = _SIZES.pack(
        rows, max(1, rows // max(1, x.shape[0])), d, launch.lanes, launch.threads, launch.parts, launch.slices, rms,
        code(scale), eps or 0.0,
    )  # fmt: skip
    along = nvrtc.load(source, "norm_backward_along", device) if wide and backward else None
    return _Plan(source, nvrtc.load(source, name, device), blocks, threads, sizes, rows, launch.parts, along)

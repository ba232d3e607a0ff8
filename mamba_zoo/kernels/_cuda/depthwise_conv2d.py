"""The depthwise convolution of maps on NVIDIA GPUs: arguments packed for map_conv.cu (see docs/kernels.md)."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._plans import Plans
from . import nvrtc
from ._plan import FORMATS, text_of
from ._rows import code, sum_parts
from ._tensors import address

_ARGS = struct.Struct("6Q6q13i0q")  # Args of map_conv.cu
_PROCESSORS = 132  # of a large GPU


class Launch(NamedTuple):
    """How a pass is compiled."""

    size: int  # bytes that a thread reads at once, at most
    strip: int  # S
    threads: int  # of a block
    blocks: int  # of a multiprocessor
    rows: int  # of a window that may be read at once


# By the length of strips, of which the one is taken that leaves fewer positions beyond the end of a row.
FORWARD = {7: Launch(8, 7, 256, 3, 3), 4: Launch(8, 4, 256, 3, 1)}
BACKWARD = {7: Launch(8, 7, 128, 3, 1), 4: Launch(8, 4, 256, 2, 1)}


class _Plan(NamedTuple):
    """What shapes, strides, dtypes and alignment decide, worked out once for all calls that share them."""

    kernel: nvrtc.Kernel
    source: str
    blocks: int
    threads: int
    sizes: tuple[int, ...]  # from x's strides to the slots of a block
    parts: int


_plans: Plans[_Plan] = Plans()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The maps `(b, h, w, d)`; rows of `x` may be strided, weight and bias are contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = _plan(x, None, weight, False)
    _launch(plan, x, None, weight, bias, y, None, silu, flip=False)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, x_wanted: bool, weights_wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; rows of `dy` and `x` may be strided."""
    dweight = dbias = None
    if silu or weights_wanted:
        before = torch.empty(x.shape, dtype=x.dtype, device=x.device) if silu else dy
        plan = _plan(x, dy, weight, True)
        taps, d = weight[0].numel(), x.shape[-1]
        partial = x.new_empty((plan.parts, (taps + 1) * d), dtype=torch.float32)
        _launch(plan, x, dy, weight, bias, before, partial, silu, flip=False)
        if weights_wanted:
            columns = taps * d if bias is None else (taps + 1) * d
            same = bias is None or bias.dtype == weight.dtype
            total = sum_parts(plan.source, partial, columns, weight.dtype if same else torch.float32)
            dweight = total[: taps * d].view(weight.shape).to(weight.dtype)
            dbias = None if bias is None else total[taps * d :].to(bias.dtype)
        dy = before
    if not x_wanted:
        return None, dweight, dbias
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_plan(dy, None, weight, False), dy, None, weight, None, dx, None, False, flip=True)
    return dx, dweight, dbias


def _launch(
    plan: _Plan,
    x: Tensor,
    dy: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    partial: Tensor | None,
    silu: bool,
    flip: bool,
) -> None:
    arguments = _ARGS.pack(
        x.data_ptr(), address(dy), weight.data_ptr(), address(bias), out.data_ptr(), address(partial), *plan.sizes,
        silu, flip, code(weight), code(bias),
    )  # fmt: skip
    plan.kernel.launch(plan.blocks, plan.threads, arguments)


def _plan(x: Tensor, dy: Tensor | None, weight: Tensor, backward: bool) -> _Plan:
    low = (x.data_ptr() | address(dy)) & 15
    key = (
        x.shape, x.stride(), None if dy is None else dy.stride(), low, x.dtype, weight.shape[2:], backward,
        x.get_device(),
    )  # fmt: skip
    plan = _plans.get(key)
    return _plans.keep(key, _planned(x, dy, weight, backward)) if plan is None else plan


def _planned(x: Tensor, dy: Tensor | None, weight: Tensor, backward: bool) -> _Plan:
    b, h, w, d = x.shape
    launches = BACKWARD if backward else FORWARD
    launch = launches[min(launches, key=lambda strip: -(-w // strip) * strip)]
    strides = [0] * 6
    for i, t in enumerate((x, dy)):
        if t is not None:
            strides[3 * i : 3 * i + 3] = [step * t.element_size() for step in t.stride()[:3]]
    width = launch.size // x.element_size()
    while d % width or any(step % (width * x.element_size()) for step in (x.data_ptr(), address(dy), *strides)):
        width //= 2
    packs = -(-d // width)
    # Sums over the rows of a block are exchanges within warps, so lanes are a power of two there.
    lanes = min((32, 16, 8), key=lambda n: (-(-packs // n) * n, -n)) if backward else -(-packs // -(-packs // 32))
    blocks, slots = -(-packs // lanes), launch.threads // lanes
    across = -(-w // launch.strip)
    strips = b * h * across
    parts = max(1, min(_PROCESSORS * launch.blocks // blocks, -(-strips // slots)))
    run = -(-strips // parts)
    parts = -(-strips // run) if run else 0
    source = _source(backward, x.dtype, width, launch, weight.shape[2], weight.shape[3])
    kernel = nvrtc.load(source, "map_conv_backward" if backward else "map_conv", x.get_device())
    sizes = (*strides, h, w, d, strips, across, run, lanes, slots, blocks)
    return _Plan(kernel, source, parts * blocks, launch.threads, sizes, parts)


@lru_cache(maxsize=256)
def _source(backward: bool, dtype: torch.dtype, width: int, launch: Launch, height_taps: int, width_taps: int) -> str:
    """CUDA C++ of a pass over maps of a dtype, for threads of `width` channels."""
    constants = {
        "V": width, "S": launch.strip, "KH": height_taps, "KW": width_taps, "THREADS": launch.threads,
        "BLOCKS": launch.blocks, "ROWS": launch.rows,
    }  # fmt: skip
    lines = [f"#define BACKWARD {int(backward)}", f"typedef {FORMATS[dtype]} In;"]
    lines += [f"constexpr int {name} = {value};" for name, value in constants.items()]
    parts = [text_of("parts")] if backward else []
    return "\n".join([text_of("primitives"), *lines, text_of("rows"), *parts, text_of("map_conv")])

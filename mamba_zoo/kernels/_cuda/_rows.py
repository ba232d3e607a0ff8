"""How the kernels that pass over rows once are launched, and the sum of what their blocks leave."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc
from ._plan import FORMATS, text_of

_PARTS = struct.Struct("2Q4i")  # Parts of parts.cu
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_THREADS = 128  # of a block of several rows
_PROCESSORS = 132  # of a large GPU
# Threads of a multiprocessor that the registers allow, forwards and backwards, by packs a thread.
RESIDENT = {False: {1: 1024, 2: 512, 3: 512}, True: {1: 768, 2: 512}}
_MOST = {1: 256, 2: 512, 3: 128}  # threads of a block, by packs a thread


class Launch(NamedTuple):
    """How the rows of a norm are laid out."""

    width: int  # V
    packs: int  # P
    lanes: int  # threads of a row
    threads: int  # of a block
    parts: int  # blocks, of each slice of channels
    slices: int  # more than one: the row is too wide for a block


@lru_cache(maxsize=4096)
def norm_launch(rows: int, d: int, width: int, backward: bool) -> Launch:
    """Few packs a thread, as it holds three numbers for each channel; no row in two blocks if that can be."""
    needed = max(1, -(-d // width))
    packs = 1 if needed <= 32 or 64 < needed <= _MOST[1] else 2
    if not backward and needed in (12, 24, 48):  # 4 to 16 lanes with three packs each, none of them idle
        packs = 3
    columns = -(-needed // packs)
    lanes = max(4, 1 << (columns - 1).bit_length()) if columns <= 32 else -(-columns // 32) * 32
    slices = 1
    if lanes > _MOST[packs]:
        packs, lanes, slices = 1, _MOST[1], -(-needed // _MOST[1])
    threads = max(_THREADS, lanes) if lanes <= 32 else lanes
    most = max(1, _PROCESSORS * RESIDENT[backward][packs] // threads // slices)
    return Launch(width, packs, lanes, threads, max(1, min(most, -(-rows * lanes // threads))), slices)


class Columns(NamedTuple):
    """How sums over rows are laid out."""

    width: int  # V
    lanes: int  # threads side by side
    blocks: int  # side by side
    parts: int  # of the rows


@lru_cache(maxsize=4096)
def columns_launch(rows: int, columns: int, width: int) -> Columns:
    """As many threads side by side as leave few idle, and as many blocks as are resident, each with rows enough."""
    needed = max(1, -(-columns // width))
    lanes = min((32, 16, 8), key=lambda n: (-(-needed // n) * n, -n))
    blocks = -(-needed // lanes)
    slots = _THREADS // lanes
    most = min(_PROCESSORS * RESIDENT[True][1] // _THREADS // blocks, -(-rows // (4 * slots)))
    return Columns(width, lanes, blocks, max(1, most))


def width_of(d: int, size: int, *tensors: Tensor | None) -> int:
    """How many neighbours all rows `(..., d)` let a thread read at once, up to 16 bytes of the widest, of `size` bytes.

    Those that are not given are new, and begin at a multiple of 16 bytes.
    """
    width = 16 // size
    while d % width or any(x is not None and x.data_ptr() % (width * x.element_size()) for x in tensors):
        width //= 2
    return width


def code(x: Tensor | None) -> int:
    """The number by which kernels know a format at run time."""
    return 0 if x is None else _CODES[x.dtype]


@lru_cache(maxsize=256)
def norm_source(
    backward: bool,
    x: torch.dtype,
    branch: torch.dtype,
    out: torch.dtype,
    weight: torch.dtype,
    width: int,
    wide: bool = False,
) -> str:
    """CUDA C++ of a pass over tokens `x` and `branch`, with normed ones in `out`; `wide` for rows of many blocks."""
    formats = {"X": x, "Branch": branch, "Stream": torch.promote_types(x, branch), "Out": out, "Weight": weight}
    lines = [f"#define BACKWARD {int(backward)}", f"#define WIDE {int(wide)}"]
    lines += [*_typedefs(formats), f"constexpr int V = {width};"]
    parts = [text_of("parts")] if backward else []
    return "\n".join([text_of("primitives"), *lines, text_of("rows"), *parts, text_of("norm")])


@lru_cache(maxsize=64)
def mlp_source(dtype: torch.dtype, width: int) -> str:
    """CUDA C++ of what the MLP needs."""
    lines = [*_typedefs({"In": dtype}), f"constexpr int V = {width};"]
    return "\n".join([text_of("primitives"), *lines, text_of("rows"), text_of("parts"), text_of("mlp")])


def sum_parts(source: str, partial: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The sums `(columns,)` over parts, of the first columns of `partial`, by the kernel that `source` has."""
    parts = partial.shape[0]
    total = partial.new_empty(columns, dtype=dtype)
    kernel = nvrtc.load(source, "sum_parts", partial.get_device())
    sizes = (parts, columns, partial.stride(0), _CODES[dtype])
    kernel.launch(-(-columns // 8), 256, _PARTS.pack(partial.data_ptr(), total.data_ptr(), *sizes))
    return total


def _typedefs(formats: dict[str, torch.dtype]) -> list[str]:
    return [f"typedef {FORMATS[dtype]} {name};" for name, dtype in formats.items()]

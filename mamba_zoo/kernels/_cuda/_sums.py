"""Sums of what other kernels wrote in parts: all of one call in one launch of `scan_finish` (finish.cu)."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from . import _plan, nvrtc

# Job of finish.cu in two parts.
_FROM_TO = struct.Struct("2Q")
_JOB_SIZES = struct.Struct("2q6if4x")
_MOST_JOBS = 8


class Sum(NamedTuple):
    """Sum of parts `(outer, parts, inner)` over parts, and whether parts and result are 16-bit."""

    half: bool
    half_result: bool
    total: int  # of the results, outer * inner
    parts: int
    inner: int
    scale: float = 1.0


class Sums:
    """Sums in one launch: all but their addresses.

    Args:
        sums: At most 8.
        dtype: Of 16-bit parts and results.
        device: Index of the device.
    """

    def __init__(self, sums: list[Sum], dtype: torch.dtype, device: int):
        self._kernel = nvrtc.load(_plan.finish_source(dtype), "scan_finish", device)
        self._sizes, self._blocks = [], 0
        for half, half_result, total, parts, inner, scale in sums:
            split = 8 if parts >= 16 else 1
            wide = 4 if split == 1 and inner % 4 == 0 else 1
            first = self._blocks
            self._sizes.append(_JOB_SIZES.pack(total, inner, parts, first, half, half_result, split, wide, scale))
            self._blocks += -(-total // (256 // split * wide))
        self._unused = bytes((_FROM_TO.size + _JOB_SIZES.size) * (_MOST_JOBS - len(sums)))

    def launch(self, addresses: list[tuple[int, int]]) -> None:
        """Queue them, from and to these addresses."""
        packed = [_FROM_TO.pack(*pair) + sizes for pair, sizes in zip(addresses, self._sizes, strict=True)]
        self._kernel.launch(self._blocks, 256, b"".join(packed) + self._unused)

"""Furthest points of small clouds: one program a cloud, which keeps all distances in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(points, chosen, n, count, BLOCK: tl.constexpr):
    cloud = tl.program_id(0).to(tl.int64)
    points += cloud * n * 3
    chosen += cloud * count
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    x = tl.load(points + 3 * lane, inside, 0.0)
    y = tl.load(points + 3 * lane + 1, inside, 0.0)
    z = tl.load(points + 3 * lane + 2, inside, 0.0)
    nearest = tl.where(inside, float("inf"), -1.0)
    last = tl.full((), 0, tl.int32)
    for i in range(count):
        tl.store(chosen + i, last.to(tl.int64))
        dx = x - tl.load(points + 3 * last)
        dy = y - tl.load(points + 3 * last + 1)
        dz = z - tl.load(points + 3 * last + 2)
        nearest = tl.minimum(nearest, dx * dx + dy * dy + dz * dz)
        last = tl.argmax(nearest, 0)


def furthest_points(points: Tensor, count: int) -> Tensor:
    """Indices `(b, count)` int64 of the furthest points of float32 clouds `(b, n, 3)`, the first point first.

    Chooses the very points that torch does: sums are rounded after each operation, and of equals the first is taken.
    """
    b, n, _ = points.shape
    points = points.contiguous()
    chosen = torch.empty(b, count, dtype=torch.int64, device=points.device)
    block = triton.next_power_of_2(n)
    warps = min(16, max(1, block // 256))
    launch: Any = _choose[(b,)]
    with torch.cuda.device_of(points):  # Triton launches on the current device
        launch(points, chosen, n, count, BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    return chosen

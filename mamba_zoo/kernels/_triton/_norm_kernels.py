"""Kernels of `add_norm`: a program holds whole rows, so that mean and variance need no second look at memory."""

import triton
import triton.language as tl


@triton.jit
def add_norm_forward(
    x, branch, scale, weight, bias, stream, y, statistics, rows, d, rows_per_sample, eps,
    RMS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK)
    inside = channel < d
    real = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * d + channel[None, :]
    h = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + at, mask=real, other=0.0).to(tl.float32)
        if scale is not None:
            factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)
            added *= factor[:, None]
        h += added
        tl.store(stream + at, h, mask=real)
        # The norm and its gradient see the stream as it is stored.
        h = h.to(stream.dtype.element_ty).to(tl.float32)
    if RMS:
        mean = tl.zeros((TILE,), tl.float32)
    else:
        mean = tl.sum(h, 1) / d
        h = tl.where(inside[None, :], h - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(h * h, 1) / d + eps)
    out = h * spread[:, None] * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out, mask=real)
    tl.store(statistics + row, mean, mask=row < rows)
    tl.store(statistics + rows + row, spread, mask=row < rows)


@triton.jit
def add_norm_backward(
    dy, dstream, stream, scale, weight, statistics, dx, dbranch, partial, rows, rows_per_sample,
    RMS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    # Summed over rows once at the end: a sum over the rows of a tile waits for all warps.
    dweight = tl.zeros((TILE, BLOCK), tl.float32)
    dbias = tl.zeros((TILE, BLOCK), tl.float32)
    for tile in tl.range(part, tl.cdiv(rows, TILE), parts, num_stages=3):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        real = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * D + channel[None, :]
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        spread = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        h = tl.load(stream + at, mask=real, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=real, other=0.0).to(tl.float32)
        if dstream is not None:
            passed = tl.load(dstream + at, mask=real, other=0.0).to(tl.float32)
        normed = tl.where(real, (h - mean[:, None]) * spread[:, None], 0.0)
        dweight += g * normed
        dbias += g
        g *= factor[None, :]
        along = tl.sum(g * normed, 1) / D
        gradient = g - normed * along[:, None]
        if not RMS:
            gradient -= (tl.sum(g, 1) / D)[:, None]
        gradient *= spread[:, None]
        if dstream is not None:
            gradient += passed
        tl.store(dx + at, gradient, mask=real)
        if dbranch is not None:
            if scale is not None:
                kept = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)
                gradient *= kept[:, None]
            tl.store(dbranch + at, gradient, mask=real)
    tl.store(partial + part * D + channel, tl.sum(dweight, 0), mask=inside)
    tl.store(partial + (parts + part) * D + channel, tl.sum(dbias, 0), mask=inside)

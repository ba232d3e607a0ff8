"""Kernels of `mlp`'s backward pass: a program sums the rows that it visits in a tile of registers, and once at the end
over the tile's rows.
"""

import triton
import triton.language as tl


@triton.jit
def _gelu_parts(x):
    """The normal distribution at `x`, and x times its density.

    The tail beyond |x| is the density times a minimax polynomial in t = 1 / (1 + 0.43 |x| / sqrt(2)), of relative error
    8e-8; 1 + erf would lose its digits, and costs a quarter more instructions.
    """
    e = tl.exp2(x * x * -0.72134752)
    t = 1.0 / (1.0 + tl.abs(x) * 0.304055916)
    p = t * 0.0368559547 - 0.15519549
    p = p * t + 0.19186905
    p = p * t - 0.042878896
    p = p * t + 0.123431385
    p = p * t + 0.102472521
    p = p * t + 0.122188255
    p = p * t + 0.121257268
    tail = p * (t * e)
    return tl.where(x < 0, tail, 1.0 - tail), x * 0.39894228 * e


@triton.jit(do_not_specialize=["rows"])
def gelu_backward(x, g, y, sums, rows, columns, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """GELU of `x` to `y`, its gradient in the place of `g`, and the sums over rows of that, a row for each part."""
    blocks = tl.cdiv(columns, BLOCK)
    part, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for tile in range(part, tl.cdiv(rows, TILE), parts):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        real = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        h = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        gradient = tl.load(g + at, mask=real, other=0.0).to(tl.float32)
        below, along = _gelu_parts(h)
        if y is not None:
            tl.store(y + at, h * below, mask=real)
        gradient *= below + along
        tl.store(g + at, gradient, mask=real)
        total += gradient
    if sums is not None:
        tl.store(sums + part.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def column_sums(x, sums, rows, columns, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Sums over rows of `x`, a row for each part."""
    blocks = tl.cdiv(columns, BLOCK)
    part, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for tile in range(part, tl.cdiv(rows, TILE), parts):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        real = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x + row[:, None] * columns + column[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(sums + part.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)

"""How the scan kernels read, take apart, put together and address tiles of steps.

Everything that belongs to a step and a channel (softplus, gates, skips) is done on a tile `(T, channels)` at once; only
the recurrence takes the tile apart into rows. Loads and stores are then wide and few, and no lane repeats another's
work when a channel's states are spread over lanes.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ._math import softplus_and_slope

# The token of a step outside the row's. -1 is an empty step, at which the state decays; outside it must not.
END: tl.constexpr = tl.constexpr(-2)


@triton.jit
def row_of_program(offsets, m, k, blocks, rows):
    """Which sample, direction, channel block, row and steps are this program's."""
    pid = tl.program_id(0)
    block = pid % blocks
    direction = (pid // blocks) % k
    row = pid // blocks // k
    sample = row.to(tl.int64)
    first = 0
    last = m
    if offsets is not None:
        sample = tl.full((), 0, tl.int64)
        first = tl.load(offsets + direction * (rows + 1) + row)
        last = tl.load(offsets + direction * (rows + 1) + row + 1)
    return sample, direction.to(tl.int64), block, row.to(tl.int64), first, last


@triton.jit
def load_tokens(order, start, first, last, T: tl.constexpr):
    """The tokens visited at T steps from `start` on, (T,); END outside the steps `first` to `last`."""
    step = start + tl.arange(0, T)
    return tl.load(order + step, mask=(step >= first) & (step < last), other=END)


@triton.jit
def in_tile(tokens, stride, lanes, WIDE: tl.constexpr):
    """Offsets (T, lanes) of the rows of `tokens`."""
    at = tokens.to(tl.int64) if WIDE else tokens
    return at[:, None] * stride + lanes[None, :]


@triton.jit
def load_tile(base, tokens, stride, lanes, ok, WIDE: tl.constexpr):
    """Rows of `base`, (T, lanes), zero at empty steps."""
    mask = (tokens >= 0)[:, None] & ok[None, :]
    return tl.load(base + in_tile(tokens, stride, lanes, WIDE), mask=mask, other=0.0)


@triton.jit
def store_tile(base, tokens, stride, lanes, ok, value, WIDE: tl.constexpr):
    """Write rows (T, lanes) to their tokens; empty steps have none."""
    mask = (tokens >= 0)[:, None] & ok[None, :]
    tl.store(base + in_tile(tokens, stride, lanes, WIDE), value, mask=mask)


@triton.jit
def step_size(dt, tokens, SOFTPLUS: tl.constexpr):
    """Step sizes (T, lanes) and their derivative in `dt`; both 0 outside the row's steps, so that nothing decays."""
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        dt, slope = softplus_and_slope(dt)
    alive = (tokens != END)[:, None]
    return tl.where(alive, dt, 0.0), tl.where(alive, slope, 0.0)


@triton.jit
def unstack(x):
    """The rows of x (T, a, b), T a power of two: a tuple of T (a, b)."""
    T: tl.constexpr = x.shape[0]
    a: tl.constexpr = x.shape[1]
    b: tl.constexpr = x.shape[2]
    parts = (tl.permute(x, (1, 2, 0)),)
    if T == 1:
        rows = (tl.reshape(parts[0], (a, b)),)
    elif T == 2:
        rows = tl.split(parts[0])
    elif T == 4:
        even, odd = tl.split(tl.reshape(parts[0], (a, b, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        rows = (x0, x1, x2, x3)
    else:
        tl.static_assert(T == 8)
        even, odd = tl.split(tl.reshape(parts[0], (a, b, 2, 2, 2)))
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        x0, x4 = tl.split(even0)
        x2, x6 = tl.split(even1)
        x1, x5 = tl.split(odd0)
        x3, x7 = tl.split(odd1)
        rows = (x0, x1, x2, x3, x4, x5, x6, x7)
    return rows


@triton.jit
def stack(rows, T: tl.constexpr):
    """T tensors (a, b) as one (T, a, b)."""
    a: tl.constexpr = rows[0].shape[0]
    b: tl.constexpr = rows[0].shape[1]
    if T == 1:
        x = tl.reshape(rows[0], (a, b, 1))
    elif T == 2:
        x = tl.join(rows[0], rows[1])
    elif T == 4:
        even, odd = tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3])
        x = tl.reshape(tl.join(even, odd), (a, b, 4))
    else:
        tl.static_assert(T == 8)
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
        x = tl.reshape(tl.join(even, odd), (a, b, 8))
    return tl.permute(x, (2, 0, 1))


@triton.jit
def per_channel(x, R: tl.constexpr):
    """A tile (T, R * DL) taken apart into T rows (R, DL)."""
    return unstack(tl.reshape(x, (x.shape[0], R, x.shape[1] // R)))


@triton.jit
def per_state(x):
    """A tile (T, NP) taken apart into T rows (NP, 1)."""
    return unstack(tl.reshape(x, (x.shape[0], x.shape[1], 1)))


@triton.jit
def together(rows, T: tl.constexpr):
    """T rows (a, b) as a tile (T, a * b)."""
    x = stack(rows, T)
    return tl.reshape(x, (T, x.shape[1] * x.shape[2]))


@triton.jit
def in_state(block, d, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, DL: tl.constexpr):
    """Offsets (NP, R, DL) of a state in memory (n, d), and which of them exist."""
    n = tl.arange(0, NP)[:, None, None]
    channel = block * (R * DL) + tl.arange(0, R)[None, :, None] * DL + tl.arange(0, DL)[None, None, :]
    return n * d + channel, (n < N) & (channel < d)


@triton.jit
def over_channels(x):
    """The sum over channels of x (NP, R, DL), as a row (NP, 1)."""
    return tl.sum(tl.sum(x, axis=1), axis=1)[:, None]

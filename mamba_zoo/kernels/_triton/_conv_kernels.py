"""The kernels of the causal convolution: a program takes T steps of one direction and sample, and BD channels.

Every tap reads its own tile of tokens; all but the first reading hit the cache. Steps of packed sequences know their
row through a table, `row_of (k, m)`.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: RUF005 (kernels cannot unpack into a tuple; a compile-time choice is an if statement)

import triton
import triton.language as tl

from ._math import sigmoid
from ._tiles import load_tile, store_tile

INTEGERS = ["l", "m", "k", "d", "blocks", "tiles", "rows", "order_b", "order_k", "x_b", "x_l", "x_k"]
GRAD_INTEGERS = [*INTEGERS, "dy_b", "dy_l", "dy_k"]
STATE_INTEGERS = ["m", "k", "d", "blocks", "rows", "order_b", "order_k", "x_b", "x_l", "x_k"]


@triton.jit
def place_of_program(blocks, tiles, k):
    """This program's channel block, tile of steps, direction and sample."""
    pid = tl.program_id(0)
    direction = pid // blocks // tiles % k
    sample = pid // blocks // tiles // k
    return pid % blocks, pid // blocks % tiles, direction.to(tl.int64), sample.to(tl.int64)


@triton.jit
def rows_of_steps(step, sample, direction, offsets, row_of, m, rows):
    """Row, first step and one-past-last step of each of `step` (T,); those after the end belong to no row."""
    row = sample + tl.zeros_like(step)
    first = tl.zeros_like(step)
    last = first + m
    if offsets is not None:
        row = tl.load(row_of + direction * m + step, mask=step < m, other=0).to(tl.int64)
        first = tl.load(offsets + direction * (rows + 1) + row)
        last = tl.load(offsets + direction * (rows + 1) + row + 1)
    return row, first, tl.where(step < m, last, 0)


@triton.jit
def tokens_of_steps(order, step, first, last):
    """The tokens visited at `step`, -1 outside the row."""
    return tl.load(order + step, mask=(step >= first) & (step < last), other=-1)


@triton.jit
def load_tap(
    x, x_l, initial, order, step, back, row, first, last, direction, k, d, lane, lane_ok, W: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What the tap `back` steps before `step` reads, (T, BD) float32: a token, the state before the row, or zero."""
    past = step - back
    tokens = tokens_of_steps(order, tl.where(step < last, past, -1), first, last)
    value = load_tile(x, tokens, x_l, lane, lane_ok, WIDE).to(tl.float32)
    if initial is not None:
        at = ((row * k + direction) * d)[:, None] * (W - 1) + lane[None, :] * (W - 1) + (past - first + W - 1)[:, None]
        old = (step < last) & (past < first)
        value += tl.load(initial + at, mask=old[:, None] & lane_ok[None, :], other=0.0)
    return value


@triton.jit(do_not_specialize=INTEGERS)
def conv_forward(
    x, weight, bias, order, offsets, row_of, initial, y,
    l, m, k, d, blocks, tiles, rows, order_b, order_k, x_b, x_l, x_k,
    SILU: tl.constexpr, W: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `y (b, l, k, d)`. Strides of tokens are in units of V elements."""
    block, tile, direction, sample = place_of_program(blocks, tiles, k)
    width = d // V * V
    lane = block * BD + tl.arange(0, BD)
    lane_ok = lane < width
    step = tile * T + tl.arange(0, T)
    row, first, last = rows_of_steps(step, sample, direction, offsets, row_of, m, rows)
    order += sample * order_b + direction * order_k
    x += (sample * x_b + direction * x_k) * V
    y += (sample * l * k + direction) * width
    total = tl.zeros((T, BD), tl.float32)
    if bias is not None:
        total += tl.load(bias + direction * d + lane, mask=lane_ok, other=0.0)[None, :]
    for j in tl.static_range(W):
        tap = tl.load(weight + (direction * d + lane) * W + j, mask=lane_ok, other=0.0)[None, :]
        total += tap * load_tap(
            x, x_l * V, initial, order, step, W - 1 - j, row, first, last, direction, k, d, lane, lane_ok, W, WIDE
        )
    if SILU:
        total *= sigmoid(total)
    store_tile(y, tokens_of_steps(order, step, first, last), k * width, lane, lane_ok, total, WIDE)


@triton.jit(do_not_specialize=[*GRAD_INTEGERS, "run"])
def conv_backward_weight(
    x, weight, bias, order, offsets, row_of, initial, dy, g, dweight, dbias,
    l, m, k, d, blocks, tiles, rows, order_b, order_k, x_b, x_l, x_k, dy_b, dy_l, dy_k, run,
    SILU: tl.constexpr, W: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradient before the activation, `g (b, l, k, d)`, if there is one, and shares of the other gradients.

    A program takes `run` tiles of steps; its share of `dweight (b * tiles, k, w, d)` and `dbias (b * tiles, k, d)` is
    its own, to be summed.
    """
    block, tile, direction, sample = place_of_program(blocks, tiles, k)
    width = d // V * V
    lane = block * BD + tl.arange(0, BD)
    lane_ok = lane < width
    order += sample * order_b + direction * order_k
    x += (sample * x_b + direction * x_k) * V
    dy += (sample * dy_b + direction * dy_k) * V
    if SILU:
        g += (sample * l * k + direction) * width
    shift = tl.load(bias + direction * d + lane, mask=lane_ok, other=0.0)[None, :] if bias is not None else 0.0
    # Summed over steps once, at the end: every such sum goes through shared memory and barriers.
    sums = ()
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros((T, BD), tl.float32),)
    sum_bias = tl.zeros((T, BD), tl.float32)
    for i in range(run):
        step = (tile * run + i) * T + tl.arange(0, T)
        row, first, last = rows_of_steps(step, sample, direction, offsets, row_of, m, rows)
        tokens = tokens_of_steps(order, step, first, last)
        grad = load_tile(dy, tokens, dy_l * V, lane, lane_ok, WIDE).to(tl.float32)
        values = ()
        total = tl.zeros((T, BD), tl.float32) + shift
        for j in tl.static_range(W):
            value = load_tap(
                x, x_l * V, initial, order, step, W - 1 - j, row, first, last, direction, k, d, lane, lane_ok, W, WIDE
            )
            values = values + (value,)
            if SILU:
                total += tl.load(weight + (direction * d + lane) * W + j, mask=lane_ok, other=0.0)[None, :] * value
        if SILU:
            opened = sigmoid(total)
            grad *= opened * (1.0 + total * (1.0 - opened))
            store_tile(g, tokens, k * width, lane, lane_ok, grad, WIDE)
        more = ()
        for j in tl.static_range(W):
            more = more + (sums[j] + grad * values[j],)
        sums = more
        sum_bias += grad
    share = (sample * tiles + tile) * k + direction
    for j in tl.static_range(W):
        tl.store(dweight + (share * W + j) * d + lane, tl.sum(sums[j], axis=0), mask=lane_ok)
    if bias is not None:
        tl.store(dbias + share * d + lane, tl.sum(sum_bias, axis=0), mask=lane_ok)


@triton.jit(do_not_specialize=INTEGERS)
def conv_backward_x(
    g, weight, order, offsets, row_of, dfinal, dx,
    l, m, k, d, blocks, tiles, rows, order_b, order_k, x_b, x_l, x_k,
    W: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `dx (b, l, k, d)` from the gradient before the activation, whose strides are `x_b`, `x_l` and `x_k`."""
    block, tile, direction, sample = place_of_program(blocks, tiles, k)
    width = d // V * V
    lane = block * BD + tl.arange(0, BD)
    lane_ok = lane < width
    step = tile * T + tl.arange(0, T)
    row, first, last = rows_of_steps(step, sample, direction, offsets, row_of, m, rows)
    order += sample * order_b + direction * order_k
    g += (sample * x_b + direction * x_k) * V
    dx += (sample * l * k + direction) * width
    total = tl.zeros((T, BD), tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(weight + (direction * d + lane) * W + j, mask=lane_ok, other=0.0)[None, :]
        tokens = tokens_of_steps(order, step + (W - 1 - j), first, last)
        total += tap * load_tile(g, tokens, x_l * V, lane, lane_ok, WIDE).to(tl.float32)
    if dfinal is not None:
        place = step - last + (W - 1)
        at = ((row * k + direction) * d)[:, None] * (W - 1) + lane[None, :] * (W - 1) + place[:, None]
        kept = (step < last) & (place >= 0)
        total += tl.load(dfinal + at, mask=kept[:, None] & lane_ok[None, :], other=0.0)
    store_tile(dx, tokens_of_steps(order, step, first, last), k * width, lane, lane_ok, total, WIDE)


@triton.jit
def bounds_of_row(row, direction, offsets, m, rows):
    """Sample, first step and one-past-last step of a row."""
    sample, first, last = row, 0, m
    if offsets is not None:
        sample = row * 0
        first = tl.load(offsets + direction * (rows + 1) + row)
        last = tl.load(offsets + direction * (rows + 1) + row + 1)
    return sample, first, last


@triton.jit(do_not_specialize=STATE_INTEGERS)
def conv_final_state(
    x, order, offsets, initial, final,
    m, k, d, blocks, rows, order_b, order_k, x_b, x_l, x_k,
    W: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the last w - 1 inputs of every row, `final (rows, k, d, w - 1)`."""
    pid = tl.program_id(0)
    direction = (pid // blocks % k).to(tl.int64)
    row = (pid // blocks // k).to(tl.int64)
    lane = pid % blocks * BD + tl.arange(0, BD)
    lane_ok = lane < d
    sample, first, last = bounds_of_row(row, direction, offsets, m, rows)
    order += sample * order_b + direction * order_k
    x += sample * x_b + direction * x_k
    in_state = ((row * k + direction) * d + lane) * (W - 1)
    for j in tl.static_range(W - 1):
        step = last - (W - 1) + j
        token = tl.load(order + step, mask=step >= first, other=-1)
        at = token.to(tl.int64) if WIDE else token
        value = tl.load(x + at * x_l + lane, mask=lane_ok & (token >= 0), other=0.0).to(tl.float32)
        if initial is not None:
            value += tl.load(initial + in_state + (step - first + W - 1), mask=lane_ok & (step < first), other=0.0)
        tl.store(final + in_state + j, value, mask=lane_ok)


@triton.jit(do_not_specialize=STATE_INTEGERS)
def conv_backward_state(
    g, weight, order, offsets, dfinal, dinitial,
    m, k, d, blocks, rows, order_b, order_k, x_b, x_l, x_k,
    W: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `dinitial (rows, k, d, w - 1)` from the gradient before the activation and that of the final state."""
    pid = tl.program_id(0)
    direction = (pid // blocks % k).to(tl.int64)
    row = (pid // blocks // k).to(tl.int64)
    lane = pid % blocks * BD + tl.arange(0, BD)
    lane_ok = lane < d
    sample, first, last = bounds_of_row(row, direction, offsets, m, rows)
    order += sample * order_b + direction * order_k
    g += sample * x_b + direction * x_k
    in_state = ((row * k + direction) * d + lane) * (W - 1)
    for i in tl.static_range(W - 1):
        total = tl.zeros((BD,), tl.float32)
        for j in tl.static_range(i + 1):
            step = first + i - j
            token = tl.load(order + step, mask=step < last, other=-1)
            at = token.to(tl.int64) if WIDE else token
            value = tl.load(g + at * x_l + lane, mask=lane_ok & (token >= 0), other=0.0).to(tl.float32)
            total += tl.load(weight + (direction * d + lane) * W + j, mask=lane_ok, other=0.0) * value
        if dfinal is not None:
            place = first + i - last
            total += tl.load(dfinal + in_state + place, mask=lane_ok & (place >= 0), other=0.0)
        tl.store(dinitial + in_state + i, total, mask=lane_ok)

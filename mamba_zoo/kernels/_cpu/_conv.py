"""The loops of the causal convolution, forward and backward, compiled by numba.

A work item is W channels of one row, or of a group of rows in the backward. A tape of tokens in visiting order slides
through scratch memory, w - 1 places of history before each tile of steps; every output reads w places.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from ._pool import Kernel, own_scratch
from ._rows import V, read, read_states, write, write_states
from ._simd import W, exp_minus_abs, fetch_add, load, load_i32, sigmoid, splat, store, zeros

TILE = 32  # steps

_COMMON = (
    "rows", "blocks", "split", "k", "d", "w", "m", "silu", "weight", "bias", "initial",
    "order", "order_b", "order_k", "offsets", "x", "x_b", "x_l", "x_k",
)  # fmt: skip
FORWARD = (*_COMMON, "y", "y_b", "y_l", "y_k", "final")
BACKWARD = (
    *_COMMON, "row_groups", "add", "complete", "dy", "dy_b", "dy_l", "dy_k", "dx", "dx_b", "dx_l", "dx_k",
    "dfinal", "dinitial", "dweight", "dbias",
)  # fmt: skip


def scratch_floats(w: int) -> int:
    """Scratch memory of one thread: tape and gradients with their history, taps and their gradients, states."""
    return W * (2 * (TILE + 2 * w) + 4 * w)


@njit
def slide(tape, steps, lag):
    """Move the last `lag` places to the front."""
    for i in range(lag):
        store(tape + V * i, load(tape + V * (steps + i)))


def convolve(pointer):
    """Take work items of the forward pass until none is left."""
    a = carray(pointer, 1)[0]
    scratch = own_scratch(a)
    k, d, w, m, silu, x_l, y_l = a.k, a.d, a.w, a.m, a.silu, a.x_l, a.y_l
    lag = w - 1
    taps = scratch
    tape = taps + V * w
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        c = item % a.blocks * W
        direction = item // a.blocks % k
        row = item // (a.blocks * k)
        count = d - c
        sample, first, last = row, 0, m
        if a.offsets:
            cut = a.offsets + 4 * (direction * (a.rows + 1) + row)
            sample, first, last = 0, load_i32(cut), load_i32(cut + 4)
        channel = direction * d + c
        state = (row * k * d + channel) * 4 * lag
        read_states(taps, a.weight + channel * 4 * w, w, count, np.float32(1.0))
        read_states(tape, a.initial + state if a.initial else 0, lag, count, np.float32(1.0))
        bias = read(a.bias + 4 * channel, count) if a.bias else zeros()
        visits = a.order + sample * a.order_b + direction * a.order_k
        x = a.x + sample * a.x_b + direction * a.x_k + 4 * c
        y = a.y + sample * a.y_b + direction * a.y_k + 4 * c
        for start in range(first, last, TILE):
            steps = min(TILE, last - start)
            for t in range(steps):
                i = load_i32(visits + 4 * (start + t))
                store(tape + V * (lag + t), read(x + i * x_l, count) if i >= 0 else zeros())
            for t in range(steps):
                i = load_i32(visits + 4 * (start + t))
                if i >= 0:
                    total = bias
                    for j in range(w):
                        total = total + load(taps + V * j) * load(tape + V * (t + j))
                    if silu:
                        total = total * sigmoid(total, exp_minus_abs(total))
                    write(y + i * y_l, total, count)
            slide(tape, steps, lag)
        if a.final:
            write_states(tape, a.final + state, lag, count)


@njit
def give_back(a, slopes, taps, dfinal, dinitial, visits, dx, add, first, start, steps, count):
    """Sum what places `start - lag` onwards of the tape receive, and add it to their tokens or to the history."""
    lag = a.w - 1
    for t in range(steps):
        total = load(dfinal + V * t) if dfinal else zeros()
        for j in range(a.w):
            total = total + load(taps + V * j) * load(slopes + V * (lag + t - j))
        step = start + t - lag
        if step < first:
            store(dinitial + V * (lag + step - first), total + load(dinitial + V * (lag + step - first)))
        else:
            i = load_i32(visits + 4 * step)
            if i >= 0:
                if add:
                    total = total + read(dx + i * a.dx_l, count)
                write(dx + i * a.dx_l, total, count)


def convolve_backward(pointer):
    """Take work items of the backward pass until none is left."""
    a = carray(pointer, 1)[0]
    scratch = own_scratch(a)
    k, d, w, m, silu, x_l, dy_l = a.k, a.d, a.w, a.m, a.silu, a.x_l, a.dy_l
    lag = w - 1
    taps = scratch
    dtaps = taps + V * w
    dinitial = dtaps + V * w
    dfinal = dinitial + V * w
    tape = dfinal + V * w
    slopes = tape + V * (TILE + 2 * w)
    one = splat(np.float32(1.0))
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        c = item % a.blocks * W
        row_group = item // a.blocks % a.row_groups
        low = item // (a.blocks * a.row_groups)
        count = d - c
        row_first, row_last = row_group * a.rows // a.row_groups, (row_group + 1) * a.rows // a.row_groups
        for direction in range(low, low + 1 if a.split else k):
            channel = direction * d + c
            read_states(taps, a.weight + channel * 4 * w, w, count, np.float32(1.0))
            read_states(dtaps, 0, w, count, np.float32(1.0))
            bias = read(a.bias + 4 * channel, count) if a.bias else zeros()
            sum_bias = zeros()
            add = a.add and (direction > 0 or not a.complete)
            for row in range(row_first, row_last):
                sample, first, last = row, 0, m
                if a.offsets:
                    cut = a.offsets + 4 * (direction * (a.rows + 1) + row)
                    sample, first, last = 0, load_i32(cut), load_i32(cut + 4)
                state = (row * k * d + channel) * 4 * lag
                read_states(tape, a.initial + state if a.initial else 0, lag, count, np.float32(1.0))
                read_states(dfinal, a.dfinal + state if a.dfinal else 0, lag, count, np.float32(1.0))
                read_states(slopes, 0, lag, count, np.float32(1.0))
                read_states(dinitial, 0, lag, count, np.float32(1.0))
                visits = a.order + sample * a.order_b + direction * a.order_k
                x = a.x + sample * a.x_b + direction * a.x_k + 4 * c
                dy = a.dy + sample * a.dy_b + direction * a.dy_k + 4 * c
                dx = a.dx + sample * a.dx_b + direction * a.dx_k + 4 * c
                for start in range(first, last, TILE):
                    steps = min(TILE, last - start)
                    for t in range(steps):
                        i = load_i32(visits + 4 * (start + t))
                        value, slope = zeros(), zeros()
                        if i >= 0:
                            value, slope = read(x + i * x_l, count), read(dy + i * dy_l, count)
                        store(tape + V * (lag + t), value)
                        if silu:
                            total = bias
                            for j in range(w):
                                total = total + load(taps + V * j) * load(tape + V * (t + j))
                            s = sigmoid(total, exp_minus_abs(total))
                            slope = slope * s * (one + total * (one - s))
                        sum_bias = sum_bias + slope
                        store(slopes + V * (lag + t), slope)
                    for j in range(w):
                        total = load(dtaps + V * j)
                        for t in range(steps):
                            total = total + load(slopes + V * (lag + t)) * load(tape + V * (t + j))
                        store(dtaps + V * j, total)
                    give_back(a, slopes, taps, 0, dinitial, visits, dx, add, first, start, steps, count)
                    slide(tape, steps, lag)
                    slide(slopes, steps, lag)
                # Past the end there is the final state: no more outputs, but gradients of its own.
                read_states(slopes + V * lag, 0, lag, count, np.float32(1.0))
                give_back(a, slopes, taps, dfinal, dinitial, visits, dx, add, first, last, lag, count)
                if a.dinitial:
                    write_states(dinitial, a.dinitial + state, lag, count)
            channel += row_group * k * d
            write_states(dtaps, a.dweight + channel * 4 * w, w, count)
            write(a.dbias + 4 * channel, sum_bias, count)


forward_kernel = Kernel(convolve, FORWARD)
backward_kernel = Kernel(convolve_backward, BACKWARD)

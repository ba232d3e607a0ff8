"""The forward loop of the selective scan with one state per channel (VMamba), compiled by numba.

With so little work per token, moving rows through the memory of a tile as `_scan_forward` does costs too much: here a
step is done in one pass, state and A in registers. A work item is one or two neighbouring vectors of W channels; with
two, each row is visited half as often. Measured at 4 x 96 channels and 3136 tokens in random order, one thread, median
of 150 calls in a row: 1.09 ms, 1.34 with one vector an item, 1.50 by `_scan_forward`. With every row in the cache it is
0.97 ms, and 0.38 without softplus: arithmetic is the limit, as long as rows of later steps are asked for in time.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from ._pool import Kernel
from ._rows import V, read, write
from ._scan_forward import AHEAD, FIELDS, TILE
from ._simd import (
    LOG2E,
    W,
    broadcast,
    exp2,
    exp_minus_abs,
    fetch_add,
    load_i32,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
    zeros,
)


@njit(forceinline=True)
def parameters(a, channel, state, count):
    """First state, A, bias and D of a vector of channels."""
    h = read(a.initial + state, count) if a.initial else zeros()
    bias = read(a.bias + channel, count) if a.bias else zeros()
    skip = read(a.D + channel, count) if a.D else zeros()
    return h, read(a.A + channel, count) * splat(np.float32(LOG2E)), bias, skip


@njit(forceinline=True)
def advance(h, A, bias, skip, scale, dt, u, z, y, B, C, count, use_softplus, gated, add):
    """One step of a vector of channels at the addresses `dt`, `u`, `z`, `y`; the new state."""
    step, x = bias + read(dt, count), read(u, count)
    if use_softplus:
        step = softplus(step, exp_minus_abs(step))
    h = exp2(step * A) * h + step * x * B
    value = (skip * x + h * C) * scale
    if gated:
        gate = read(z, count)
        value = value * gate * sigmoid(gate, exp_minus_abs(gate))
    if add:
        value = value + read(y, count)
    write(y, value, count)
    return h


@njit(forceinline=True)
def rest(h, A, step, use_softplus):
    """The state after an empty step."""
    if use_softplus:
        step = softplus(step, exp_minus_abs(step))
    return exp2(step * A) * h


def scan_single(pointer):
    """Take work items until none is left."""
    a = carray(pointer, 1)[0]
    k, d, m, blocks = a.k, a.d, a.m, a.blocks
    u_l, dt_l, z_l, y_l, B_l, C_l = a.u_l, a.dt_l, a.z_l, a.y_l, a.B_l, a.C_l
    use_softplus, gated, all_saved = a.softplus, a.z, a.saved
    groups = -(-blocks // a.width)
    scale = splat(np.float32(1.0 / k if a.mean else 1.0))
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        block = item % groups * a.width
        row = item // groups % a.rows
        low = item // (groups * a.rows)
        c = block * W
        count = d - c
        more = count - W if a.width > 1 else 0  # channels of a second vector, if positive
        sample = 0 if a.offsets else row
        for direction in range(low, low + 1 if a.split else k):
            first, last, tile = 0, m, (sample * k + direction) * a.tiles
            if a.offsets:
                cut = a.offsets + 4 * (direction * (a.rows + 1) + row)
                first, last = load_i32(cut), load_i32(cut + 4)
                tile += first // TILE + row
            channel = 4 * (direction * d + c)
            state = 4 * (row * k * d) + channel
            h, A, bias, skip = parameters(a, channel, state, count)
            h2, A2, bias2, skip2 = parameters(a, channel + V, state + V, more)
            visits = a.order + sample * a.order_b + direction * a.order_k
            all_u = a.u + sample * a.u_b + direction * a.u_k + 4 * c
            all_dt = a.dt + sample * a.dt_b + direction * a.dt_k + 4 * c
            all_z = a.z + sample * a.z_b + direction * a.z_k + 4 * c
            all_B = a.B + sample * a.B_b + direction * a.B_k
            all_C = a.C + sample * a.C_b + direction * a.C_k
            all_y = a.y + sample * a.y_b + direction * a.y_k + 4 * c
            add = a.add and (direction > 0 or not a.complete)
            for start in range(first, last, TILE):
                if all_saved:
                    saved = all_saved + (tile * blocks + block) * V
                    store(saved, h)
                    if more > 0:
                        store(saved + V, h2)
                    tile += 1
                for t in range(start, min(start + TILE, last)):
                    i = load_i32(visits + 4 * t)
                    if t + AHEAD < last:
                        later = load_i32(visits + 4 * (t + AHEAD))
                        dt, u, z, y = (
                            all_dt + later * dt_l,
                            all_u + later * u_l,
                            all_z + later * z_l,
                            all_y + later * y_l,
                        )
                        prefetch(dt)
                        prefetch(u)
                        prefetch(y)
                        if gated:
                            prefetch(z)
                        if more > 0:
                            prefetch(dt + V)
                            prefetch(u + V)
                            prefetch(y + V)
                            if gated:
                                prefetch(z + V)
                    if i < 0:
                        h, h2 = rest(h, A, bias, use_softplus), rest(h2, A2, bias2, use_softplus)
                        continue
                    dt, u, z, y = all_dt + i * dt_l, all_u + i * u_l, all_z + i * z_l, all_y + i * y_l
                    B, C = broadcast(all_B + i * B_l), broadcast(all_C + i * C_l)
                    h = advance(h, A, bias, skip, scale, dt, u, z, y, B, C, count, use_softplus, gated, add)
                    if more > 0:
                        dt, u, z, y = dt + V, u + V, z + V, y + V
                        h2 = advance(h2, A2, bias2, skip2, scale, dt, u, z, y, B, C, more, use_softplus, gated, add)
            if a.final:
                write(a.final + state, h, count)
                write(a.final + state + V, h2, more)


kernel = Kernel(scan_single, (*FIELDS, "width"))

"""The forward loop of the selective scan, compiled by numba.

A work item is W channels of one row (of all directions if they are reduced). Steps go in tiles: step sizes and drives
of a tile first, then the recurrence of four states at a time with the states in registers, then the outputs.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from ._pool import Kernel, own_scratch
from ._rows import V, read, read_states, write, write_states
from ._simd import (
    LOG2E,
    W,
    broadcast,
    exp2,
    exp_minus_abs,
    fetch_add,
    load,
    load_i32,
    load_i64,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
    store_i64,
    zeros,
)

TILE = 32  # steps between saved states
AHEAD = 16  # steps between asking for a row and reading it: the hardware cannot foresee an order

FIELDS = (
    "rows", "blocks", "split", "k", "d", "n", "m", "softplus", "mean", "add", "complete", "tiles",
    "u", "u_b", "u_l", "u_k", "dt", "dt_b", "dt_l", "dt_k", "z", "z_b", "z_l", "z_k",
    "B", "B_b", "B_l", "B_k", "C", "C_b", "C_l", "C_k", "A", "D", "bias",
    "order", "order_b", "order_k", "offsets", "initial", "final", "saved", "y", "y_b", "y_l", "y_k", "zeros",
)  # fmt: skip


def scratch_floats(n: int) -> int:
    """Scratch memory of one thread: states and A of a block, three rows and two addresses a step of a tile."""
    return W * (2 * n + 3 * TILE) + 4 * TILE


@njit
def four_states(h, A, delta, drive, y, maps, steps, j):
    """The recurrence of states j to j + 3 over a tile; `h` and `A` are at state j."""
    h0, h1, h2, h3 = load(h), load(h + V), load(h + 2 * V), load(h + 3 * V)
    A0, A1, A2, A3 = load(A), load(A + V), load(A + 2 * V), load(A + 3 * V)
    for t in range(steps):
        step, x = load(delta + V * t), load(drive + V * t)
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        h0 = exp2(step * A0) * h0 + x * broadcast(B)
        h1 = exp2(step * A1) * h1 + x * broadcast(B + 4)
        h2 = exp2(step * A2) * h2 + x * broadcast(B + 8)
        h3 = exp2(step * A3) * h3 + x * broadcast(B + 12)
        low = load(y + V * t) + h0 * broadcast(C) + h1 * broadcast(C + 4)
        high = h2 * broadcast(C + 8) + h3 * broadcast(C + 12)
        store(y + V * t, low + high)
    store(h, h0)
    store(h + V, h1)
    store(h + 2 * V, h2)
    store(h + 3 * V, h3)


@njit
def one_state(h, A, delta, drive, y, maps, steps, j):
    """The recurrence of state j over a tile; `h` and `A` are at state j."""
    h0, A0 = load(h), load(A)
    for t in range(steps):
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        h0 = exp2(load(delta + V * t) * A0) * h0 + load(drive + V * t) * broadcast(B)
        store(y + V * t, load(y + V * t) + h0 * broadcast(C))
    store(h, h0)


def scan(pointer):
    """Take work items until none is left."""
    a = carray(pointer, 1)[0]
    scratch = own_scratch(a)
    k, d, n, m = a.k, a.d, a.n, a.m
    tokens_u, u_l, tokens_dt, dt_l, z_l, y_l = a.u, a.u_l, a.dt, a.dt_l, a.z_l, a.y_l
    B_l, C_l, nothing, use_softplus = a.B_l, a.C_l, a.zeros, a.softplus
    h = scratch
    A = h + V * n
    delta = A + V * n
    drive = delta + V * TILE
    y = drive + V * TILE
    maps = y + V * TILE
    scale = splat(np.float32(1.0 / k if a.mean else 1.0))
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        block = item % a.blocks
        row = item // a.blocks % a.rows
        low = item // (a.blocks * a.rows)
        c = block * W
        count = d - c
        sample = 0 if a.offsets else row
        for direction in range(low, low + 1 if a.split else k):
            first, last, tile = 0, m, sample * k * a.tiles + direction * a.tiles
            if a.offsets:
                cut = a.offsets + 4 * (direction * (a.rows + 1) + row)
                first, last = load_i32(cut), load_i32(cut + 4)
                tile += first // TILE + row
            channel = direction * d + c
            state = (row * k * d + channel) * 4 * n
            read_states(h, a.initial + state if a.initial else 0, n, count, np.float32(1.0))
            read_states(A, a.A + channel * 4 * n, n, count, np.float32(LOG2E))
            bias = read(a.bias + 4 * channel, count) if a.bias else zeros()
            skip = read(a.D + 4 * channel, count) if a.D else zeros()
            visits = a.order + sample * a.order_b + direction * a.order_k
            u = tokens_u + sample * a.u_b + direction * a.u_k + 4 * c
            dt = tokens_dt + sample * a.dt_b + direction * a.dt_k + 4 * c
            z = a.z + sample * a.z_b + direction * a.z_k + 4 * c
            B = a.B + sample * a.B_b + direction * a.B_k
            C = a.C + sample * a.C_b + direction * a.C_k
            out = a.y + sample * a.y_b + direction * a.y_k + 4 * c
            add = a.add and (direction > 0 or not a.complete)
            for start in range(first, last, TILE):
                steps = min(TILE, last - start)
                if a.saved:
                    saved = a.saved + ((tile * a.blocks) + block) * V * n
                    for j in range(n):
                        store(saved + V * j, load(h + V * j))
                    tile += 1
                for t in range(steps):
                    i = load_i32(visits + 4 * (start + t))
                    if start + t + AHEAD < last:
                        later = load_i32(visits + 4 * (start + t + AHEAD))
                        prefetch(dt + later * dt_l)
                        prefetch(u + later * u_l)
                    step, x = bias, zeros()
                    if i < 0:
                        store_i64(maps + 16 * t, nothing)
                        store_i64(maps + 16 * t + 8, nothing)
                    else:
                        store_i64(maps + 16 * t, B + i * B_l)
                        store_i64(maps + 16 * t + 8, C + i * C_l)
                        step, x = step + read(dt + i * dt_l, count), read(u + i * u_l, count)
                    if use_softplus:
                        step = softplus(step, exp_minus_abs(step))
                    store(delta + V * t, step)
                    store(drive + V * t, step * x)
                    store(y + V * t, skip * x)
                for j in range(0, n - 3, 4):
                    four_states(h + V * j, A + V * j, delta, drive, y, maps, steps, j)
                for j in range(n // 4 * 4, n):
                    one_state(h + V * j, A + V * j, delta, drive, y, maps, steps, j)
                for t in range(steps):
                    i = load_i32(visits + 4 * (start + t))
                    if i >= 0:
                        value = load(y + V * t) * scale
                        if a.z:
                            gate = read(z + i * z_l, count)
                            value = value * gate * sigmoid(gate, exp_minus_abs(gate))
                        if add:
                            value = value + read(out + i * y_l, count)
                        write(out + i * y_l, value, count)
            if a.final:
                write_states(h, a.final + state, n, count)


kernel = Kernel(scan, FIELDS)

"""The backward loop of the selective scan, compiled by numba.

A work item is a group of channel blocks of a group of rows. Tiles of steps are walked from last to first; each starts
from the state that the forward pass saved, computes its states and decays again, and walks back. What sums over
channels (dB, dC) collects in vectors, W sums at a time, over the blocks of the item and ends in a row of its own, so
that no two items write the same memory.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from ._pool import Kernel, own_scratch
from ._rows import V, read, read_states, write, write_states
from ._scan_forward import AHEAD, TILE
from ._simd import (
    LOG2E,
    W,
    broadcast,
    exp2,
    exp_minus_abs,
    fetch_add,
    lane_sum,
    load,
    load_i32,
    load_i64,
    prefetch,
    quarter_sums,
    sigmoid,
    softplus,
    splat,
    store,
    store_f32,
    store_i64,
    store_quarters,
    zeros,
)

FIELDS = (
    "rows", "row_groups", "blocks", "groups", "width", "split", "b", "l", "k", "d", "n", "m", "softplus", "mean",
    "complete", "tiles", "zeros",
    "u", "u_b", "u_l", "u_k", "dt", "dt_b", "dt_l", "dt_k", "z", "z_b", "z_l", "z_k",
    "B", "B_b", "B_l", "B_k", "C", "C_b", "C_l", "C_k", "dy", "dy_b", "dy_l", "dy_k",
    "du", "du_b", "du_l", "du_k", "ddt", "ddt_b", "ddt_l", "ddt_k", "dz", "dz_b", "dz_l", "dz_k",
    "A", "D", "bias", "order", "order_b", "order_k", "offsets", "saved",
    "dfinal", "dinitial", "dA", "dD", "dbias", "dB", "dC", "share_u", "share_z",
)  # fmt: skip
ROWS = 9  # vectors a step of a tile: delta, drive, u, dy, y, slope, three sums


def scratch_floats(n: int, width: int) -> int:
    """Scratch memory of one thread for `n` states and `width` blocks in an item."""
    tile = ROWS + 2 * 4 + 2 * (n // 4 + n % 4)
    return W * (width * (3 * n + 2) + 4 + TILE * tile) + 4 * TILE


@njit
def four_states(h, A, g, dA, delta, drive, dy, y, into, through, decays, states, dB, dC, maps, steps, j, sums, fresh):
    """Recompute states j to j + 3 over a tile, then walk back; memory of states is at state j.

    `into` receives dL/d(drive) of every step, `through` dL/d(delta) by the decay. The four states share a vector of
    partial sums in `dB` and `dC`, which lie `sums` bytes apart from step to step and are overwritten if `fresh`.
    """
    h0, h1, h2, h3 = load(h), load(h + V), load(h + 2 * V), load(h + 3 * V)
    A0, A1, A2, A3 = load(A), load(A + V), load(A + 2 * V), load(A + 3 * V)
    for t in range(steps):
        step, x, out = load(delta + V * t), load(drive + V * t), load(dy + V * t)
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        at, to = 4 * V * t, sums * t
        a0, a1, a2, a3 = exp2(step * A0), exp2(step * A1), exp2(step * A2), exp2(step * A3)
        store(decays + at, a0)
        store(decays + at + V, a1)
        store(decays + at + 2 * V, a2)
        store(decays + at + 3 * V, a3)
        store(states + at, h0)
        store(states + at + V, h1)
        store(states + at + 2 * V, h2)
        store(states + at + 3 * V, h3)
        h0 = a0 * h0 + x * broadcast(B)
        h1 = a1 * h1 + x * broadcast(B + 4)
        h2 = a2 * h2 + x * broadcast(B + 8)
        h3 = a3 * h3 + x * broadcast(B + 12)
        low = load(y + V * t) + h0 * broadcast(C) + h1 * broadcast(C + 4)
        high = h2 * broadcast(C + 8) + h3 * broadcast(C + 12)
        store(y + V * t, low + high)
        part = quarter_sums(h0 * out, h1 * out, h2 * out, h3 * out)
        store(dC + to, part if fresh else load(dC + to) + part)
    g0, g1, g2, g3 = load(g), load(g + V), load(g + 2 * V), load(g + 3 * V)
    d0, d1, d2, d3 = load(dA), load(dA + V), load(dA + 2 * V), load(dA + 3 * V)
    for back in range(steps):
        t = steps - 1 - back
        step, x, out = load(delta + V * t), load(drive + V * t), load(dy + V * t)
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        at, to = 4 * V * t, sums * t
        g0 = g0 + out * broadcast(C)
        g1 = g1 + out * broadcast(C + 4)
        g2 = g2 + out * broadcast(C + 8)
        g3 = g3 + out * broadcast(C + 12)
        part = quarter_sums(g0 * x, g1 * x, g2 * x, g3 * x)
        store(dB + to, part if fresh else load(dB + to) + part)
        low = load(into + V * t) + g0 * broadcast(B) + g1 * broadcast(B + 4)
        store(into + V * t, low + (g2 * broadcast(B + 8) + g3 * broadcast(B + 12)))
        g0, g1 = g0 * load(decays + at), g1 * load(decays + at + V)
        g2, g3 = g2 * load(decays + at + 2 * V), g3 * load(decays + at + 3 * V)
        w0, w1 = g0 * load(states + at), g1 * load(states + at + V)
        w2, w3 = g2 * load(states + at + 2 * V), g3 * load(states + at + 3 * V)
        d0, d1, d2, d3 = d0 + w0 * step, d1 + w1 * step, d2 + w2 * step, d3 + w3 * step
        store(through + V * t, load(through + V * t) + w0 * A0 + w1 * A1 + (w2 * A2 + w3 * A3))
    store(g, g0)
    store(g + V, g1)
    store(g + 2 * V, g2)
    store(g + 3 * V, g3)
    store(dA, d0)
    store(dA + V, d1)
    store(dA + 2 * V, d2)
    store(dA + 3 * V, d3)


@njit
def one_state(h, A, g, dA, delta, drive, dy, y, into, through, decays, states, dB, dC, maps, steps, j, sums, fresh):
    """`four_states` for state j alone."""
    h0, A0 = load(h), load(A)
    for t in range(steps):
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        to = sums * t
        a0 = exp2(load(delta + V * t) * A0)
        store(decays + V * t, a0)
        store(states + V * t, h0)
        h0 = a0 * h0 + load(drive + V * t) * broadcast(B)
        store(y + V * t, load(y + V * t) + h0 * broadcast(C))
        part = h0 * load(dy + V * t)
        store(dC + to, part if fresh else load(dC + to) + part)
    g0, d0 = load(g), load(dA)
    for back in range(steps):
        t = steps - 1 - back
        B, C = load_i64(maps + 16 * t) + 4 * j, load_i64(maps + 16 * t + 8) + 4 * j
        to = sums * t
        g0 = g0 + load(dy + V * t) * broadcast(C)
        part = g0 * load(drive + V * t)
        store(dB + to, part if fresh else load(dB + to) + part)
        store(into + V * t, load(into + V * t) + g0 * broadcast(B))
        g0 = g0 * load(decays + V * t)
        w0 = g0 * load(states + V * t)
        d0 = d0 + w0 * load(delta + V * t)
        store(through + V * t, load(through + V * t) + w0 * A0)
    store(g, g0)
    store(dA, d0)


def scan_backward(pointer):
    """Take work items until none is left."""
    a = carray(pointer, 1)[0]
    scratch = own_scratch(a)
    k, d, n, m = a.k, a.d, a.n, a.m
    u_l, dt_l, z_l, dy_l, du_l, ddt_l, dz_l = a.u_l, a.dt_l, a.z_l, a.dy_l, a.du_l, a.ddt_l, a.dz_l
    B_l, C_l, nothing, use_softplus = a.B_l, a.C_l, a.zeros, a.softplus
    # Vectors of every block of the item, then of one tile.
    all_A = scratch
    all_g = all_A + V * n * a.width
    all_dA = all_g + V * n * a.width
    all_dD = all_dA + V * n * a.width
    all_dbias = all_dD + V * a.width
    delta = all_dbias + V * a.width
    drive = delta + V * TILE
    tokens = drive + V * TILE
    dy = tokens + V * TILE
    y = dy + V * TILE
    slope = y + V * TILE
    into = slope + V * TILE
    through = into + V * TILE
    ungated = through + V * TILE
    decays = ungated + V * TILE
    states = decays + 4 * V * TILE
    dB = states + 4 * V * TILE
    sums = V * (n // 4 + n % 4)
    dC = dB + sums * TILE
    maps = dC + sums * TILE
    scale = splat(np.float32(1.0 / k if a.mean else 1.0))
    ln2 = splat(np.float32(1.0 / LOG2E))
    one = splat(np.float32(1.0))
    while True:
        item = fetch_add(a.counter)
        if item >= a.items:
            break
        group = item % a.groups
        row_group = item // a.groups % a.row_groups
        low = item // (a.groups * a.row_groups)
        block_first, block_last = group * a.width, min(a.blocks, (group + 1) * a.width)
        row_first, row_last = row_group * a.rows // a.row_groups, (row_group + 1) * a.rows // a.row_groups
        for direction in range(low, low + 1 if a.split else k):
            for block in range(block_first, block_last):
                w, c = block - block_first, block * W
                read_states(all_A + V * n * w, a.A + (direction * d + c) * 4 * n, n, d - c, np.float32(LOG2E))
                for j in range(n):
                    store(all_dA + V * (n * w + j), zeros())
                store(all_dD + V * w, zeros())
                store(all_dbias + V * w, zeros())
            for row in range(row_first, row_last):
                sample = 0 if a.offsets else row
                first, last, tile_first = 0, m, (sample * k + direction) * a.tiles
                if a.offsets:
                    cut = a.offsets + 4 * (direction * (a.rows + 1) + row)
                    first, last = load_i32(cut), load_i32(cut + 4)
                    tile_first += first // TILE + row
                for block in range(block_first, block_last):
                    w, c = block - block_first, block * W
                    state = ((row * k + direction) * d + c) * 4 * n
                    read_states(all_g + V * n * w, a.dfinal + state if a.dfinal else 0, n, d - c, np.float32(1.0))
                visits = a.order + sample * a.order_b + direction * a.order_k
                B = a.B + sample * a.B_b + direction * a.B_k
                C = a.C + sample * a.C_b + direction * a.C_k
                # Sums over channels go to (groups, b, l, k, n).
                maps_out = (((group * a.b + sample) * a.l) * k + direction) * 4 * n
                add_u = a.share_u and (direction > 0 or not a.complete)
                add_z = a.share_z and (direction > 0 or not a.complete)
                tiles = (last - first + TILE - 1) // TILE
                for back in range(tiles):
                    tile = tiles - 1 - back
                    start = first + tile * TILE
                    steps = min(TILE, last - start)
                    for t in range(steps):
                        i = load_i32(visits + 4 * (start + t))
                        store_i64(maps + 16 * t, nothing if i < 0 else B + i * B_l)
                        store_i64(maps + 16 * t + 8, nothing if i < 0 else C + i * C_l)
                    for block in range(block_first, block_last):
                        w, c = block - block_first, block * W
                        count = d - c
                        channel = direction * d + c
                        bias = read(a.bias + 4 * channel, count) if a.bias else zeros()
                        skip = read(a.D + 4 * channel, count) if a.D else zeros()
                        u = a.u + sample * a.u_b + direction * a.u_k + 4 * c
                        dt = a.dt + sample * a.dt_b + direction * a.dt_k + 4 * c
                        z = a.z + sample * a.z_b + direction * a.z_k + 4 * c
                        dout = a.dy + sample * a.dy_b + direction * a.dy_k + 4 * c
                        du = a.du + sample * a.du_b + direction * a.du_k + 4 * c
                        ddt = a.ddt + sample * a.ddt_b + direction * a.ddt_k + 4 * c
                        dz = a.dz + sample * a.dz_b + direction * a.dz_k + 4 * c
                        for t in range(steps):
                            i = load_i32(visits + 4 * (start + t))
                            if start + t + AHEAD < last:
                                later = load_i32(visits + 4 * (start + t + AHEAD))
                                prefetch(dt + later * dt_l)
                                prefetch(u + later * u_l)
                                prefetch(dout + later * dy_l)
                            step, x, out = bias, zeros(), zeros()
                            if i >= 0:
                                step, x = step + read(dt + i * dt_l, count), read(u + i * u_l, count)
                                out = read(dout + i * dy_l, count) * scale
                                if a.z:
                                    gate = read(z + i * z_l, count)
                                    store(ungated + V * t, out)
                                    out = out * gate * sigmoid(gate, exp_minus_abs(gate))
                            if use_softplus:
                                e = exp_minus_abs(step)
                                store(slope + V * t, sigmoid(step, e))
                                step = softplus(step, e)
                            store(delta + V * t, step)
                            store(tokens + V * t, x)
                            store(drive + V * t, step * x)
                            store(dy + V * t, out)
                            store(y + V * t, skip * x)
                            store(into + V * t, zeros())
                            store(through + V * t, zeros())
                        h = a.saved + ((tile_first + tile) * a.blocks + block) * V * n
                        A, g, dA = all_A + V * n * w, all_g + V * n * w, all_dA + V * n * w
                        fresh = w == 0
                        for j in range(0, n - 3, 4):
                            at, to = V * j, V * (j // 4)
                            four_states(
                                h + at, A + at, g + at, dA + at, delta, drive, dy, y, into, through, decays, states,
                                dB + to, dC + to, maps, steps, j, sums, fresh,
                            )  # fmt: skip
                        for j in range(n - n % 4, n):
                            at, to = V * j, V * (n // 4 + j % 4)
                            one_state(
                                h + at, A + at, g + at, dA + at, delta, drive, dy, y, into, through, decays, states,
                                dB + to, dC + to, maps, steps, j, sums, fresh,
                            )  # fmt: skip
                        sum_D, sum_bias = load(all_dD + V * w), load(all_dbias + V * w)
                        for t in range(steps):
                            i = load_i32(visits + 4 * (start + t))
                            x, out, drives = load(tokens + V * t), load(dy + V * t), load(into + V * t)
                            grad = load(through + V * t) * ln2 + drives * x
                            if use_softplus:
                                grad = grad * load(slope + V * t)
                            sum_bias = sum_bias + grad
                            sum_D = sum_D + out * x
                            if i >= 0:
                                write(ddt + i * ddt_l, grad, count)
                                grad = drives * load(delta + V * t) + skip * out
                                if add_u:
                                    grad = grad + read(du + i * du_l, count)
                                write(du + i * du_l, grad, count)
                                if a.z:
                                    gate = read(z + i * z_l, count)
                                    s = sigmoid(gate, exp_minus_abs(gate))
                                    grad = load(ungated + V * t) * load(y + V * t) * s * (one + gate * (one - s))
                                    if add_z:
                                        grad = grad + read(dz + i * dz_l, count)
                                    write(dz + i * dz_l, grad, count)
                        store(all_dD + V * w, sum_D)
                        store(all_dbias + V * w, sum_bias)
                    for t in range(steps):
                        i = load_i32(visits + 4 * (start + t))
                        if i >= 0:
                            to, source = maps_out + i * k * 4 * n, sums * t
                            for j in range(n // 4):
                                store_quarters(a.dB + to + 16 * j, load(dB + source + V * j))
                                store_quarters(a.dC + to + 16 * j, load(dC + source + V * j))
                            for j in range(n % 4):
                                at, source = to + 4 * (n - n % 4 + j), sums * t + V * (n // 4 + j)
                                store_f32(a.dB + at, lane_sum(load(dB + source)))
                                store_f32(a.dC + at, lane_sum(load(dC + source)))
                for block in range(block_first, block_last):
                    w, c = block - block_first, block * W
                    if a.dinitial:
                        write_states(all_g + V * n * w, a.dinitial + ((row * k + direction) * d + c) * 4 * n, n, d - c)
            for block in range(block_first, block_last):
                w, c = block - block_first, block * W
                channel = (row_group * k + direction) * d + c
                write_states(all_dA + V * n * w, a.dA + channel * 4 * n, n, d - c)
                write(a.dD + 4 * channel, load(all_dD + V * w), d - c)
                write(a.dbias + 4 * channel, load(all_dbias + V * w), d - c)


kernel = Kernel(scan_backward, FIELDS)

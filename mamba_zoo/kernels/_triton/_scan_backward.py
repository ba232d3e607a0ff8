"""The backward kernel of the selective scan.

Programs and shapes are those of the forward kernel. The forward pass saved the state before every S-th step; from there
a chunk of S steps is run again, keeping the state before every tile of T steps in `scratch` (which stays in the cache),
and then each tile, last first, is run once more with its states in registers and walked back.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: RUF005, SIM108 (kernels cannot unpack into a tuple; a compile-time choice is an if statement)

import triton
import triton.language as tl

from ._math import LN2, LOG2E, sigmoid
from ._tiles import (
    in_state,
    in_tile,
    load_tile,
    load_tokens,
    over_channels,
    per_channel,
    per_state,
    row_of_program,
    step_size,
    store_tile,
    together,
)

INTEGERS = [
    "l", "m", "k", "d", "blocks", "rows", "slots", "dB_block", "state_size",
    "order_b", "order_k", "u_b", "u_l", "u_k", "dt_b", "dt_l", "dt_k", "z_b", "z_l", "z_k", "dy_b", "dy_l", "dy_k",
    "B_b", "B_l", "B_k", "C_b", "C_l", "C_k",
]  # fmt: skip


@triton.jit
def add_tile(base, tokens, stride, lanes, ok, value, WIDE: tl.constexpr, ATOMIC: tl.constexpr):
    """Add rows (T, lanes) to those of other channel blocks, or write them to this block's own buffer."""
    mask = (tokens >= 0)[:, None] & ok[None, :]
    at = base + in_tile(tokens, stride, lanes, WIDE)
    if ATOMIC:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value, mask=mask)


@triton.jit(do_not_specialize=[*INTEGERS, "scale"])
def scan_backward(
    u, dt, A, B, C, D, z, bias, order, offsets, initial, saved, scratch, dy, dfinal,
    du, ddt, dA, dB, dC, dD, dz, dbias, dinitial, scale,
    l, m, k, d, blocks, rows, slots, dB_block, state_size,
    order_b, order_k, u_b, u_l, u_k, dt_b, dt_l, dt_k, z_b, z_l, z_k, dy_b, dy_l, dy_k,
    B_b, B_l, B_k, C_b, C_l, C_k,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, DL: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Write `du, ddt, dz (b, l, k, d)`, add to or write `dB, dC (b, l, k, n)`, and write each row's share of the rest.

    The shares are `dA (rows, k, n, d)`, `dD` and `dbias (rows, k, d)`; `dinitial` is `(rows, k, n, d)`. Strides as in
    the forward kernel; `scale` multiplies dy.
    """
    sample, direction, block, row, first, last = row_of_program(offsets, m, k, blocks, rows)
    width = d // V * V
    lane = block * (R * DL) + tl.arange(0, R * DL)
    state = tl.arange(0, NP)
    lane_ok = lane < width
    state_ok = state < N
    in_h, h_ok = in_state(block, d, N, NP, R, DL)

    order += sample * order_b + direction * order_k
    u += (sample * u_b + direction * u_k) * V
    dt += (sample * dt_b + direction * dt_k) * V
    dy += (sample * dy_b + direction * dy_k) * V
    B += (sample * B_b + direction * B_k) * VN
    C += (sample * C_b + direction * C_k) * VN
    du += (sample * l * k + direction) * width
    ddt += (sample * l * k + direction) * width
    dB += block.to(tl.int64) * dB_block + (sample * l * k + direction) * N
    dC += block.to(tl.int64) * dB_block + (sample * l * k + direction) * N
    if z is not None:
        z += (sample * z_b + direction * z_k) * V
        dz += (sample * l * k + direction) * width
    A2 = tl.load(A + direction * N * d + in_h, mask=h_ok, other=0.0) * LOG2E
    shift = tl.load(bias + direction * d + lane, mask=lane_ok, other=0.0)[None, :] if bias is not None else 0.0
    skip = tl.load(D + direction * d + lane, mask=lane_ok, other=0.0)[None, :] if D is not None else 0.0
    in_row = (row * k + direction) * N * d
    saved += ((sample * k + direction) * slots + first // S) * N * d
    in_scratch = in_state(0, R * DL, NP, NP, R, DL)[0]
    scratch += tl.program_id(0).to(tl.int64) * (S // T - 1) * state_size

    if dfinal is not None:
        g = tl.load(dfinal + in_row + in_h, mask=h_ok, other=0.0)
    else:
        g = tl.zeros((NP, R, DL), tl.float32)
    sum_A = tl.zeros((NP, R, DL), tl.float32)
    sum_D = tl.zeros((T, R * DL), tl.float32)
    sum_bias = tl.zeros((T, R * DL), tl.float32)

    tiles = tl.cdiv(last - first, T)
    chunks = tl.cdiv(last - first, S)
    end = first + (tiles - 1) * T
    now = load_tokens(order, end, first, last, T)
    soon = load_tokens(order, end - T, first, last, T)
    x = load_tile(u, now, u_l * V, lane, lane_ok, WIDE).to(tl.float32)
    delta = load_tile(dt, now, dt_l * V, lane, lane_ok, WIDE).to(tl.float32)
    delta, slope = step_size(delta + shift, now, SOFTPLUS)
    through = load_tile(dy, now, dy_l * V, lane, lane_ok, WIDE).to(tl.float32) * scale
    gate, opened = through, through
    if z is not None:
        gate = load_tile(z, now, z_l * V, lane, lane_ok, WIDE).to(tl.float32)
        opened = sigmoid(gate)
    B_now = load_tile(B, now, B_l * VN, state, state_ok, WIDE).to(tl.float32)
    C_now = load_tile(C, now, C_l * VN, state, state_ok, WIDE).to(tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i
        begin = first + chunk * S
        if chunk > 0:
            h = tl.load(saved + (chunk - 1).to(tl.int64) * N * d + in_h, mask=h_ok, other=0.0)
        elif initial is not None:
            h = tl.load(initial + in_row + in_h, mask=h_ok, other=0.0)
        else:
            h = tl.zeros((NP, R, DL), tl.float32)
        inside = tl.minimum(tiles - chunk * (S // T), S // T)
        if S > T:
            token = load_tokens(order, begin, first, last, T)
            ahead = load_tokens(order, begin + T, first, last, T)
            x_fill = load_tile(u, token, u_l * V, lane, lane_ok, WIDE).to(tl.float32)
            delta_fill = load_tile(dt, token, dt_l * V, lane, lane_ok, WIDE).to(tl.float32)
            delta_fill, _ = step_size(delta_fill + shift, token, SOFTPLUS)
            B_fill = load_tile(B, token, B_l * VN, state, state_ok, WIDE).to(tl.float32)
            for q in range(inside - 1):
                later = load_tokens(order, begin + (q + 2) * T, first, last, T)
                u_next = load_tile(u, ahead, u_l * V, lane, lane_ok, WIDE)
                dt_next = load_tile(dt, ahead, dt_l * V, lane, lane_ok, WIDE)
                B_next = load_tile(B, ahead, B_l * VN, state, state_ok, WIDE)
                tl.store(scratch + q * state_size + in_scratch, h)
                deltas = per_channel(delta_fill, R)
                drives = per_channel(delta_fill * x_fill, R)
                Bs = per_state(B_fill)
                for j in tl.static_range(T):
                    h = tl.exp2(deltas[j][None] * A2) * h + drives[j][None] * Bs[j][:, :, None]
                x_fill, B_fill = u_next.to(tl.float32), B_next.to(tl.float32)
                delta_fill, _ = step_size(dt_next.to(tl.float32) + shift, ahead, SOFTPLUS)
                ahead = later
            tl.debug_barrier()
        for p in range(inside):
            q = inside - 1 - p
            start = begin + q * T
            # All loads of the tile before this one come before the stores of this one, which would hold them back.
            later = load_tokens(order, start - 2 * T, first, last, T)
            u_next = load_tile(u, soon, u_l * V, lane, lane_ok, WIDE)
            dt_next = load_tile(dt, soon, dt_l * V, lane, lane_ok, WIDE)
            dy_next = load_tile(dy, soon, dy_l * V, lane, lane_ok, WIDE)
            z_next = load_tile(z, soon, z_l * V, lane, lane_ok, WIDE) if z is not None else u_next
            B_next = load_tile(B, soon, B_l * VN, state, state_ok, WIDE)
            C_next = load_tile(C, soon, C_l * VN, state, state_ok, WIDE)
            if S > T:
                h_next = tl.load(scratch + tl.maximum(q - 1, 0) * state_size + in_scratch)
            else:
                h_next = h

            gated = through
            if z is not None:
                gated = through * gate * opened
            deltas = per_channel(delta, R)
            drives = per_channel(delta * x, R)
            dys = per_channel(gated, R)
            Bs = per_state(B_now)
            Cs = per_state(C_now)

            hs = (h,)
            ys = ()
            for j in tl.static_range(T):
                h = tl.exp2(deltas[j][None] * A2) * h + drives[j][None] * Bs[j][:, :, None]
                hs = hs + (h,)
                if z is not None:
                    ys = ys + (tl.sum(h * Cs[j][:, :, None], axis=0),)
            dBs = ()
            dCs = ()
            by_drive = ()
            by_decay = ()
            for j in tl.static_range(T - 1, -1, -1):
                dy_j = dys[j][None]
                g += dy_j * Cs[j][:, :, None]
                dCs = (over_channels(dy_j * hs[j + 1]),) + dCs
                dBs = (over_channels(drives[j][None] * g),) + dBs
                by_drive = (tl.sum(g * Bs[j][:, :, None], axis=0),) + by_drive
                g *= tl.exp2(deltas[j][None] * A2)
                decayed = g * hs[j]
                sum_A += decayed * deltas[j][None]
                by_decay = (tl.sum(decayed * A2, axis=0),) + by_decay

            drive = together(by_drive, T)
            slope *= together(by_decay, T) * LN2 + drive * x
            sum_bias += slope
            drive *= delta
            if D is not None:
                drive += skip * gated
                sum_D += gated * x
            store_tile(du, now, k * width, lane, lane_ok, drive, WIDE)
            store_tile(ddt, now, k * width, lane, lane_ok, slope, WIDE)
            if z is not None:
                out = together(ys, T)
                if D is not None:
                    out += skip * x
                out *= through * opened * (1.0 + gate * (1.0 - opened))
                store_tile(dz, now, k * width, lane, lane_ok, out, WIDE)
            add_tile(dB, now, k * N, state, state_ok, together(dBs, T), WIDE, ATOMIC)
            add_tile(dC, now, k * N, state, state_ok, together(dCs, T), WIDE, ATOMIC)
            h = h_next
            # Prepared here and carried: within an iteration the compiler would repeat this work in every lane that
            # shares a channel.
            x = u_next.to(tl.float32)
            delta, slope = step_size(dt_next.to(tl.float32) + shift, soon, SOFTPLUS)
            through = dy_next.to(tl.float32) * scale
            gate, opened = through, through
            if z is not None:
                gate = z_next.to(tl.float32)
                opened = sigmoid(gate)
            B_now, C_now = B_next.to(tl.float32), C_next.to(tl.float32)
            now, soon = soon, later
        if S > T:
            tl.debug_barrier()

    tl.store(dA + in_row + in_h, sum_A, mask=h_ok)
    in_row = (row * k + direction) * d
    if D is not None:
        tl.store(dD + in_row + lane, tl.sum(sum_D, axis=0), mask=lane_ok)
    if bias is not None:
        tl.store(dbias + in_row + lane, tl.sum(sum_bias, axis=0), mask=lane_ok)
    if initial is not None:
        tl.store(dinitial + in_row * N + in_h, g, mask=h_ok)

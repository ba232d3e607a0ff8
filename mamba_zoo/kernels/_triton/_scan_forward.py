"""The forward kernel of the selective scan.

One program carries the states of `R * DL` channels of one direction of one row through all its steps, a tile of T
steps at a time. The state has shape (NP, R, DL), of channel `block * R * DL + r * DL + c`: so a lane holds NP states of
a channel (or a part of them), and sums over n need few exchanges between lanes or none.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: RUF005 (kernels cannot unpack into a tuple; a compile-time choice is an if statement)

import triton
import triton.language as tl

from ._math import LOG2E, sigmoid
from ._tiles import (
    in_state,
    load_tile,
    load_tokens,
    per_channel,
    per_state,
    row_of_program,
    step_size,
    store_tile,
    together,
)  # fmt: skip

INTEGERS = [
    "l", "m", "k", "d", "blocks", "rows", "slots",
    "order_b", "order_k", "u_b", "u_l", "u_k", "dt_b", "dt_l", "dt_k", "z_b", "z_l", "z_k",
    "B_b", "B_l", "B_k", "C_b", "C_l", "C_k",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def scan_forward(
    u, dt, A, B, C, D, z, bias, order, offsets, initial, y, final, saved,
    l, m, k, d, blocks, rows, slots,
    order_b, order_k, u_b, u_l, u_k, dt_b, dt_l, dt_k, z_b, z_l, z_k, B_b, B_l, B_k, C_b, C_l, C_k,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, DL: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `y (b, l, k, d)`, `final (rows, k, n, d)` and, every S steps, `saved (b, k, slots, n, d)`, where given.

    Strides (and d) of channel rows are given in units of V elements, those of B and C in units of VN, so that the
    compiler knows how wide it may read.
    """
    sample, direction, block, row, first, last = row_of_program(offsets, m, k, blocks, rows)
    width = d // V * V  # d itself, known to the compiler as a multiple of V
    lane = block * (R * DL) + tl.arange(0, R * DL)
    state = tl.arange(0, NP)
    lane_ok = lane < width
    state_ok = state < N
    in_h, h_ok = in_state(block, d, N, NP, R, DL)

    order += sample * order_b + direction * order_k
    u += (sample * u_b + direction * u_k) * V
    dt += (sample * dt_b + direction * dt_k) * V
    B += (sample * B_b + direction * B_k) * VN
    C += (sample * C_b + direction * C_k) * VN
    y += (sample * l * k + direction) * width
    if z is not None:
        z += (sample * z_b + direction * z_k) * V
    A2 = tl.load(A + direction * N * d + in_h, mask=h_ok, other=0.0) * LOG2E
    shift = tl.load(bias + direction * d + lane, mask=lane_ok, other=0.0)[None, :] if bias is not None else 0.0
    skip = tl.load(D + direction * d + lane, mask=lane_ok, other=0.0)[None, :] if D is not None else 0.0
    in_row = (row * k + direction) * N * d
    if initial is not None:
        h = tl.load(initial + in_row + in_h, mask=h_ok, other=0.0)
    else:
        h = tl.zeros((NP, R, DL), tl.float32)
    if saved is not None:
        saved += ((sample * k + direction) * slots + first // S) * N * d

    now = load_tokens(order, first, first, last, T)
    soon = load_tokens(order, first + T, first, last, T)
    u_now = load_tile(u, now, u_l * V, lane, lane_ok, WIDE)
    dt_now = load_tile(dt, now, dt_l * V, lane, lane_ok, WIDE)
    B_now = load_tile(B, now, B_l * VN, state, state_ok, WIDE).to(tl.float32)
    C_now = load_tile(C, now, C_l * VN, state, state_ok, WIDE).to(tl.float32)
    z_now = load_tile(z, now, z_l * V, lane, lane_ok, WIDE) if z is not None else u_now
    for start in range(first, last, T):
        # All loads of the next tile come before the stores of this one, which would hold them back.
        later = load_tokens(order, start + 2 * T, first, last, T)
        u_next = load_tile(u, soon, u_l * V, lane, lane_ok, WIDE)
        dt_next = load_tile(dt, soon, dt_l * V, lane, lane_ok, WIDE)
        B_next = load_tile(B, soon, B_l * VN, state, state_ok, WIDE)
        C_next = load_tile(C, soon, C_l * VN, state, state_ok, WIDE)
        z_next = load_tile(z, soon, z_l * V, lane, lane_ok, WIDE) if z is not None else u_next
        if saved is not None:
            done = start - first
            if (done > 0) & (done % S == 0):
                tl.store(saved + (done // S - 1).to(tl.int64) * N * d + in_h, h, mask=h_ok)

        delta, _ = step_size(dt_now.to(tl.float32) + shift, now, SOFTPLUS)
        x = u_now.to(tl.float32)
        deltas = per_channel(delta, R)
        drives = per_channel(delta * x, R)
        Bs = per_state(B_now)
        Cs = per_state(C_now)
        outs = ()
        for j in tl.static_range(T):
            a = tl.exp2(deltas[j][None] * A2)
            h = a * h + drives[j][None] * Bs[j][:, :, None]
            outs = outs + (tl.sum(h * Cs[j][:, :, None], axis=0),)
        out = together(outs, T)
        if D is not None:
            out += skip * x
        if z is not None:
            gate = z_now.to(tl.float32)
            out *= gate * sigmoid(gate)
        store_tile(y, now, k * width, lane, lane_ok, out, WIDE)
        now, soon = soon, later
        u_now, dt_now, z_now = u_next, dt_next, z_next
        B_now, C_now = B_next.to(tl.float32), C_next.to(tl.float32)
    if final is not None:
        tl.store(final + in_row + in_h, h, mask=h_ok)

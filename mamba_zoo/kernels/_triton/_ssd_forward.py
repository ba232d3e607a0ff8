"""The forward kernels of the state-space dual, and the states that its backward reads.

A program takes one head (and a block of its channels) through one segment, chunk after chunk, with its state in
registers. Four products of matrices make a chunk: C with the state, C with B, their masked product with x, and B with
x for the next state.

Tokens are read one chunk ahead: were they read in the turn that uses them, Triton would copy them to shared memory in
the same queue as the tiles they point to, and every turn would wait for the tiles of the next.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: SIM102 (a compile-time choice is an if statement of its own)

import triton
import triton.language as tl

from ._ssd_tiles import (
    causal,
    entering_state,
    in_states,
    place_of_segment,
    product,
    store_outside,
    tokens_of_chunk,
)
from ._tiles import load_tile, store_tile

SIZES = ["m", "k", "h", "per_group", "blocks", "chunks", "segments", "per_segment", "rows", "order_b", "order_k"]
FORWARD = [*SIZES, "l", "x_b", "x_l", "x_k", "x_h", "B_b", "B_l", "B_k", "B_g", "C_b", "C_l", "C_k", "C_g"]
FORWARD += ["D_k", "D_h"]
STATES = [*SIZES, "v_b", "v_l", "v_k", "v_h", "M_b", "M_l", "M_k", "M_g"]


@triton.jit(do_not_specialize=FORWARD)
def ssd_forward(
    x, B, C, D, deltas, sums_of_steps, order, first_chunk, initial, ends, y, final,
    m, k, h, per_group, blocks, chunks, segments, per_segment, rows, order_b, order_k,
    l, x_b, x_l, x_k, x_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, D_k, D_h,
    DP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, Q: tl.constexpr,
    V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `y (b, l, k, h, p)` and `final (rows, k, h, p, n)`, where given.

    Strides of x are in units of V elements, those of B and C in units of VN, so that the compiler knows how wide it may
    read.
    """
    block, head, direction, segment, row, sample, first, last = place_of_segment(
        first_chunk, chunks, segments, per_segment, rows, k, h, blocks
    )
    group = head // per_group
    lane = block * PB + tl.arange(0, PB)
    state_lane = tl.arange(0, NP)
    lane_ok = lane < P
    state_ok = state_lane < N
    order += sample * order_b + direction * order_k
    x += (sample * x_b + direction * x_k + head * x_h) * V
    B += (sample * B_b + direction * B_k + group * B_g) * VN
    C += (sample * C_b + direction * C_k + group * C_g) * VN
    y += (sample * l * k + direction) * h * P + head * P
    skip = 0.0
    if D is not None:
        skip = tl.load(D + direction * D_k + head * D_h + lane * DP, mask=lane_ok, other=0.0)[None, :]
    state = entering_state(
        initial, ends, row, direction, head, segment, segments, rows, k, h, block, False, N, NP, P, PB
    )
    step = tl.arange(0, Q)
    steps = ((sample * k + direction) * chunks * h + head) * Q
    deltas += steps
    sums_of_steps += steps
    total = tl.load(sums_of_steps + tl.full((), first, tl.int64) * h * Q + Q - 1, mask=first < last, other=0.0)
    upcoming = tokens_of_chunk(order, first, m, Q)
    for chunk in range(first, last):
        tokens = upcoming
        upcoming = tokens_of_chunk(order, chunk + 1, m, Q)
        maps_in = load_tile(B, tokens, B_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
        maps_out = load_tile(C, tokens, C_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
        value = load_tile(x, tokens, x_l * V, lane, lane_ok, WIDE)
        at = tl.full((), chunk, tl.int64) * h * Q
        delta = tl.load(deltas + at + step)
        sums = tl.load(sums_of_steps + at + step)
        following = tl.load(sums_of_steps + at + h * Q + Q - 1, mask=chunk + 1 < last, other=0.0)
        out = product(maps_out, state.to(DTYPE), PRECISION) * tl.exp2(sums)[:, None]
        mixed = product(maps_out, tl.trans(maps_in), PRECISION) * causal(sums, Q) * delta[None, :]
        out += product(mixed.to(DTYPE), value.to(DTYPE), PRECISION)
        wide = value.to(tl.float32)
        if D is not None:
            out += skip * wide
        store_tile(y, tokens, k * h * P, lane, lane_ok, out, WIDE)
        left = (tl.exp2(total - sums) * delta)[:, None] * wide
        state = state * tl.exp2(total) + product(tl.trans(maps_in), left.to(DTYPE), PRECISION)
        total = following
    if final is not None:
        if segment == segments - 1:
            store_outside(final, state, row, direction, head, k, h, block, N, NP, P, PB)


@triton.jit(do_not_specialize=STATES)
def ssd_states(
    values, maps, deltas, sums_of_steps, order, first_chunk, initial, ends, states, final,
    m, k, h, per_group, blocks, chunks, segments, per_segment, rows, order_b, order_k,
    v_b, v_l, v_k, v_h, M_b, M_l, M_k, M_g,
    REVERSE: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    PB: tl.constexpr, Q: tl.constexpr, V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """States alone: those that enter each chunk, `states (b, k, chunks, h, n, p)`, or where there are none of these,
    what each segment leaves, `ends`.

    Forwards the states of the scan, from x and B. With REVERSE the gradients of the states that leave the chunks, from
    dy and C, and `final` is the gradient of the initial state.
    """
    block, head, direction, segment, row, sample, first, last = place_of_segment(
        first_chunk, chunks, segments, per_segment, rows, k, h, blocks
    )
    if states is None:  # nothing reads what the last segment leaves
        if segment == (0 if REVERSE else segments - 1):
            return
    lane = block * PB + tl.arange(0, PB)
    state_lane = tl.arange(0, NP)
    lane_ok = lane < P
    state_ok = state_lane < N
    order += sample * order_b + direction * order_k
    values += (sample * v_b + direction * v_k + head * v_h) * V
    maps += (sample * M_b + direction * M_k + head // per_group * M_g) * VN
    inside, exists = in_states(block, N, NP, P, PB)
    if states is not None:
        state = entering_state(
            initial, ends, row, direction, head, segment, segments, rows, k, h, block, REVERSE, N, NP, P, PB
        )
        states += ((sample * k + direction) * chunks * h + head) * (N * P)
    else:
        state = tl.zeros((NP, PB), tl.float32)
    whole = 0.0
    step = tl.arange(0, Q)
    steps = ((sample * k + direction) * chunks * h + head) * Q
    deltas += steps
    sums_of_steps += steps
    begin = last - 1 if REVERSE else first
    total = tl.load(sums_of_steps + tl.full((), begin, tl.int64) * h * Q + Q - 1, mask=first < last, other=0.0)
    upcoming = tokens_of_chunk(order, tl.maximum(begin, 0), m, Q)
    for i in range(last - first):
        chunk = last - 1 - i if REVERSE else first + i
        next_chunk = chunk - 1 if REVERSE else chunk + 1
        tokens = upcoming
        upcoming = tokens_of_chunk(order, tl.maximum(next_chunk, 0), m, Q)
        rows_in = load_tile(maps, tokens, M_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
        value = load_tile(values, tokens, v_l * V, lane, lane_ok, WIDE).to(tl.float32)
        at = tl.full((), chunk, tl.int64) * h * Q
        sums = tl.load(sums_of_steps + at + step)
        following = tl.load(
            sums_of_steps + tl.full((), next_chunk, tl.int64) * h * Q + Q - 1, mask=i + 1 < last - first, other=0.0
        )
        if states is not None:
            tl.store(states + tl.full((), chunk, tl.int64) * h * (N * P) + inside, state, mask=exists)
        weight = tl.exp2(sums) if REVERSE else tl.exp2(total - sums) * tl.load(deltas + at + step)
        state = state * tl.exp2(total) + product(tl.trans(rows_in), (weight[:, None] * value).to(DTYPE), PRECISION)
        whole += total
        total = following
    if states is None:
        place = ((row * k + direction) * segments + segment) * h + head
        tl.store(ends + place * (N * P) + inside, state, mask=exists)
        totals = ends + tl.full((), rows, tl.int64) * k * segments * h * (N * P)
        tl.store(totals + place, whole)
    elif final is not None:
        if segment == (0 if REVERSE else segments - 1):
            store_outside(final, state, row, direction, head, k, h, block, N, NP, P, PB)

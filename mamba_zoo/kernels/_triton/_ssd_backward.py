"""The backward kernels of the state-space dual, given the states and their gradients between chunks.

Both take one chunk and heads of a group, one after another, so that the maps are read once and the next head is fetched
ahead. One is for the gradients of what belongs to a head, the other for those of B and C: summed over heads in
registers, without atomics, and the part within the chunk before it is multiplied by the other map.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: SIM102 (a compile-time choice is an if statement of its own)

import triton
import triton.language as tl

from ._math import exp_of_negative
from ._ssd_tiles import causal, in_states, product, tokens_of_chunk
from ._tiles import END, load_tile, store_tile

SIZES = ["m", "k", "h", "per_group", "chunks", "rows", "order_b", "order_k", "l"]
PARTS = [*SIZES, "g", "per_part", "parts"]
STRIDES = ["x_b", "x_l", "x_k", "x_h", "dy_b", "dy_l", "dy_k", "dy_h", *(f"{t}_{i}" for t in "BC" for i in "blkg")]
HEADS = [*PARTS, *STRIDES, "D_k", "D_h"]
MAPS = [*PARTS, "part_rows", *STRIDES]


@triton.jit(do_not_specialize=HEADS)
def ssd_backward_heads(
    x, A, B, C, D, deltas, sums_of_steps, order, first_chunk, states, ahead, dy, dx, ddt, ddecay, sums_of_heads,
    m, k, h, per_group, chunks, rows, order_b, order_k, l, g, per_part, parts,
    x_b, x_l, x_k, x_h, dy_b, dy_l, dy_k, dy_h,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, D_k, D_h,
    DP: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    PB: tl.constexpr, Q: tl.constexpr, V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dx (b, l, k, h, p)`, `ddt` and `ddecay (b, l, k, h)`, and in `sums_of_heads` each chunk's shares of the
    gradients of D `(k, h, p)`, A and the bias `(k, h)`, one after another.

    `states` and `ahead (b, k, chunks, h, n, p)` are the states that enter the chunks, and the gradients of those that
    leave them. The gradient in the decays is a sum over pairs of an earlier and a later step: nothing cancels in it.
    """
    pid = tl.program_id(0)
    part = pid % parts
    group = pid // parts % g
    direction = (pid // parts // g % k).to(tl.int64)
    chunk = pid // parts // g // k % chunks
    sample = (pid // parts // g // k // chunks).to(tl.int64)
    if first_chunk is not None:
        if chunk >= tl.load(first_chunk + direction * (rows + 1) + rows):
            return
    state_lane = tl.arange(0, NP)
    state_ok = state_lane < N
    tokens = tokens_of_chunk(order + sample * order_b + direction * order_k, chunk, m, Q)
    B += (sample * B_b + direction * B_k + group * B_g) * VN
    C += (sample * C_b + direction * C_k + group * C_g) * VN
    maps_in = load_tile(B, tokens, B_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    maps_out = load_tile(C, tokens, C_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    overlap = product(maps_out, tl.trans(maps_in), PRECISION)
    x += (sample * x_b + direction * x_k) * V
    dy += (sample * dy_b + direction * dy_k) * V
    in_rows = (sample * l * k + direction) * h
    dx += in_rows * P
    ddt += in_rows
    if ddecay is not None:
        ddecay += in_rows
    place = ((sample * k + direction) * chunks + chunk) * h
    sums_of_heads += (sample * chunks + chunk) * k * h * (P + 2)
    step = tl.arange(0, Q)
    at_tokens = tokens.to(tl.int64) if WIDE else tokens
    start = group * per_group + part * per_part
    stop = tl.minimum(start + per_part, (group + 1) * per_group)
    for head in range(start, stop):
        at = place + head
        in_k = direction * h + head
        delta = tl.load(deltas + at * Q + step)
        sums = tl.load(sums_of_steps + at * Q + step)
        total = tl.load(sums_of_steps + at * Q + Q - 1)
        left = tl.exp2(total - sums)
        mixed = overlap * causal(sums, Q)
        scaled = tl.trans((mixed * delta[None, :]).to(DTYPE))
        later = tl.zeros((Q,), tl.float32)  # for each step, what it reads from earlier ones of the chunk
        earlier = tl.zeros((Q,), tl.float32)  # what later ones read from it
        from_state = tl.zeros((Q,), tl.float32)
        to_state = tl.zeros((Q,), tl.float32)
        through = 0.0
        for block in tl.static_range(0, P, PB):
            lane = block + tl.arange(0, PB)
            lane_ok = lane < P
            inside, exists = in_states(block // PB, N, NP, P, PB)
            value = load_tile(x + head * x_h * V, tokens, x_l * V, lane, lane_ok, WIDE)
            grad = load_tile(dy + head * dy_h * V, tokens, dy_l * V, lane, lane_ok, WIDE)
            coming = tl.load(ahead + at * (N * P) + inside, mask=exists, other=0.0)
            state = tl.load(states + at * (N * P) + inside, mask=exists, other=0.0)
            through += tl.sum(tl.sum(state.to(tl.float32) * coming.to(tl.float32), axis=1), axis=0)
            wide = value.to(tl.float32)
            steep = grad.to(tl.float32)

            pairs = product(grad.to(DTYPE), tl.trans(value.to(DTYPE)), PRECISION) * mixed
            later += tl.sum(pairs * delta[None, :], axis=1)
            earlier += tl.sum(pairs, axis=0)

            read = product(maps_out, state, PRECISION)
            from_state += tl.sum(read * steep, axis=1) * tl.exp2(sums)
            gradient = product(maps_in, coming, PRECISION) * left[:, None]
            to_state += tl.sum(gradient * wide, axis=1)
            gradient = gradient * delta[:, None] + product(scaled, grad.to(DTYPE), PRECISION)
            if D is not None:
                skip = tl.load(D + direction * D_k + head * D_h + lane * DP, mask=lane_ok, other=0.0)
                gradient += skip[None, :] * steep
                tl.store(sums_of_heads + in_k * P + lane, tl.sum(steep * wide, axis=0), mask=lane_ok)
            store_tile(dx + head * P, tokens, k * h * P, lane, lane_ok, gradient, WIDE)

        gone = to_state * delta
        own = later - earlier * delta + from_state
        dlog = tl.cumsum(own, 0, reverse=True) + (tl.cumsum(gone, 0) - gone) + tl.exp2(total) * through
        ddelta = earlier + to_state
        if ddecay is not None:
            tl.store(ddecay + head + at_tokens * (k * h), dlog, mask=tokens >= 0)
        else:
            tl.store(sums_of_heads + k * h * P + in_k, tl.sum(dlog * delta, axis=0))
            ddelta += tl.load(A + in_k) * dlog
        # That of softplus is 1 - exp(-delta), by its series where the difference would lose digits.
        if SOFTPLUS:
            series = delta * (1.0 - delta * (1.0 / 2 - delta * (1.0 / 6 - delta / 24)))
            ddelta *= tl.where(delta < 0.05, series, 1.0 - exp_of_negative(-delta))
        else:
            ddelta = tl.where(tokens != END, ddelta, 0.0)
        tl.store(ddt + head + at_tokens * (k * h), ddelta, mask=tokens >= 0)
        tl.store(sums_of_heads + k * h * (P + 1) + in_k, tl.sum(ddelta, axis=0))


@triton.jit(do_not_specialize=MAPS)
def ssd_backward_maps(
    x, B, C, deltas, sums_of_steps, order, first_chunk, states, ahead, dy, dB, dC,
    m, k, h, per_group, chunks, rows, order_b, order_k, l, g, per_part, parts, part_rows,
    x_b, x_l, x_k, x_h, dy_b, dy_l, dy_k, dy_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, Q: tl.constexpr,
    V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dB` and `dC (parts, b, l, k, g, n)`, each part summed over some heads of the group.

    `states` and `ahead` as for `ssd_backward_heads`.
    """
    pid = tl.program_id(0)
    part = pid % parts
    group = pid // parts % g
    direction = (pid // parts // g % k).to(tl.int64)
    chunk = pid // parts // g // k % chunks
    sample = (pid // parts // g // k // chunks).to(tl.int64)
    if first_chunk is not None:
        if chunk >= tl.load(first_chunk + direction * (rows + 1) + rows):
            return
    tokens = tokens_of_chunk(order + sample * order_b + direction * order_k, chunk, m, Q)
    x += (sample * x_b + direction * x_k) * V
    dy += (sample * dy_b + direction * dy_k) * V
    place = ((sample * k + direction) * chunks + chunk) * h
    step = tl.arange(0, Q)
    from_ahead = tl.zeros((Q, NP), tl.float32)
    from_state = tl.zeros((Q, NP), tl.float32)
    between = tl.zeros((Q, Q), tl.float32)
    start = group * per_group + part * per_part
    stop = tl.minimum(start + per_part, (group + 1) * per_group)
    for head in range(start, stop):
        at = place + head
        delta = tl.load(deltas + at * Q + step)
        sums = tl.load(sums_of_steps + at * Q + step)
        total = tl.load(sums_of_steps + at * Q + Q - 1)
        pairs = tl.zeros((Q, Q), tl.float32)
        for block in tl.static_range(0, P, PB):
            lane = block + tl.arange(0, PB)
            lane_ok = lane < P
            inside, exists = in_states(block // PB, N, NP, P, PB)
            value = load_tile(x + head * x_h * V, tokens, x_l * V, lane, lane_ok, WIDE)
            grad = load_tile(dy + head * dy_h * V, tokens, dy_l * V, lane, lane_ok, WIDE)
            state = tl.load(states + at * (N * P) + inside, mask=exists, other=0.0)
            coming = tl.load(ahead + at * (N * P) + inside, mask=exists, other=0.0)
            read = (grad.to(tl.float32) * tl.exp2(sums)[:, None]).to(DTYPE)
            from_state = tl.dot(read, tl.trans(state), acc=from_state, input_precision=PRECISION)
            left = (value.to(tl.float32) * (tl.exp2(total - sums) * delta)[:, None]).to(DTYPE)
            from_ahead = tl.dot(left, tl.trans(coming), acc=from_ahead, input_precision=PRECISION)
            pairs += product(grad.to(DTYPE), tl.trans(value.to(DTYPE)), PRECISION)
        between += pairs * causal(sums, Q) * delta[None, :]
    state_lane = tl.arange(0, NP)
    state_ok = state_lane < N
    out = (part.to(tl.int64) * part_rows + (sample * l * k + direction) * g + group) * N
    weights = between.to(DTYPE)
    B += (sample * B_b + direction * B_k + group * B_g) * VN
    maps_in = load_tile(B, tokens, B_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    from_state = tl.dot(weights, maps_in, acc=from_state, input_precision=PRECISION)
    store_tile(dC + out, tokens, k * g * N, state_lane, state_ok, from_state, WIDE)
    C += (sample * C_b + direction * C_k + group * C_g) * VN
    maps_out = load_tile(C, tokens, C_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    from_ahead = tl.dot(tl.trans(weights), maps_out, acc=from_ahead, input_precision=PRECISION)
    store_tile(dB + out, tokens, k * g * N, state_lane, state_ok, from_ahead, WIDE)

"""The backward kernels of the state-space dual, given the states and their gradients between chunks.

One takes a head through a chunk, for the gradients of what belongs to the head. The other takes one chunk and the heads
of a group, one after another, for the gradient of B, or of C: summed over heads in registers, without atomics, and the
part within the chunk before it is multiplied by the other map. Both in one kernel do not fit its registers.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: SIM102 (a compile-time choice is an if statement of its own)

import triton
import triton.language as tl

from ._ssd_forward import STEPS
from ._ssd_tiles import causal, in_states, product, steps_of_head, tokens_of_chunk
from ._tiles import load_tile, store_tile

SIZES = ["m", "k", "h", "per_group", "chunks", "rows", "order_b", "order_k", "l"]
ROWS = ["x_b", "x_l", "x_k", "x_h", "dy_b", "dy_l", "dy_k", "dy_h"]
HEADS = [*SIZES, *STEPS, *ROWS, "B_b", "B_l", "B_k", "B_g", "C_b", "C_l", "C_k", "C_g"]
MAPS = [*SIZES, "g", "per_part", "parts", "part_rows", *STEPS, *ROWS, "M_b", "M_l", "M_k", "M_g"]


@triton.jit(do_not_specialize=HEADS)
def ssd_backward_heads(
    x, dt, A, B, C, D, decay, bias, order, first_chunk, states, ahead, dy, dx, ddt, ddecay, sums_of_heads,
    m, k, h, per_group, chunks, rows, order_b, order_k, l,
    dt_b, dt_l, dt_k, dt_h, decay_b, decay_l, decay_k, decay_h, x_b, x_l, x_k, x_h, dy_b, dy_l, dy_k, dy_h,
    B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, Q: tl.constexpr,
    V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dx (b, l, k, h, p)`, `ddt` and `ddecay (b, l, k, h)`, and each chunk's shares of the gradients of D, A and
    the bias, `sums_of_heads (b, chunks, k, h, p + 2)`.

    `states` and `ahead (b, k, chunks, h, n, p)` are the states that enter the chunks, and the gradients of those that
    leave them. The gradient in the decays is a sum over pairs of an earlier and a later step: nothing cancels in it.
    """
    pid = tl.program_id(0)
    head = (pid % h).to(tl.int64)
    direction = (pid // h % k).to(tl.int64)
    chunk = pid // h // k % chunks
    sample = (pid // h // k // chunks).to(tl.int64)
    if first_chunk is not None:
        if chunk >= tl.load(first_chunk + direction * (rows + 1) + rows):
            return
    group = head // per_group
    state_lane = tl.arange(0, NP)
    state_ok = state_lane < N
    tokens = tokens_of_chunk(order + sample * order_b + direction * order_k, chunk, m, Q)
    B += (sample * B_b + direction * B_k + group * B_g) * VN
    C += (sample * C_b + direction * C_k + group * C_g) * VN
    maps_in = load_tile(B, tokens, B_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    maps_out = load_tile(C, tokens, C_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    x += (sample * x_b + direction * x_k + head * x_h) * V
    dy += (sample * dy_b + direction * dy_k + head * dy_h) * V
    dt += sample * dt_b + direction * dt_k + head * dt_h
    in_rows = (sample * l * k + direction) * h + head
    dx += in_rows * P
    ddt += in_rows
    if decay is not None:
        decay += sample * decay_b + direction * decay_k + head * decay_h
        ddecay += in_rows
    in_k = direction * h + head
    rate = tl.load(A + in_k) if A is not None else 0.0
    shift = tl.load(bias + in_k) if bias is not None else 0.0
    place = (((sample * k + direction) * chunks + chunk) * h + head) * (N * P)
    sums_of_heads += (((sample * chunks + chunk) * k + direction) * h + head) * (P + 2)

    delta, slope, log = steps_of_head(dt, dt_l, decay, decay_l, rate, shift, tokens, SOFTPLUS, WIDE)
    sums = tl.cumsum(log, 0)
    total = tl.sum(log, 0)
    grown = tl.exp(sums)
    left = tl.exp(total - sums)
    mixed = product(maps_out, tl.trans(maps_in), PRECISION) * causal(sums, Q)
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
        value = load_tile(x, tokens, x_l * V, lane, lane_ok, WIDE)
        grad = load_tile(dy, tokens, dy_l * V, lane, lane_ok, WIDE)
        coming = tl.load(ahead + place + inside, mask=exists, other=0.0)
        state = tl.load(states + place + inside, mask=exists, other=0.0)
        through += tl.sum(tl.sum(state.to(tl.float32) * coming.to(tl.float32), axis=1), axis=0)
        wide = value.to(tl.float32)
        steep = grad.to(tl.float32)

        gradient = product(maps_in, coming, PRECISION) * left[:, None]
        to_state += tl.sum(gradient * wide, axis=1)
        gradient = gradient * delta[:, None] + product(scaled, grad.to(DTYPE), PRECISION)
        if D is not None:
            gradient += tl.load(D + in_k * P + lane, mask=lane_ok, other=0.0)[None, :] * steep
            tl.store(sums_of_heads + lane, tl.sum(steep * wide, axis=0), mask=lane_ok)
        store_tile(dx, tokens, k * h * P, lane, lane_ok, gradient, WIDE)

        read = product(maps_out, state, PRECISION)
        from_state += tl.sum(read * steep, axis=1) * grown
        pairs = product(grad.to(DTYPE), tl.trans(value.to(DTYPE)), PRECISION) * mixed
        later += tl.sum(pairs * delta[None, :], axis=1)
        earlier += tl.sum(pairs, axis=0)

    gone = to_state * delta
    own = later - earlier * delta + from_state
    dlog = tl.cumsum(own, 0, reverse=True) + (tl.cumsum(gone, 0) - gone) + tl.exp(total) * through
    ddelta = earlier + to_state
    at = tokens.to(tl.int64) if WIDE else tokens
    if decay is not None:
        tl.store(ddecay + at * (k * h), dlog, mask=tokens >= 0)
    else:
        tl.store(sums_of_heads + P, tl.sum(dlog * delta, axis=0))
        ddelta += rate * dlog
    ddelta *= slope
    tl.store(ddt + at * (k * h), ddelta, mask=tokens >= 0)
    tl.store(sums_of_heads + P + 1, tl.sum(ddelta, axis=0))


@triton.jit(do_not_specialize=MAPS)
def ssd_backward_maps(
    x, dt, A, maps, decay, bias, order, first_chunk, states, dy, grad_of_maps,
    m, k, h, per_group, chunks, rows, order_b, order_k, l, g, per_part, parts, part_rows,
    dt_b, dt_l, dt_k, dt_h, decay_b, decay_l, decay_k, decay_h, x_b, x_l, x_k, x_h, dy_b, dy_l, dy_k, dy_h,
    M_b, M_l, M_k, M_g,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    PB: tl.constexpr, Q: tl.constexpr, V: tl.constexpr, VN: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `dC (parts, b, l, k, g, n)`, or `dB` with REVERSE, each part summed over some heads of the group.

    For dC, `maps` is B and `states (b, k, chunks, h, n, p)` those that enter the chunks. For dB, `maps` is C and
    `states` are the gradients of those that leave them.
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
    dt += sample * dt_b + direction * dt_k
    if decay is not None:
        decay += sample * decay_b + direction * decay_k
    states += ((sample * k + direction) * chunks + chunk) * h * (N * P)
    result = tl.zeros((Q, NP), tl.float32)
    between = tl.zeros((Q, Q), tl.float32)
    start = group * per_group + part * per_part
    stop = tl.minimum(start + per_part, (group + 1) * per_group)
    for head in range(start, stop):
        in_k = direction * h + head
        rate = tl.load(A + in_k) if A is not None else 0.0
        shift = tl.load(bias + in_k) if bias is not None else 0.0
        own_decay = decay + head * decay_h if decay is not None else None
        delta, _, log = steps_of_head(dt + head * dt_h, dt_l, own_decay, decay_l, rate, shift, tokens, SOFTPLUS, WIDE)
        sums = tl.cumsum(log, 0)
        pairs = tl.zeros((Q, Q), tl.float32)
        for block in tl.static_range(0, P, PB):
            lane = block + tl.arange(0, PB)
            lane_ok = lane < P
            inside, exists = in_states(block // PB, N, NP, P, PB)
            value = load_tile(x + head * x_h * V, tokens, x_l * V, lane, lane_ok, WIDE)
            grad = load_tile(dy + head * dy_h * V, tokens, dy_l * V, lane, lane_ok, WIDE)
            state = tl.load(states + (in_k - direction * h) * (N * P) + inside, mask=exists, other=0.0)
            if REVERSE:
                weight = tl.exp(tl.sum(log, 0) - sums) * delta
                rows_of_state = value.to(tl.float32) * weight[:, None]
            else:
                rows_of_state = grad.to(tl.float32) * tl.exp(sums)[:, None]
            result = tl.dot(rows_of_state.to(DTYPE), tl.trans(state), acc=result, input_precision=PRECISION)
            if REVERSE:
                pairs += product(value.to(DTYPE), tl.trans(grad.to(DTYPE)), PRECISION)
            else:
                pairs += product(grad.to(DTYPE), tl.trans(value.to(DTYPE)), PRECISION)
        if REVERSE:
            step = tl.arange(0, Q)
            gap = sums[None, :] - sums[:, None]
            between += pairs * tl.exp(tl.where(step[:, None] <= step[None, :], gap, float("-inf"))) * delta[:, None]
        else:
            between += pairs * causal(sums, Q) * delta[None, :]
    state_lane = tl.arange(0, NP)
    state_ok = state_lane < N
    maps += (sample * M_b + direction * M_k + group * M_g) * VN
    other = load_tile(maps, tokens, M_l * VN, state_lane, state_ok, WIDE).to(DTYPE)
    result = tl.dot(between.to(DTYPE), other, acc=result, input_precision=PRECISION)
    grad_of_maps += (part.to(tl.int64) * part_rows + (sample * l * k + direction) * g + group) * N
    store_tile(grad_of_maps, tokens, k * g * N, state_lane, state_ok, result, WIDE)

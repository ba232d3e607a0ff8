"""What every other kernel of the state-space dual reads of the steps, computed once: sizes and decays, by chunks.

A step has one size and one decay per head, which all channels and several kernels need; computed where they are needed,
they cost the products more than the products themselves.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ._math import LOG2E, softplus_and_slope
from ._ssd_tiles import tokens_of_chunk
from ._tiles import END, in_tile

SIZES = ["m", "k", "h", "blocks", "chunks", "order_b", "order_k"]
STEPS = ["dt_b", "dt_l", "dt_k", "dt_h", "decay_b", "decay_l", "decay_k", "decay_h"]


@triton.jit(do_not_specialize=[*SIZES, *STEPS])
def ssd_steps(
    dt, A, decay, bias, order, deltas, sums,
    m, k, h, blocks, chunks, order_b, order_k, dt_b, dt_l, dt_k, dt_h, decay_b, decay_l, decay_k, decay_h,
    SOFTPLUS: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `deltas` and `sums (b, k, chunks, h, Q)`.

    Step sizes, and the binary logarithms of the decays from the start of the chunk to the end of each step. Steps that
    only fill a chunk have size 0 and do not decay.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    chunk = pid // blocks % chunks
    direction = (pid // blocks // chunks % k).to(tl.int64)
    sample = (pid // blocks // chunks // k).to(tl.int64)
    head = block * HEADS + tl.arange(0, HEADS)
    head_ok = head < h
    tokens = tokens_of_chunk(order + sample * order_b + direction * order_k, chunk, m, Q)
    read = (tokens >= 0)[:, None] & head_ok[None, :]
    dt += sample * dt_b + direction * dt_k
    raw = tl.load(dt + in_tile(tokens, dt_l, head * dt_h, WIDE), mask=read, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + direction * h + head, mask=head_ok, other=0.0)[None, :]
    alive = (tokens != END)[:, None]
    delta = raw
    if SOFTPLUS:
        delta, _ = softplus_and_slope(raw)
    delta = tl.where(alive, delta, 0.0)
    if decay is not None:
        decay += sample * decay_b + direction * decay_k
        log = tl.load(decay + in_tile(tokens, decay_l, head * decay_h, WIDE), mask=read, other=0.0).to(tl.float32)
    else:
        log = delta * tl.load(A + direction * h + head, mask=head_ok, other=0.0)[None, :]
    place = ((sample * k + direction) * chunks + chunk) * h * Q
    at = place + head[None, :] * Q + tl.arange(0, Q)[:, None]
    tl.store(deltas + at, delta, mask=head_ok[None, :])
    tl.store(sums + at, tl.cumsum(log * LOG2E, 0), mask=head_ok[None, :])

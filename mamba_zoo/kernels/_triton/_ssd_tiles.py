"""What the kernels of the state-space dual share: places of programs, step sizes, products, states of segments.

A direction's steps are cut into chunks of Q, and its chunks into segments; a program carries the state (N, P) of one
head through one segment. The states that enter a segment are put together from what the segments before it leave.
"""
# Pyright takes functions that call the kernel language to never return.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ._tiles import END


@triton.jit
def place_of_segment(first_chunk, chunks, segments, per_segment, rows, k, h, blocks):
    """This program's block of channels, head, direction, segment, row, sample and chunks."""
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % h
    direction = pid // blocks // h % k
    segment = pid // blocks // h // k % segments
    row = pid // blocks // h // k // segments
    sample = row.to(tl.int64)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    if first_chunk is not None:  # packed sequences are not cut into segments
        sample = tl.full((), 0, tl.int64)
        first = tl.load(first_chunk + direction * (rows + 1) + row)
        last = tl.load(first_chunk + direction * (rows + 1) + row + 1)
    return block, head.to(tl.int64), direction.to(tl.int64), segment, row.to(tl.int64), sample, first, last


@triton.jit
def tokens_of_chunk(order, chunk, m, Q: tl.constexpr):
    """The tokens visited in a chunk, (Q,); END where it is not full."""
    step = chunk * Q + tl.arange(0, Q)
    return tl.load(order + step, mask=step < m, other=END)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32, of float32 operands by tf32 or three times tf32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def causal(sums, Q: tl.constexpr):
    """The decay from step j to step i at (i, j), (Q, Q); 0 where j comes later."""
    step = tl.arange(0, Q)
    gap = sums[:, None] - sums[None, :]
    return tl.exp2(tl.where(step[:, None] >= step[None, :], gap, float("-inf")))


@triton.jit
def in_states(block, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr):
    """Offsets (NP, PB) of a state in memory (n, p), and which of them exist."""
    n = tl.arange(0, NP)[:, None]
    lane = (block * PB + tl.arange(0, PB))[None, :]
    return n * P + lane, (n < N) & (lane < P)


@triton.jit
def entering_state(
    initial, ends, row, direction, head, segment, segments, rows, k, h, block,
    REVERSE: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """The state (NP, PB) that enters a segment, from the given one and what the segments before it leave.

    `initial (rows, k, h, p, n)`; `ends (rows, k, segments, h, n, p)`, followed by the sums of the binary logarithms of
    decays `(rows, k, segments, h)`; None where there is one segment.
    """
    state = tl.zeros((NP, PB), tl.float32)
    inside, exists = in_states(block, N, NP, P, PB)
    if initial is not None:
        n = tl.arange(0, NP)[:, None]
        lane = (block * PB + tl.arange(0, PB))[None, :]
        state += tl.load(initial + ((row * k + direction) * h + head) * (N * P) + lane * N + n, mask=exists, other=0.0)
    if ends is not None:
        totals = ends + tl.full((), rows, tl.int64) * k * segments * h * (N * P)
        before = segments - 1 - segment if REVERSE else segment
        for i in range(before):
            other = segments - 1 - i if REVERSE else i
            place = ((row * k + direction) * segments + other) * h + head
            state = state * tl.exp2(tl.load(totals + place)) + tl.load(
                ends + place * (N * P) + inside, mask=exists, other=0.0
            )
    return state


@triton.jit
def store_outside(
    target, state, row, direction, head, k, h, block,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Write a state (NP, PB) to `target (rows, k, h, p, n)`."""
    n = tl.arange(0, NP)[:, None]
    lane = (block * PB + tl.arange(0, PB))[None, :]
    at = ((row * k + direction) * h + head) * (N * P) + lane * N + n
    tl.store(target + at, state, mask=(n < N) & (lane < P))

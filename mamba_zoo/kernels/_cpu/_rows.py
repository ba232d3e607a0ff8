"""Rows of W channels between tensors and scratch memory, compiled by numba; shared by all loops."""

from __future__ import annotations

from numba import njit

from ._simd import W, load, load_f32, load_part, store, store_f32, store_part, zeros

V = 4 * W  # bytes of a vector


@njit(forceinline=True)
def read(address, count):
    """`count` lanes of a row of tokens, then zeros."""
    if count >= W:
        return load(address)
    return load_part(address, count)


@njit(forceinline=True)
def write(address, value, count):
    """Write `count` lanes of a row."""
    if count >= W:
        store(address, value)
    else:
        store_part(address, value, count)


@njit
def read_states(to, source, n, count, scale):
    """Transpose `(d, n)` memory to n rows of W channels, times `scale`; zeros if `source` is 0."""
    for j in range(n):
        store(to + V * j, zeros())
    if source:
        for lane in range(min(count, W)):
            for j in range(n):
                store_f32(to + V * j + 4 * lane, load_f32(source + 4 * (lane * n + j)) * scale)


@njit
def write_states(source, to, n, count):
    """Transpose n rows of W channels to `(d, n)` memory."""
    for lane in range(min(count, W)):
        for j in range(n):
            store_f32(to + 4 * (lane * n + j), load_f32(source + V * j + 4 * lane))

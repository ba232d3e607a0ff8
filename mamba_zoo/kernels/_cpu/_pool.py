"""Running a compiled loop on several threads: all of them draw work items from one counter.

Which thread takes which item never changes a result, because every item owns what it writes.

The threads are torch's own where torch runs on GNU OpenMP: they keep spinning for a while after each of torch's
operations, and a second pool would fight them for the cores (measured in `benchmarks/README.md`).
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import torch
from numba import njit

from ._simd import fetch_add

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_owner = 0
_first_process = os.getpid()
_kept = threading.local()  # of each calling thread: its memory for records and scratch, from call to call
_KEPT_BYTES = 1 << 20  # more than this is given back
_PADDING = (0,) * 6  # to the end of the cache line of the two counters


@njit
def own_scratch(a):
    """The calling thread's part of the scratch memory."""
    return a.scratch + fetch_add(a.counter + 8) * a.stride


class Kernel:
    """A loop over work items, compiled on its first call (and kept on disk where numba finds a writable directory).

    Args:
        function: `function(record pointer)`, written for numba.
        fields: Names of the int64 fields of its record: addresses, strides in bytes, sizes and flags. Every record has
            four more: the loop takes items 0 to `items` - 1 from the counter at address `counter`, and its memory from
            `own_scratch`.
    """

    def __init__(self, function: Callable[[Any], None], fields: Sequence[str]):
        self.function, self.fields = function, tuple(fields)
        names = ("counter", "items", "scratch", "stride", *fields)
        self.record = np.dtype([(name, np.int64) for name in names])
        # In memory: items and threads so far, the record, then scratch, all on cache lines of their own.
        self.packed = struct.Struct(f"{8 + len(names)}q")
        self.scratch_at = -(-self.packed.size // 64) * 64
        self.compiled: Any = None

    @cached_property
    def entry(self) -> Any:
        """The compiled function; ctypes releases the interpreter lock around it."""
        from numba import cfunc, from_dtype, types

        signature = types.void(types.CPointer(from_dtype(self.record)))
        try:
            compiled = cfunc(signature, cache=True, error_model="numpy")(self.function)
        except (RuntimeError, OSError):  # no directory for the cache can be written
            compiled = cfunc(signature, error_model="numpy")(self.function)
        self.compiled = compiled  # owns the machine code
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(cast(int, compiled.address))

    def __call__(self, items: int, scratch_floats: int, **fields: int) -> None:
        """Run all items. `scratch_floats` float32 of scratch memory are given to each thread."""
        threads = max(1, min(torch.get_num_threads(), items))
        # 64-byte alignment for whole cache lines; stride keeps the threads' memory apart.
        stride = -(-scratch_floats // 16) * 64 + 128
        memory, start, address = _memory(self.scratch_at + threads * stride)
        record, scratch = address + 64, address + self.scratch_at
        values = map(fields.__getitem__, self.fields)
        self.packed.pack_into(memory, start, 0, 0, *_PADDING, address, items, scratch, stride, *values)
        if threads == 1:
            self.entry(record)
        elif (parallel := _gnu_openmp()) is not None and os.getpid() == _first_process:
            parallel(self.entry, record, threads, 0)
        else:
            _run_in_pool(self.entry, record, threads)


def _memory(size: int) -> tuple[memoryview, int, int]:
    """At least `size` bytes of this calling thread: a buffer, where in it they begin (64-byte aligned), their address.

    An op cannot be called from within itself, so one piece a thread is enough; making one takes longer than small
    scans take to pack their arguments.
    """
    kept = getattr(_kept, "memory", None)
    if kept is not None and len(kept[0]) >= size + 64:
        return kept
    memory = np.empty(size + 64, dtype=np.uint8)
    address = -(-memory.ctypes.data // 64) * 64
    made = memory.data, address - memory.ctypes.data, address
    if size <= _KEPT_BYTES:
        _kept.memory = made
    return made


@cache
def _gnu_openmp() -> Any:
    """Libgomp's entry point for "run this on so many threads", if torch has loaded that library; else None."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):  # another OpenMP, or an operating system without RTLD_NOLOAD
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _run_in_pool(entry: Any, address: int, threads: int) -> None:
    """The same on threads of our own; also after a fork, which OpenMP's threads do not survive."""
    helpers = [_threads(threads - 1).submit(entry, address) for _ in range(1, threads)]
    entry(address)
    # The counter is exhausted now: a helper that has not begun has nothing left to do.
    wait([helper for helper in helpers if not helper.cancel()])


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of at least `count` threads; a forked child makes its own."""
    global _pool, _pool_size, _pool_owner
    if _pool is None or _pool_size < count or _pool_owner != os.getpid():
        _pool, _pool_size, _pool_owner = ThreadPoolExecutor(count, "mamba_zoo"), count, os.getpid()
    return _pool

"""Running a compiled loop on several threads: all of them draw work items from one counter.

Which thread takes which item never changes a result, because every item owns what it writes.

The threads are torch's own where torch runs on GNU OpenMP: they keep spinning for a while after each of torch's
operations, and a second pool would fight them for the cores (measured in `benchmarks/README.md`).
"""

from __future__ import annotations

import ctypes
import os
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
        own = ("counter", "items", "scratch", "stride")
        self.record = np.dtype([(name, np.int64) for name in (*own, *fields)])
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
        counters = np.zeros(2, dtype=np.int64)  # items and threads so far
        threads = max(1, min(torch.get_num_threads(), items))
        # 64-byte alignment for whole cache lines; stride keeps the threads' memory apart.
        stride = -(-scratch_floats // 16) * 64 + 128
        memory = np.empty(threads * stride + 64, dtype=np.uint8)
        scratch = -(-memory.ctypes.data // 64) * 64
        values = (counters.ctypes.data, items, scratch, stride, *(fields[name] for name in self.fields))
        record = np.array(values, dtype=np.int64)
        if threads == 1:
            self.entry(record.ctypes.data)
        elif (parallel := _gnu_openmp()) is not None and os.getpid() == _first_process:
            parallel(self.entry, record.ctypes.data, threads, 0)
        else:
            _run_in_pool(self.entry, record.ctypes.data, threads)


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

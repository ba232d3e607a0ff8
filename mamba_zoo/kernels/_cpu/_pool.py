"""Running a compiled loop on several threads: all of them draw work items from one counter.

Which thread takes which item never changes a result, because every item owns what it writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_owner = 0


class Kernel:
    """A loop over work items, compiled on its first call (and kept on disk where numba finds a writable directory).

    Args:
        function: `function(record pointer, scratch address)`, written for numba.
        fields: Names of the int64 fields of its record: addresses, strides in bytes, sizes and flags. The loop takes
            items 0 to `items` - 1 from the counter at address `counter`, two fields that every record has.
    """

    def __init__(self, function: Callable[[Any, int], None], fields: Sequence[str]):
        self.function, self.fields = function, tuple(fields)
        self.record = np.dtype([(name, np.int64) for name in ("counter", "items", *fields)])
        self.compiled: Any = None

    @cached_property
    def entry(self) -> Callable[[int, int], None]:
        """The compiled function; ctypes releases the interpreter lock around it."""
        import ctypes

        from numba import cfunc, from_dtype, types

        signature = types.void(types.CPointer(from_dtype(self.record)), types.int64)
        try:
            compiled = cfunc(signature, cache=True, error_model="numpy")(self.function)
        except (RuntimeError, OSError):  # no directory for the cache can be written
            compiled = cfunc(signature, error_model="numpy")(self.function)
        self.compiled = compiled  # owns the machine code
        return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(cast(int, compiled.address))

    def __call__(self, items: int, scratch_floats: int, **fields: int) -> None:
        """Run all items. `scratch_floats` float32 of scratch memory are given to each thread."""
        entry = self.entry
        counter = np.zeros(1, dtype=np.int64)
        record = np.array([counter.ctypes.data, items, *(fields[name] for name in self.fields)], dtype=np.int64)
        threads = max(1, min(torch.get_num_threads(), items))
        # 64-byte alignment for whole cache lines; stride keeps the threads' memory apart.
        stride = -(-scratch_floats // 16) * 64 + 128
        memory = np.empty(threads * stride + 64, dtype=np.uint8)
        base = -(-memory.ctypes.data // 64) * 64
        address = record.ctypes.data
        helpers = [_threads(threads - 1).submit(entry, address, base + i * stride) for i in range(1, threads)]
        entry(address, base)
        # The counter is exhausted now: a helper that has not begun has nothing left to do.
        wait([helper for helper in helpers if not helper.cancel()])


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of at least `count` threads; a forked child makes its own."""
    global _pool, _pool_size, _pool_owner
    if _pool is None or _pool_size < count or _pool_owner != os.getpid():
        _pool, _pool_size, _pool_owner = ThreadPoolExecutor(count, "mamba_zoo"), count, os.getpid()
    return _pool

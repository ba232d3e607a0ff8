"""The smallest kernels of Triton's."""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def double(x, n, B: tl.constexpr):
    """`x *= 2` for its first B numbers."""
    at = x + tl.arange(0, B)
    tl.store(at, tl.load(at) * 2)


@triton.jit(do_not_specialize=["n"])
def triple(x, n, B: tl.constexpr):
    """`x *= 3` for its first B numbers."""
    at = x + tl.arange(0, B)
    tl.store(at, tl.load(at) * 3)

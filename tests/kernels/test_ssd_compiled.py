"""The kernels of the state-space dual as compiled for an H100, without one: no operand is read beyond its tile.

With more warps than the rows of a product keep busy, Triton 3.6 lets those that are over read operands of float32 from
shared memory past their tile; on an H100 that ended in wrong results or illegal memory accesses.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from .problems import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
UNUSED = {"first_chunk", "initial", "ends", "totals", "final", "ddecay"}
TOKENS = {"x", "B", "C", "values", "maps", "y", "dy", "dx", "dB", "dC", "ddt"}


def compiled(kernel: str, n: int, p: int, dtype: torch.dtype, warps: int | None = None) -> str:
    """The intermediate code of a kernel for sm_90, launched as for `n` states and `p` channels a head."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mamba_zoo.kernels._triton import _ssd_backward, _ssd_forward
    from mamba_zoo.kernels._triton.ssd import launch_shape, precision

    function: Any = {
        "forward": _ssd_forward.ssd_forward, "states": _ssd_forward.ssd_states,
        "heads": _ssd_backward.ssd_backward_heads, "maps": _ssd_backward.ssd_backward_maps,
    }[kernel]  # fmt: skip
    shape, block = launch_shape(kernel, n, p, dtype)
    product = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    known: dict[str, Any] = {
        "REVERSE": False, "N": n, "NP": max(16, triton.next_power_of_2(n)), "P": p, "PB": block, "Q": 64, "V": 4,
        "VN": 2, "WIDE": False, "DTYPE": product, "PRECISION": precision(dtype), **dict.fromkeys(UNUSED),
    }  # fmt: skip
    signature, constants = {}, {}
    for i, (name, parameter) in enumerate(zip(function.arg_names, function.params, strict=True)):
        if name in known:
            signature[name], constants[(i,)] = "constexpr", known[name]
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        elif name in ("states", "ahead"):
            signature[name] = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        else:
            signature[name] = f"*{NAMES[dtype]}" if name in TOKENS else "*i32" if name == "order" else "*fp32"
    options = shape.options() | ({} if warps is None else {"num_warps": warps})
    source = ASTSource(function, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]


def read_beyond(code: str) -> list[str]:
    """Left operands in shared memory with fewer rows than their product's warps cover."""
    layouts = dict(re.findall(r"(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = 3[^[]*warpsPerCTA = \[(\d+)", code))
    reads = re.findall(r"local_load [^\n]*-> tensor<(\d+)x\d+x\w+, #ttg.dot_op<\{opIdx = 0, parent = (#mma\d*)", code)
    return [f"{rows} rows, {layouts[name]} warps" for rows, name in reads if 16 * int(layouts.get(name, 0)) > int(rows)]


@pytest.mark.parametrize(
    ("kernel", "n", "p", "dtype"),
    [
        ("forward", 16, 16, torch.float16),
        ("heads", 16, 16, torch.float16),
        ("maps", 64, 64, torch.float16),
        ("maps", 30, 100, torch.bfloat16),
        ("states", 128, 64, torch.bfloat16),
    ],
    ids=str,
)
def test_no_operand_is_read_beyond_its_tile(kernel, n, p, dtype):
    assert read_beyond(compiled(kernel, n, p, dtype)) == []


def test_what_failed_on_a_gpu_is_found():
    assert read_beyond(compiled("forward", 16, 16, torch.float32, warps=8))

"""The kernels of the state-space dual as compiled for an H100, without one: registers, and operands within their tiles.

With more warps than the rows of a product keep busy, Triton 3.6 lets those that are over read operands of float32 from
shared memory past their tile; on an H100 that ended in wrong results or illegal memory accesses.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from .compiled import compile_kernel, stack_bytes
from .problems import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OPTIONAL = ("first_chunk", "initial", "ends", "final", "ddecay")


def compiled(
    kernel: str, n: int, p: int, dtype: torch.dtype, warps: int | None = None, packed: bool = False, wide: bool = False
) -> Any:
    """A kernel for sm_90, launched as for `n` states and `p` channels a head."""
    import triton.language as tl

    from mamba_zoo.kernels._triton import _ssd_backward, _ssd_forward
    from mamba_zoo.kernels._triton.ssd import launch_shape, precision

    function: Any = {
        "forward": _ssd_forward.ssd_forward, "states": _ssd_forward.ssd_states,
        "heads": _ssd_backward.ssd_backward_heads, "maps": _ssd_backward.ssd_backward_maps,
    }[kernel]  # fmt: skip
    shape, block = launch_shape(kernel, n, p, dtype)
    width = 8 if n % 8 == 0 and p % 8 == 0 else 2
    constants: dict[str, Any] = {
        "N": n, "NP": max(16, triton.next_power_of_2(n)), "P": p, "PB": block, "Q": 64, "V": width, "VN": width,
        "WIDE": wide, "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, "PRECISION": precision(dtype),
    }  # fmt: skip
    if kernel == "states":
        constants["REVERSE"] = True
    if kernel in ("forward", "heads"):
        constants["DP"] = 0  # a number for each head
    if kernel == "heads":
        constants["SOFTPLUS"] = True
    absent = () if packed else tuple(name for name in OPTIONAL if name in function.arg_names)
    options = shape.options() | ({} if warps is None else {"num_warps": warps})
    return compile_kernel(function, constants, 90, absent, NAMES[dtype], **options)


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
    assert read_beyond(compiled(kernel, n, p, dtype).asm["ttgir"]) == []


def test_what_failed_on_a_gpu_is_found():
    assert read_beyond(compiled("forward", 16, 16, torch.float32, warps=8).asm["ttgir"])


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_little_is_spilled(packed):
    """With 128 states and 64 channels a head, of bfloat16 tokens; see the table in `_triton/ssd.py`."""
    for kernel, limit in (("forward", 448), ("states", 0), ("heads", 448), ("maps", 64)):
        found = stack_bytes(compiled(kernel, 128, 64, torch.bfloat16, packed=packed, wide=packed))
        assert found <= limit, (kernel, found)

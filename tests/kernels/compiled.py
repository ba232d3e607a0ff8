"""Triton's compiler without a GPU: what it makes of a kernel for an architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

TOKENS = {"u", "dt", "B", "C", "z", "y", "dy", "du", "ddt", "dz", "x", "g", "dx", "dB", "dC"}
TOKENS |= {"values", "maps", "states", "ahead"}
TABLES = {"order", "offsets", "row_of", "first_chunk"}


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    arch: int,
    absent: tuple[str, ...] = (),
    tokens: str = "bf16",
    **options: int,
) -> Any:
    """A kernel compiled for `arch`, with aligned tensors and tokens of the type `tokens`.

    Args:
        kernel: A function of Triton's.
        constants: Its compile-time arguments.
        arch: Compute capability, such as 90.
        absent: Arguments that are None.
        tokens: The type of arguments named in `TOKENS`; states are float32 unless tokens are bfloat16.
        options: Of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **dict.fromkeys(absent)}
    states = "bf16" if tokens == "bf16" else "fp32"
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            types[name] = "constexpr"
        elif parameter.do_not_specialize:
            types[name] = "fp32" if name == "scale" else "i32"
        elif name in TOKENS:
            types[name] = f"*{states if name in ('states', 'ahead') else tokens}"
        else:
            types[name] = "*i32" if name in TABLES else "*fp32"
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(kernel, types, {place[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(compiled: Any) -> int:
    """The bytes that every lane keeps in local memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])

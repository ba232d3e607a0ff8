"""The launch table: which kernel runs a problem, from its sizes alone. No autotuning; docs/kernels.md has the times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FORMATS = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat"}
WINDOW = 256  # steps of the backward pass whose tokens are in shared memory
_FULL = 30_000  # threads that fill a large GPU: 2 to 3 warps per scheduler
_ENOUGH = 20_000  # threads where more of them cost more than they hide
_MANY = 150_000  # channels in all, with one or two states


@dataclass(frozen=True)
class Launch:
    """One line of the table; common.cu explains the letters."""

    states: int  # N
    lanes: int
    width: int  # V
    tile: int  # T
    threads: int
    blocks: int
    hold: bool = True  # backward: keep decays in registers

    @property
    def channels(self) -> int:
        """Channels per block."""
        return self.threads // self.lanes * self.width


@dataclass(frozen=True)
class Variant:
    """What is compiled into a kernel beside its launch."""

    tokens: torch.dtype
    out: torch.dtype
    map_width: int
    chunk: int
    spacing: int
    softplus: bool
    gated: bool
    empty: bool
    exact: bool
    keep: bool = False
    sums: int = 0
    added: int = 0
    part: int = 0

    def with_(self, **changes: Any) -> Variant:
        """A copy with some fields changed."""
        return replace(self, **changes)


def padded(n: int) -> int:
    """States as the kernels count them: the next of 1, 2, 4, ... 256."""
    if n > 256:
        raise ValueError(f"A has n={n} states, the CUDA kernels serve up to 256; use backend='reference'")
    return 1 << (n - 1).bit_length()


def spacing(n: int, row_bytes: float) -> int:
    """Steps between kept states: few enough that they take about an eighth of the inputs' memory.

    Args:
        n: States, before padding.
        row_bytes: Of the inputs, per channel and step.
    """
    longest = 128 if n <= 64 else 64 if n <= 128 else 16
    for steps in (16, 32, 64):
        if steps >= longest or 4 * n / steps <= 0.12 * row_bytes:
            return min(steps, longest)
    return longest


@lru_cache(maxsize=1024)
def forward_launch(n: int, d: int, programs: int, width: int) -> Launch:
    """The forward kernel's launch for `programs` = rows x directions x chunks x channels, `width` channels aligned."""
    N = padded(n)
    if N <= 2:
        if programs >= _MANY:
            return _fit(Launch(N, 1, width, 8, 64, 8), d)
        # Two channels a thread, unless a warp's 64 would then leave idle what 32 fill.
        return _fit(Launch(N, 1, 1 if d % 64 == 32 else width, 16, 96, 4), d)
    lanes = max(1, N // 16)
    while lanes < min(8, max(4, N // 16)) and programs * lanes < (_FULL if lanes == 1 else _ENOUGH) and lanes < N:
        lanes *= 2
    if N == 256:
        lanes = 8
    if N == 16 and lanes <= 2:
        wide = lanes == 1 and width == 2
        return _fit(Launch(N, 2, 2, 8, 64, 6) if wide else Launch(N, 2, 1, 16, 64, 6), d)
    if lanes == 1:
        return _fit(Launch(N, 1, 1, 8, 64, 6), d)
    if lanes == 2:
        return _fit(Launch(N, 2, 1, 8, 64, 8), d)
    return _fit(Launch(N, lanes, 1, 16 if N <= 64 else 8, 128, 4 if N <= 64 else 2), d)


@lru_cache(maxsize=1024)
def backward_launch(n: int, d: int, programs: int, width: int) -> Launch:
    """The backward kernel's launch. The states of a tile fill the registers, so T falls as S rises."""
    N = padded(n)
    if N <= 2:
        return _fit(Launch(N, 1, width, 16, 64, 4) if programs >= _MANY else Launch(N, 1, 1, 16, 96, 4), d)
    if N <= 4:
        return _fit(Launch(N, 1, 1, 8, 128, 3), d)
    if N == 8 and programs >= _FULL:
        return _fit(Launch(N, 1, 1, 8, 128, 2), d)
    if N == 16 and programs >= _FULL and width == 2:
        return _fit(Launch(N, 4, 2, 8, 64, 4), d)
    if N <= 16:
        return _fit(Launch(N, N // 4, 1, 8, 64, 6), d)
    lanes = min(8, N // 8)
    return _fit(Launch(N, lanes, 1, {32: 8, 64: 8, 128: 4, 256: 2}[N], 128 if N <= 64 else 64, 2), d)


def shared_memory(kernel: str, launch: Launch, variant: Variant) -> int:
    """Bytes of dynamic shared memory of a block.

    Rows of two tiles, and in the backward pass the states at the tiles of a segment.
    """
    tokens, out = variant.tokens.itemsize, variant.out.itemsize
    if kernel == "forward":
        rows = (1 + variant.gated) * tokens + max(tokens, out) + out
        return 2 * launch.tile * launch.channels * rows
    rows = 2 * launch.tile * launch.channels * ((2 + variant.gated) * tokens + out)
    steps = variant.spacing if variant.spacing > launch.tile else 0
    return rows + steps // launch.tile * launch.states * launch.channels * 4


def needed_memory(kernel: str, launch: Launch, variant: Variant) -> int:
    """Bytes of shared memory of a block, with those that are known when it is compiled."""
    fixed = 4 * launch.tile * launch.states * (4 + 8 * launch.threads // 32) + 4 * WINDOW
    return fixed + shared_memory(kernel, launch, variant)


def fit_shared(kernel: str, launch: Launch, variant: Variant, limit: int) -> Launch:
    """The launch, with fewer threads where a block may have only `limit` bytes of shared memory."""
    while needed_memory(kernel, launch, variant) > limit and launch.threads > 32:
        threads = max(32, launch.threads // 64 * 32)
        launch = replace(launch, threads=threads, blocks=launch.blocks * launch.threads // threads)
    return launch


def adds_directions(k: int, capability: tuple[int, int]) -> bool:
    """Whether directions may add gradients of what they share in place: with every sum of 16-bit numbers rounded.

    The relative error grows from 1.7e-3 (bfloat16) to 2.9e-3 at k = 4, and would be 3.8e-3 at k = 8.
    """
    return k <= 4 and capability >= (9, 0)


def chunk_length(programs: int, m: int, n: int, keep: int) -> int:
    """Steps per chunk where there are too few channels to fill the GPU, else 0: whole rows.

    Chunking reads everything and computes every decay twice, so it loses where lanes alone give enough threads.
    """
    if programs * min(4, padded(n)) >= 20_000 or m < 1024:
        return 0
    unit = max(keep, 128)
    return max(256, min(2048, m * programs // 131_072)) // unit * unit


def _fit(launch: Launch, d: int) -> Launch:
    """Fewer threads where a block would have idle warps: a multiple of 32 that wastes the fewest channels."""
    per_warp = launch.channels // (launch.threads // 32)
    warps = -(-d // per_warp)
    most = launch.threads // 32
    if warps <= most:
        return replace(launch, threads=32 * warps, blocks=launch.blocks * most // warps)
    best = min(range(max(1, most // 2), most + 1), key=lambda w: (-(-warps // w) * w, -w))
    return replace(launch, threads=32 * best, blocks=launch.blocks * most // best)


@lru_cache(maxsize=1024)
def source(kernel: str, launch: Launch, variant: Variant) -> str:
    """CUDA C++ of a kernel: its settings as constants between the shared parts."""
    settings = {
        "N": launch.states, "LANES": launch.lanes, "V": launch.width, "T": launch.tile, "THREADS": launch.threads,
        "BLOCKS": launch.blocks, "MAP_V": variant.map_width, "SPACING": variant.spacing, "WINDOW": WINDOW,
        "SOFTPLUS": variant.softplus, "GATED": variant.gated, "EMPTY": variant.empty, "EXACT": variant.exact,
        "KEEP": variant.keep, "SUMS": variant.sums, "PART": variant.part,
        "HOLD": launch.hold, "CHUNK": min(variant.chunk, launch.channels & -launch.channels), "ADDED": variant.added,
    }  # fmt: skip
    lines = [f"typedef {FORMATS[variant.tokens]} In;", f"typedef {FORMATS[variant.out]} Out;"]
    lines += [
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"
        for name, value in settings.items()
    ]
    return "\n".join([text_of("primitives"), *lines, text_of("common"), text_of(kernel)])


@lru_cache(maxsize=8)
def finish_source(dtype: torch.dtype) -> str:
    """CUDA C++ of the small kernels that follow the scans."""
    return "\n".join([text_of("primitives"), f"typedef {FORMATS[dtype]} In;", text_of("finish")])


@lru_cache(maxsize=8)
def text_of(name: str) -> str:
    return (Path(__file__).parent / f"{name}.cu").read_text()

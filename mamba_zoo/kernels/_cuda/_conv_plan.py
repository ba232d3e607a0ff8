"""How the causal convolution is launched, from its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ._plan import FORMATS, text_of

_LONGEST = 64  # steps of a run
_THREADS = 128  # of a block
_STAGED = 2048  # steps of all runs of a block whose tokens fit in shared memory
_PROCESSORS = 132  # of a large GPU
_OVERHEAD = 4  # steps that a block's beginning and end take as long as
# Weights per thread at most, steps read ahead, and resident warps of a multiprocessor that the registers must allow.
_TABLE = {"forward": (32, 4, 16), "backward": (16, 4, 16)}
_MANY_TAPS = (1, 1, 8)  # more than 16: the registers are full with one channel


@dataclass(frozen=True)
class Launch:
    """One line of the table; conv.cu explains the letters."""

    taps: int  # W
    width: int  # V
    tile: int  # T
    columns: int
    slots: int  # RUNS
    blocks: int

    @property
    def threads(self) -> int:
        """Per block."""
        return self.columns * self.slots

    @property
    def channels(self) -> int:
        """Per block."""
        return self.columns * self.width


@dataclass(frozen=True)
class Variant:
    """What is compiled into a kernel beside its launch."""

    tokens: torch.dtype
    silu: bool
    packed: bool
    final: bool = False
    added: bool = False

    def with_(self, **changes: Any) -> Variant:
        """A copy with some fields changed."""
        return replace(self, **changes)


@lru_cache(maxsize=1024)
def launch(kernel: str, taps: int, d: int, aligned: int) -> Launch:
    """The launch of `kernel`, "forward" or "backward", for rows of which `aligned` neighbours can be read at once.

    For each of its channels a thread holds weights and inputs in registers, and in the backward pass as many sums of
    gradients: that decides how many channels it takes.
    """
    most, tile, warps = _TABLE[kernel] if taps <= 16 else _MANY_TAPS
    width = max(w for w in (1, 2, 4, 8) if w <= aligned and (w == 1 or w * taps <= most))
    groups = -(-d // width)
    columns = -(-groups // -(-groups // 32))
    slots = max(1, min(_THREADS // columns, _STAGED // (_LONGEST + 2 * (taps - 1) + 2 * tile)))
    return Launch(taps, width, tile, columns, slots, max(1, warps // -(-columns * slots // 32)))


def steps(launch: Launch, m: int, samples: int, across: int) -> int:
    """Steps of a run: the fewer, the more blocks there are; the more, the less is read twice.

    Blocks come in waves of what is resident at once; a last wave that is not full still takes half as long as one.

    Args:
        launch: Of the kernel.
        m: Steps of a sample.
        samples: How many.
        across: Blocks side by side: of channels, for each direction.
    """

    def cost(run: int) -> float:
        blocks = -(-samples * -(-m // run) // launch.slots) * across
        full, rest = divmod(blocks / (_PROCESSORS * launch.blocks), 1)
        return (full + (0.5 + 0.5 * rest if rest else 0)) * (run + launch.taps - 1 + _OVERHEAD)

    return min(range(-(-8 // launch.tile) * launch.tile, _LONGEST + 1, launch.tile), key=cost)


@lru_cache(maxsize=1024)
def source(kernel: str, launch: Launch, variant: Variant) -> str:
    """CUDA C++ of a pass, "forward" or "backward": its settings as constants between the shared part and the text."""
    settings = {
        "W": launch.taps, "V": launch.width, "T": launch.tile, "COLUMNS": launch.columns, "RUNS": launch.slots,
        "BLOCKS": launch.blocks, "LONGEST": _LONGEST, "SILU": variant.silu, "PACKED": variant.packed,
        "FINAL": variant.final, "ADDED": variant.added,
    }  # fmt: skip
    lines = [f"#define BACKWARD {int(kernel == 'backward')}", f"typedef {FORMATS[variant.tokens]} In;"]
    lines += [
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"
        for name, value in settings.items()
    ]
    return "\n".join([text_of("primitives"), *lines, text_of("conv")])

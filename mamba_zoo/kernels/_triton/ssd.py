"""The state-space dual through Triton: launch shapes, buffers and the sums that follow the kernels.

Forward: one launch, or two for long sequences in few samples. Backward: the states of all chunks again, those of the
gradient, and one kernel for the rest. Nothing but the inputs is kept between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _ssd_chunked
from .._ssd_args import SsdArgs, chunked_order
from ._launch import common_width, launch, needs_wide_offsets, stored_dtype, with_unit_stride

# Programs that run side by side on a large GPU. Where a launch has half of that or less, sequences are cut into
# segments, and groups of heads into parts.
_PROGRAMS = 264
_SEGMENTS = 16  # at most: each reads what all before it leave
_LARGEST, _WIDE_LARGEST = 256, 128  # states, of bfloat16 tokens and others
_STEPS = 64  # of a chunk
_CAPABILITY = (8, 0)  # older GPUs have neither bfloat16 nor enough shared memory


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: warps, stages of its loop, and the registers it may use (0: all)."""

    warps: int
    stages: int = 1
    registers: int = 0

    def options(self) -> dict[str, int]:
        """For the launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if not self.registers or torch.version.hip else {**options, "maxnreg": self.registers}


# A product whose rows are the steps of a chunk keeps four warps busy. Eight share it only if it has columns for both
# halves; otherwise they do the same work twice, and Triton 3.6 may read operands of the second half beyond the tile:
# on an H100, float32 tiles of 16 states were wrong or failed with eight warps and right with four.
# What the compiler says for sm_90 (triton 3.6; 128 states, 64 channels a head): registers of a lane, bytes that it
# spills, shared memory; bfloat16: 255, 320, 91 kB; 97, 0, 82 kB; 227, 0, 98 kB; 228, 0, 140 kB.
FORWARD, STATES, HEADS, MAPS = Shape(4, 2), Shape(8, 3), Shape(4), Shape(8, 3)
_SHARED = 144 * 1024  # bytes that MAPS needs at most; GPUs with less (8.6, 8.9, 12.0) get a stage less
# Float32 operands take twice the room; float16 tokens: 255, 64, 66 kB; 128, 0, 37 kB; 255, 944, 66 kB; 255, 408, 49 kB.
WIDE_FORWARD, WIDE_STATES, WIDE_HEADS, WIDE_MAPS = Shape(4), Shape(8, 2), Shape(4), Shape(4)


def forward(s: SsdArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `SsdArgs` for the shapes."""
    if not _serves(s):
        return _ssd_chunked.forward(s, want_final)
    from ._ssd_forward import ssd_forward

    c = _Call(s)
    y = c.new(s.y_shape, s.out_dtype)
    final = s.new_state() if want_final else None
    ends, totals = c.ends(c.x, c.B, reverse=False)
    launch(
        ssd_forward, c.programs, s.x,
        c.x, c.B, c.C, c.D, c.deltas, c.sums, c.order, c.first_chunk, c.initial, ends, totals, y, final,
        *c.sizes, s.l, *_strides(c.x, c.width), *_strides(c.B, c.state_width), *_strides(c.C, c.state_width),
        **c.constants, **c.options("forward"),
    )  # fmt: skip
    return y.to(s.out_dtype), final


def backward(s: SsdArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    if not _serves(s):
        return _ssd_chunked.backward(s, dy, dfinal)
    from ._ssd_backward import ssd_backward_heads, ssd_backward_maps

    dy = with_unit_stride(dy)
    c = _Call(s, dy, slopes=True)
    dinitial = None if s.initial_state is None else s.new_state()
    states = c.states(c.x, c.B, c.initial, None, reverse=False)
    ahead = c.states(dy, c.C, None if dfinal is None else dfinal.contiguous(), dinitial, reverse=True)
    sizes = (c.m, s.k, s.h, s.h // s.g, c.chunks, s.rows, *c.order_strides, s.l)
    strides = (
        *_strides(c.x, c.width), *_strides(dy, c.width), *_strides(c.B, c.state_width), *_strides(c.C, c.state_width)
    )  # fmt: skip

    dx, ddt = c.new(s.y_shape, s.x.dtype), c.new(s.dt.shape, s.dt.dtype)
    ddecay = None if s.decay is None else c.new(s.dt.shape, s.decay.dtype)
    make = s.x.new_empty if c.first_chunk is None else s.x.new_zeros
    sums = make((s.b * c.chunks, s.k, s.h, s.p + 2), dtype=torch.float32)
    launch(
        ssd_backward_heads, s.b * c.chunks * s.k * s.h, s.x,
        c.x, c.A, c.B, c.C, c.D, c.deltas, c.sums, c.slopes, c.order, c.first_chunk, states, ahead, dy,
        dx, ddt, ddecay, sums, *sizes, *strides, **c.constants, **c.options("heads"),
    )  # fmt: skip

    groups = s.b * c.chunks * s.k * s.g
    parts = max(1, min(s.h // s.g, _PROGRAMS // groups))
    per_part = -(-s.h // s.g // parts)
    parts = -(-s.h // s.g // per_part)
    shape = (parts, s.b, s.l, s.k, s.g, s.n)
    dB, dC = (c.new(shape, s.B.dtype if parts == 1 else torch.float32) for _ in range(2))
    launch(
        ssd_backward_maps, groups * parts, s.x,
        c.x, c.B, c.C, c.deltas, c.sums, c.order, c.first_chunk, states, ahead, dy, dB, dC,
        *sizes, s.g, per_part, parts, s.b * s.l * s.k * s.g, *strides, **c.constants, **c.options("maps"),
    )  # fmt: skip

    if s.x.dim() == 4:
        dx = dx[:, :, 0] if s.k == 1 else dx.sum(2)
    sums = sums.sum(0)
    grads = {"x": dx, "dt": ddt, "decay": ddecay, "initial_state": dinitial, "D": sums[..., :-2]}
    grads |= {"A": sums[..., -2], "dt_bias": sums[..., -1]}
    grads |= {name: t[0] if parts == 1 else t.sum(0) for name, t in (("B", dB), ("C", dC))}
    return {name: grads[name].to(t.dtype).contiguous() for name, t in s.differentiable().items()}


def launch_shape(kernel: str, n: int, p: int, dtype: torch.dtype, shared: int = _SHARED) -> tuple[Shape, int]:
    """How a kernel is launched, and the channels of a head that a program takes at once.

    Args:
        kernel: "forward", "states", "heads" or "maps".
        n: States.
        p: Channels of a head.
        dtype: Of the tokens.
        shared: Bytes of shared memory that a program may use.
    """
    channels = min(64 if dtype == torch.bfloat16 and n <= 128 else 32, max(16, _power_of_two(p)))
    if dtype != torch.bfloat16:
        wide = {"forward": WIDE_FORWARD, "states": WIDE_STATES, "heads": WIDE_HEADS, "maps": WIDE_MAPS}
        return wide[kernel], channels
    shape = {"forward": FORWARD, "states": STATES, "heads": HEADS, "maps": MAPS}[kernel]
    if kernel == "maps":
        warps = shape.warps if n > 32 else 4
        # The blocks of channels are unrolled, and so would be their buffers; those of many states do not fit.
        stages = shape.stages if shared >= _SHARED else 2
        shape = Shape(warps, 1 if p > channels or n > 128 else stages)
    return shape, channels


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are made: float16 has the digits of tf32, whose range holds every state."""
    return "tf32" if dtype == torch.float16 else "tf32x3"


class _Call:
    """The arguments as the kernels read them, and what every launch needs."""

    def __init__(self, s: SsdArgs, dy: Tensor | None = None, slopes: bool = False):
        import triton.language as tl

        self.s = s
        self.x, self.B, self.C = (with_unit_stride(t) for t in (s.x, s.B, s.C))
        self.A, self.D, self.bias, self.initial = (
            None if t is None else t.contiguous() for t in (s.A, s.D, s.dt_bias, s.initial_state)
        )
        channels = launch_shape("forward", s.n, s.p, s.x.dtype)[1]
        self.steps = s.chunk or _STEPS
        self.blocks = -(-s.p // channels)
        self.order, self.first_chunk = s.order, None
        if s.offsets is not None:
            self.order, self.first_chunk = chunked_order(s.order, s.offsets, self.steps)
        self.m = self.order.shape[2]
        self.chunks = -(-self.m // self.steps)
        self.segments, self.per_segment = 1, self.chunks
        streams = s.rows * s.k * s.h * self.blocks
        if self.first_chunk is None and 2 * streams <= _PROGRAMS and self.chunks > 1:
            wanted = min(_SEGMENTS, _PROGRAMS // streams, self.chunks)
            self.per_segment = -(-self.chunks // wanted)
            self.segments = -(-self.chunks // self.per_segment)
        self.programs = streams * self.segments
        self.order_strides = (0 if self.order.shape[0] == 1 else self.order.stride(0), self.order.stride(1))
        self.sizes = (
            self.m, s.k, s.h, s.h // s.g, self.blocks, self.chunks, self.segments, self.per_segment, s.rows,
            *self.order_strides,
        )  # fmt: skip
        self.width = common_width([self.x, dy], s.p)
        self.state_width = common_width([self.B, self.C], s.n)
        longest = s.l * s.k * max(s.h * s.p, s.g * s.n)
        exact = not _in_bfloat16(s)
        self.constants: dict[str, Any] = {
            "N": s.n, "NP": max(16, _power_of_two(s.n)), "P": s.p, "PB": channels,
            "Q": self.steps, "V": self.width, "VN": self.state_width,
            "WIDE": longest >= 2**31 or needs_wide_offsets(self.x, self.B, self.C, dy, s.dt, s.decay),
            "DTYPE": tl.float32 if exact else tl.bfloat16,
            "PRECISION": precision(s.x.dtype),
        }  # fmt: skip
        self._compute_steps(slopes)

    def _compute_steps(self, slopes: bool) -> None:
        """Sizes, decays and, for gradients, slopes of all steps, by chunks."""
        from ._ssd_steps import ssd_steps

        s = self.s
        heads = min(32, _power_of_two(s.h))
        blocks = -(-s.h // heads)
        shape = (s.b, s.k, self.chunks, s.h, self.steps)
        self.deltas, self.sums = (s.x.new_empty(shape, dtype=torch.float32) for _ in range(2))
        self.slopes = s.x.new_empty(shape, dtype=torch.float32) if slopes else None
        decay = s.dt if s.decay is None else s.decay
        launch(
            ssd_steps, s.b * s.k * self.chunks * blocks, s.x,
            s.dt, self.A, s.decay, self.bias, self.order, self.deltas, self.sums, self.slopes,
            self.m, s.k, s.h, blocks, self.chunks, *self.order_strides, *s.dt.stride(), *decay.stride(),
            SOFTPLUS=s.dt_softplus, Q=self.steps, HEADS=heads, WIDE=self.constants["WIDE"], num_warps=4,
        )  # fmt: skip

    def options(self, kernel: str) -> dict[str, int]:
        """For the launch of a kernel."""
        x = self.s.x
        return launch_shape(kernel, self.s.n, self.s.p, x.dtype, _shared(x.device))[0].options()

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A result in rows of tokens, zero under those that are not visited."""
        make = self.s.x.new_empty if self.s.complete else self.s.x.new_zeros
        return make(shape, dtype=stored_dtype(self.s.x, dtype))

    def ends(self, values: Tensor, maps: Tensor, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
        """What each segment leaves, and the sum of the logarithms of its decays, if there is more than one."""
        if self.segments == 1:
            return None, None
        s = self.s
        ends = s.x.new_empty(s.rows, s.k, self.segments, s.h, s.n, s.p, dtype=torch.float32)
        totals = s.x.new_empty(s.rows, s.k, self.segments, s.h, dtype=torch.float32)
        self._launch_states(values, maps, None, ends, totals, None, None, reverse)
        return ends, totals

    def states(
        self, values: Tensor, maps: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool
    ) -> Tensor:
        """The states that enter the chunks, `(b, k, chunks, h, n, p)`, in the dtype of the products."""
        s = self.s
        dtype = torch.bfloat16 if _in_bfloat16(s) else torch.float32
        states = s.x.new_empty(s.b, s.k, self.chunks, s.h, s.n, s.p, dtype=dtype)
        ends, totals = self.ends(values, maps, reverse)
        self._launch_states(values, maps, initial, ends, totals, states, final, reverse)
        return states

    def _launch_states(self, values, maps, initial, ends, totals, states, final, reverse: bool) -> None:
        from ._ssd_forward import ssd_states

        s = self.s
        launch(
            ssd_states, self.programs, s.x,
            values, maps, self.deltas, self.sums, self.order, self.first_chunk, initial, ends, totals, states, final,
            *self.sizes, *_strides(values, self.width), *_strides(maps, self.state_width), REVERSE=reverse,
            **self.constants, **self.options("states"),
        )  # fmt: skip


def _in_bfloat16(s: SsdArgs) -> bool:
    """Whether bfloat16 is multiplied; Triton's interpreter cannot."""
    return s.x.dtype == torch.bfloat16 and s.x.device.type != "cpu"


def _serves(s: SsdArgs) -> bool:
    """Whether the kernels take these sizes on this device; what they do not take is left to plain torch."""
    wide = s.x.dtype != torch.bfloat16
    if s.n > (_WIDE_LARGEST if wide else _LARGEST) or s.chunk > _STEPS:
        return False
    if s.x.device.type != "cuda" or torch.version.hip is not None:
        return True
    # Float32 on a GPU: with four warps the kernels were right on an H100, see the launch table, but they have not been
    # timed against plain torch, which computes it until then.
    return s.x.dtype != torch.float32 and _capability(s.x.device) >= _CAPABILITY


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def _shared(device: torch.device) -> int:
    if device.type != "cuda":
        return _SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _strides(x: Tensor, per: int) -> tuple[int, ...]:
    """Strides of samples, tokens, directions and heads or groups, in units of `per`; directions may share x."""
    found = [stride // per for stride in x.stride()[:-1]]
    return (found[0], found[1], 0, found[2]) if x.dim() == 4 else tuple(found)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()

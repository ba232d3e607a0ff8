"""The state-space dual through Triton: launch shapes, buffers and the sums that follow the kernels.

Forward: one launch for the steps and one for the rest, or two for long sequences in few samples. Backward: the states
of all chunks again, those of the gradient, and two kernels for the rest. Kept between the two are two numbers a step
and head, and what segments leave, at most 16 states of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _ssd_chunked
from .._arguments import contiguous, with_unit_stride
from .._plans import Plans
from .._ssd_args import SsdArgs, chunked_order
from ._launch import Given, Launch, common_width, in_turn, needs_wide_offsets, stored_dtype

# Programs that run side by side on a large GPU. Where a launch has half of that or less, sequences are cut into
# segments, and groups of heads into parts.
_PROGRAMS = 264
_SEGMENTS = 16  # at most: each reads what all before it leave
_LARGEST, _WIDE_LARGEST = 256, 128  # states, of bfloat16 tokens and others
_STEPS = 64  # of a chunk
_HEADS = 8  # of a program of the steps, however many there are: models with several widths compile it once
_CAPABILITY = (8, 0)  # older GPUs have neither bfloat16 nor enough shared memory
_plans: Plans[_Plan] = Plans()


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
# spills, shared memory; bfloat16: 255, 304, 91 kB; 97, 0, 82 kB; 255, 280, 92 kB; 228, 0, 140 kB. What HEADS spills
# costs less than it gains by fetching the next head meanwhile: 919 to 829 us on an H200 at 65,536 tokens.
FORWARD, STATES, HEADS, MAPS = Shape(4, 2), Shape(8, 3), Shape(4, 2), Shape(8, 3)
_SHARED = 144 * 1024  # bytes that MAPS needs at most; GPUs with less (8.6, 8.9, 12.0) get a stage less
# Float32 operands take twice the room; float16 tokens: 255, 64, 66 kB; 128, 0, 37 kB; 255, 1616, 66 kB; 255, 408,
# 49 kB.
WIDE_FORWARD, WIDE_STATES, WIDE_HEADS, WIDE_MAPS = Shape(4), Shape(8, 2), Shape(4), Shape(4)


def saved_shape(s: SsdArgs) -> tuple[int, ...]:
    """The shape of what `forward` saves."""
    if not _serves(s):
        return (0,)
    steps = s.chunk or _STEPS
    chunks = -(-s.m // steps) + (0 if s.offsets is None else s.rows)
    return (2 * s.b * s.k * chunks * s.h * steps + _ends_size(s),)


def forward(s: SsdArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, steps and what segments leave if saved)`; see `SsdArgs` for the shapes."""
    if not _serves(s):
        return *_ssd_chunked.forward(s, want_final), None
    kept = s.x.new_empty(saved_shape(s), dtype=torch.float32)
    c = _Call(s, kept)
    plan = c.plan
    y = c.new(plan.y_shape, s.out_dtype)
    final = s.new_state() if want_final else None
    launches: list[Given] = [(plan.steps, (s.dt, c.A, s.decay, contiguous(s.dt_bias), c.order, c.deltas, c.sums))]
    if c.ends is not None:
        launches.append((plan.states, c.for_states(c.x, c.B, None, c.ends, None, None)))
    values = s.D, c.deltas, c.sums, c.order, c.first_chunk, c.initial, c.ends, y, final
    launches.append((plan.forward, (c.x, c.B, c.C, *values)))
    in_turn(s.x, *launches)
    return y if y.dtype == s.out_dtype else y.to(s.out_dtype), final, kept if save else None


def backward(s: SsdArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    if not _serves(s):
        return _ssd_chunked.backward(s, dy, dfinal)
    dy = with_unit_stride(dy)
    c = _Call(s, saved, dy)
    plan = c.plan
    dinitial = None if s.initial_state is None else s.new_state()
    states, ahead = (s.x.new_empty(plan.states_shape, dtype=plan.multiplied) for _ in range(2))
    starts = None if c.ends is None else torch.empty_like(c.ends)
    dx, ddt = c.new(plan.y_shape, s.x.dtype), c.new(s.dt.shape, s.dt.dtype)
    ddecay = None if s.decay is None else c.new(s.dt.shape, s.decay.dtype)
    make = s.x.new_empty if c.first_chunk is None else s.x.new_zeros
    sums = make(plan.sums_shape, dtype=torch.float32)
    dB, dC = (c.new(plan.maps_shape, s.B.dtype if plan.parts == 1 else torch.float32) for _ in range(2))

    launches: list[Given] = [(plan.states, c.for_states(c.x, c.B, c.initial, c.ends, states, None))]
    if starts is not None:
        launches.append((plan.ahead, c.for_states(dy, c.C, None, starts, None, None)))
    launches.append((plan.ahead, c.for_states(dy, c.C, contiguous(dfinal), starts, ahead, dinitial)))
    steps = c.deltas, c.sums, c.order, c.first_chunk, states, ahead, dy
    launches.append((plan.heads, (c.x, c.A, c.B, c.C, s.D, *steps, dx, ddt, ddecay, sums)))
    launches.append((plan.maps, (c.x, c.B, c.C, *steps, dB, dC)))
    in_turn(s.x, *launches)

    if s.x.dim() == 4:
        dx = dx[:, :, 0] if plan.k == 1 else dx.sum(2)
    dD, dA, dbias = (
        t.view(plan.k, s.h, -1) for t in sums.sum(0).split([plan.k * s.h * s.p, plan.k * s.h, plan.k * s.h])
    )
    grads = {"x": dx, "dt": ddt, "decay": ddecay, "initial_state": dinitial, "D": dD}
    grads |= {"A": dA[..., 0], "dt_bias": dbias[..., 0]}
    grads |= {name: t[0] if plan.parts == 1 else t.sum(0) for name, t in (("B", dB), ("C", dC))}
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
    if kernel in ("heads", "maps"):
        warps = shape.warps if n > 32 else 4
        more = n <= 64 if kernel == "heads" else -(shared < _SHARED)
        # The blocks of channels are unrolled, and so would be their buffers; those of many states do not fit.
        shape = Shape(warps, 1 if p > channels or n > 128 else shape.stages + more)
    return shape, channels


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are made: float16 has the digits of tf32, whose range holds every state."""
    return "tf32" if dtype == torch.float16 else "tf32x3"


class _Call:
    """The arguments as the kernels read them, and what steps have in common."""

    def __init__(self, s: SsdArgs, kept: Tensor, dy: Tensor | None = None):
        self.s = s
        self.x, self.B, self.C = (with_unit_stride(t) for t in (s.x, s.B, s.C))
        self.A, self.initial = contiguous(s.A), contiguous(s.initial_state)
        self.order, self.first_chunk = s.order, None
        if s.offsets is not None:
            self.order, self.first_chunk = chunked_order(s.order, s.offsets, s.chunk or _STEPS)
        self.plan = plan = _plan(s, self.x, self.B, self.C, self.order, dy)
        # Sizes and sums of the steps first: their rows begin at multiples of 16 bytes.
        steps = plan.steps_size
        self.deltas, self.sums = kept[:steps], kept[steps : 2 * steps]
        self.ends = kept[2 * steps :] if plan.segments > 1 else None  # what segments leave, and the sums of their logs

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A result in rows of tokens, zero under those that are not visited."""
        make = self.s.x.new_empty if self.s.complete else self.s.x.new_zeros
        return make(shape, dtype=stored_dtype(self.s.x, dtype))

    def for_states(
        self,
        values: Tensor,
        maps: Tensor,
        initial: Tensor | None,
        ends: Tensor | None,
        states: Tensor | None,
        final: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The tensors of the kernel that writes the states of chunks, or only what segments leave to `ends`."""
        return values, maps, self.deltas, self.sums, self.order, self.first_chunk, initial, ends, states, final


class _Plan:
    """What shapes, strides and alignment decide, worked out once for all calls that share them."""

    def __init__(self, s: SsdArgs, x: Tensor, B: Tensor, C: Tensor, order: Tensor, dy: Tensor | None):
        import triton.language as tl

        from ._ssd_forward import ssd_forward, ssd_states
        from ._ssd_steps import ssd_steps

        b, l, k, h, p, g, n, rows = s.b, s.l, s.k, s.h, s.p, s.g, s.n, s.rows
        self.k, self.y_shape = k, s.y_shape
        channels = launch_shape("forward", n, p, x.dtype)[1]
        steps, blocks, m = s.chunk or _STEPS, -(-p // channels), order.shape[2]
        chunks = -(-m // steps)
        self.segments, per_segment = _segments(s) if s.offsets is None else (1, chunks)
        programs = rows * k * h * blocks * self.segments
        in_order = (0 if order.shape[0] == 1 else order.stride(0), order.stride(1))
        width, state_width = common_width([x, dy], p), common_width([B, C], n)
        wide = l * k * max(h * p, g * n) >= 2**31 or needs_wide_offsets(x, B, C, dy, s.dt, s.decay)
        self.multiplied = torch.bfloat16 if _in_bfloat16(s) else torch.float32
        constants = {
            "N": n, "NP": max(16, _power_of_two(n)), "P": p, "PB": channels, "Q": steps, "V": width, "VN": state_width,
            "WIDE": wide, "DTYPE": tl.bfloat16 if _in_bfloat16(s) else tl.float32, "PRECISION": precision(x.dtype),
        }  # fmt: skip

        def made(kernel: str) -> dict[str, Any]:
            return constants | launch_shape(kernel, n, p, x.dtype, _shared(x.device))[0].options()

        head_blocks = -(-h // _HEADS)
        self.steps_size = b * k * chunks * h * steps
        decay = s.dt if s.decay is None else s.decay
        self.steps = Launch(
            ssd_steps, b * k * chunks * head_blocks,
            (m, k, h, head_blocks, chunks, *in_order, *s.dt.stride(), *decay.stride()),
            {"SOFTPLUS": s.dt_softplus, "Q": steps, "HEADS": _HEADS, "WIDE": wide, "num_warps": 4},
        )  # fmt: skip

        sizes = (m, k, h, h // g, blocks, chunks, self.segments, per_segment, rows, *in_order)
        of_x, of_B, of_C = _strides(x, width), _strides(B, state_width), _strides(C, state_width)
        of_D, within_D = ((0, 0), 0) if s.D is None else (s.D.stride()[:2], s.D.stride(2))
        self.states_shape = (b, k, chunks, h, n, p)
        self.states = Launch(ssd_states, programs, (*sizes, *of_x, *of_B), {"REVERSE": False, **made("states")})
        self.forward = Launch(
            ssd_forward, programs, (*sizes, l, *of_x, *of_B, *of_C, *of_D), {"DP": within_D, **made("forward")}
        )
        if dy is None:
            return
        from ._ssd_backward import ssd_backward_heads, ssd_backward_maps

        of_dy = _strides(dy, width)
        self.ahead = Launch(ssd_states, programs, (*sizes, *of_dy, *of_C), {"REVERSE": True, **made("states")})
        groups = b * chunks * k * g
        per_part = -(-h // g // max(1, min(h // g, _PROGRAMS // max(1, groups))))
        self.parts = -(-h // g // per_part)
        sizes = (m, k, h, h // g, chunks, rows, *in_order, l, g, per_part, self.parts)
        strides = (*of_x, *of_dy, *of_B, *of_C)
        self.sums_shape, self.maps_shape = (b * chunks, k * h * (p + 2)), (self.parts, b, l, k, g, n)
        self.heads = Launch(
            ssd_backward_heads,
            groups * self.parts,
            (*sizes, *strides, *of_D),
            {"DP": within_D, "SOFTPLUS": s.dt_softplus, **made("heads")},
        )
        self.maps = Launch(
            ssd_backward_maps, groups * self.parts, (*sizes, b * l * k * g, *strides), made("maps")
        )  # fmt: skip


def _plan(s: SsdArgs, x: Tensor, B: Tensor, C: Tensor, order: Tensor, dy: Tensor | None) -> _Plan:
    """The plan of a call; working it out takes longer than a launch, finding it a few µs."""
    key = (
        x.shape, x.stride(), x.dtype, x.device, B.shape, B.stride(), C.stride(), s.dt.stride(), order.shape,
        order.stride(), s.chunk, s.dt_softplus, None if s.decay is None else s.decay.stride(),
        None if s.D is None else s.D.stride(), None if s.offsets is None else s.offsets.shape,
        x.data_ptr() & 15 if dy is None else (x.data_ptr() | dy.data_ptr()) & 15, (B.data_ptr() | C.data_ptr()) & 15,
        None if dy is None else dy.stride(),
    )  # fmt: skip
    found = _plans.get(key)
    return _plans.keep(key, _Plan(s, x, B, C, order, dy)) if found is None else found


def _segments(s: SsdArgs) -> tuple[int, int]:
    """Segments that a direction is cut into, and chunks of each."""
    chunks = -(-s.m // (s.chunk or _STEPS))
    streams = s.rows * s.k * s.h * -(-s.p // launch_shape("forward", s.n, s.p, s.x.dtype)[1])
    if s.offsets is not None or not 0 < 2 * streams <= _PROGRAMS or chunks < 2:
        return 1, chunks
    per_segment = -(-chunks // min(_SEGMENTS, _PROGRAMS // streams, chunks))
    return -(-chunks // per_segment), per_segment


def _ends_size(s: SsdArgs) -> int:
    """Numbers that segments leave: of each and head a state, and the sum of the logarithms of its decays."""
    segments = _segments(s)[0]
    return 0 if segments == 1 else s.rows * s.k * segments * s.h * (s.n * s.p + 1)


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

"""The selective scan through Triton: launch shapes, buffers and the sums that follow the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import with_unit_stride
from .._scan_args import ScanArgs
from ._launch import common_width, launch, needs_wide_offsets, stored_dtype, strides


@dataclass(frozen=True)
class Shape:
    """How much one program takes: `groups * lanes` channels and `steps` steps at a time, on `warps` warps."""

    groups: int
    lanes: int
    steps: int
    warps: int = 1


# By the number of states, rounded up to a power of two: the largest shapes that spill nothing, or next to nothing, on
# sm_90 (triton 3.6, bfloat16, all options, states saved). Registers, forward: 94, 90, 122, 122, 213, 217, 221, 233 and
# 254; backward: 209, 168, 166, 212, 255, 254, 255, 255 and 255 (16 and 32 bytes spilled by the last two).
FORWARD = {
    1: Shape(1, 64, 4),
    2: Shape(1, 32, 4),
    4: Shape(1, 32, 4),
    8: Shape(1, 32, 4),
    16: Shape(1, 32, 4),
    32: Shape(1, 16, 4),
    64: Shape(1, 8, 4),
    128: Shape(1, 4, 4),
    256: Shape(1, 4, 4, 2),
}
BACKWARD = {
    1: Shape(1, 32, 8),
    2: Shape(1, 32, 4),
    4: Shape(2, 8, 4),
    8: Shape(2, 8, 4),
    16: Shape(2, 8, 4),
    32: Shape(1, 8, 4),
    64: Shape(1, 8, 4, 2),
    128: Shape(1, 8, 4, 4),
    256: Shape(1, 8, 4, 8),
}
# With fewer channels than this in flight, states of a channel are spread over more lanes: more programs, each shorter.
_MANY_CHANNELS = 32768
# Steps between the states that the forward pass saves. A longer spacing saves memory (n floats per channel and spacing)
# and costs nothing more: the backward runs every chunk again either way, except at n = 1, whose tiles are chunks.
_SPACING = 32


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """States inside each row, before every `spacing`-th step but the first."""
    return (s.b, s.k, s.m // saved_spacing(s.n), s.n, s.d)


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, states for the backward if `save`)`; see `ScanArgs` for the shapes."""
    from ._scan_forward import scan_forward

    shape = _forward_shape(s)
    x = _Inputs(s)
    y = x.new_rows(s.out_dtype, filled=s.complete)
    final = s.new_state().view(s.states, s.k, s.n, s.d) if want_final else None
    saved = s.u.new_empty(saved_shape(s), dtype=torch.float32) if save else None
    blocks = -(-s.d // (shape.groups * shape.lanes))
    launch(
        scan_forward, s.states * s.k * blocks, s.u,
        x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.bias, s.order, s.offsets, x.initial, y, final, saved,
        s.l, s.m, s.k, s.d, blocks, s.states, s.m // saved_spacing(s.n),
        *x.order_strides, *strides(x.u, x.width), *strides(x.dt, x.width), *strides(_or(x.z, x.u), x.width),
        *strides(x.B, x.state_width), *strides(x.C, x.state_width),
        SOFTPLUS=s.dt_softplus, N=s.n, NP=_power_of_two(s.n), R=shape.groups, DL=shape.lanes, T=shape.steps,
        S=saved_spacing(s.n), V=x.width, VN=x.state_width, WIDE=x.wide, num_warps=shape.warps,
    )  # fmt: skip
    if s.reduce != "none":
        y = y[:, :, 0] if s.k == 1 else y.sum(2) if s.reduce == "sum" else y.mean(2)
    return y.to(s.out_dtype), None if final is None else final.transpose(2, 3).contiguous(), saved


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    from ._scan_backward import scan_backward

    shape = BACKWARD[_power_of_two(s.n)]
    dy = with_unit_stride(dy)
    x = _Inputs(s, dy)
    if dfinal is not None:
        dfinal = dfinal.transpose(2, 3).contiguous()
    block = shape.groups * shape.lanes
    blocks = -(-s.d // block)
    programs = s.states * s.k * blocks
    inner = saved_spacing(s.n) // shape.steps - 1
    atomic = blocks > 1 and not torch.are_deterministic_algorithms_enabled()
    parts = 1 if atomic else blocks
    new = s.u.new_zeros if atomic or not s.complete else s.u.new_empty
    dB, dC = (new((parts, s.b, s.l, s.k, s.n), dtype=torch.float32) for _ in range(2))
    float32 = {"dtype": torch.float32, "device": s.u.device}
    scratch = torch.empty(programs * inner * block * _power_of_two(s.n), **float32)
    du, ddt = x.new_rows(s.u.dtype, s.complete), x.new_rows(s.dt.dtype, s.complete)
    dz = None if s.z is None else x.new_rows(s.z.dtype, s.complete)
    dA = torch.empty(s.states, s.k, s.n, s.d, **float32)
    dD, dbias = (None if t is None else torch.empty(s.states, s.k, s.d, **float32) for t in (s.D, s.dt_bias))
    dinitial = None if s.initial_state is None else torch.empty_like(dA)
    launch(
        scan_backward, programs, s.u,
        x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.bias, s.order, s.offsets, x.initial, saved, scratch, dy, dfinal,
        du, ddt, dA, dB, dC, dD, dz, dbias, dinitial, 1.0 / s.k if s.reduce == "mean" else 1.0,
        s.l, s.m, s.k, s.d, blocks, s.states, s.m // saved_spacing(s.n), 0 if atomic else dB[0].numel(),
        block * _power_of_two(s.n),
        *x.order_strides, *strides(x.u, x.width), *strides(x.dt, x.width), *strides(_or(x.z, x.u), x.width),
        *strides(dy, x.width), *strides(x.B, x.state_width), *strides(x.C, x.state_width),
        SOFTPLUS=s.dt_softplus, N=s.n, NP=_power_of_two(s.n), R=shape.groups, DL=shape.lanes, T=shape.steps,
        S=saved_spacing(s.n), V=x.width, VN=x.state_width, WIDE=x.wide, ATOMIC=atomic, num_warps=shape.warps,
    )  # fmt: skip
    grads = {
        "u": _over_directions(du, s.u),
        "dt": ddt.to(s.dt.dtype),
        "A": _over_rows(dA).transpose(1, 2).contiguous(),
        "B": _over_rows(dB).to(s.B.dtype),
        "C": _over_rows(dC).to(s.C.dtype),
    }
    if dD is not None:
        grads["D"] = _over_rows(dD)
    if dbias is not None:
        grads["dt_bias"] = _over_rows(dbias)
    if dz is not None and s.z is not None:
        grads["z"] = _over_directions(dz, s.z)
    if dinitial is not None:
        grads["initial_state"] = dinitial.transpose(2, 3).contiguous()
    return grads


class _Inputs:
    """The arguments as the kernels read them: states innermost but one, unit strides, and how wide loads may be."""

    def __init__(self, s: ScanArgs, dy: Tensor | None = None):
        self.s = s
        self.u, self.dt, self.B, self.C = (with_unit_stride(x) for x in (s.u, s.dt, s.B, s.C))
        self.z = None if s.z is None else with_unit_stride(s.z)
        self.A = s.A.transpose(1, 2).contiguous()
        self.D, self.bias = (None if x is None else x.contiguous() for x in (s.D, s.dt_bias))
        self.initial = None if s.initial_state is None else s.initial_state.transpose(2, 3).contiguous()
        shared = s.order.shape[0] == 1
        self.order_strides = (0 if shared else s.order.stride(0), s.order.stride(1))
        self.width = common_width([self.u, self.dt, self.z, dy], s.d)
        self.state_width = common_width([self.B, self.C], s.n)
        rows_end = s.l * s.k * max(s.d, s.n)
        self.wide = rows_end >= 2**31 or needs_wide_offsets(self.u, self.dt, self.z, self.B, self.C, dy)

    def new_rows(self, dtype: torch.dtype, filled: bool) -> Tensor:
        """`(b, l, k, d)`, zero under tokens that are not visited."""
        s = self.s
        make = s.u.new_empty if filled else s.u.new_zeros
        return make((s.b, s.l, s.k, s.d), dtype=stored_dtype(s.u, dtype))


def _forward_shape(s: ScanArgs) -> Shape:
    shape = FORWARD[_power_of_two(s.n)]
    lanes = shape.lanes
    smallest = 8 if s.n > 1 else 32
    while lanes > smallest and (s.states * s.k * s.d * 32 < _MANY_CHANNELS * lanes or -s.d % lanes >= lanes // 2):
        lanes //= 2
    return Shape(shape.groups, lanes, shape.steps, shape.warps)


def saved_spacing(n: int) -> int:
    """Steps between the states that the forward pass saves, for `n` states."""
    return _SPACING if n > 1 else BACKWARD[1].steps


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _or(x: Tensor | None, instead: Tensor) -> Tensor:
    return instead if x is None else x


def _over_directions(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of an input that directions may share."""
    if like.dim() == 4:
        return grad.to(like.dtype)
    return (grad[:, :, 0] if grad.shape[2] == 1 else grad.sum(2)).to(like.dtype)


def _over_rows(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)

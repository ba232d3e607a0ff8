"""The layers of Mamba-3 (ICLR 2026), one input and one output per head: a trapezoidal rule and rotating states."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..kernels import ssd
from ..kernels._order import pack_order, prepare_order
from ._init import init_step_bias_
from ._mamba2 import count_heads
from ._ssm import DirectionLinear

_SLOWEST = -1e-4  # decay rate


class Memory(NamedTuple):
    """What a stream keeps of the tokens before; its size does not depend on how many there were."""

    scan: Tensor  # (b, k, h, p, n), the state h_t after the last token
    x: Tensor  # (b, k, h, p), the last token, of which the next step takes a part
    B: Tensor  # (b, k, h, n), its input map, rotated
    turns: Tensor  # (b, k, h, r), the sum of angles, in radians up to whole turns


def trapezoid(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    trap: Tensor,
    angle: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    order: Tensor | None = None,
    reduce: str | None = None,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
) -> Any:  # Tensor, or (Tensor, Memory) with a memory
    """The recurrence of Mamba-3, through the state-space dual.

    With `e = exp(rate dt)`, and steps t along the visiting order:

        h_t = e_t h_(t-1) + (1 - trap_t) dt_t e_t B_(t-1) x_(t-1) + trap_t dt_t B_t x_t
        y_t = C_t h_t + D x_t

    where B and C are first rotated by the sum of `angle dt` over all steps up to t. As h_t plus what step t + 1 will
    take from step t obeys the recurrence of `kernels.ssd`, it is one such scan, and what was added is taken off the
    output again.

    Args:
        x: Tokens `(b, l, h, p)`, shared by the directions, or `(b, l, k, h, p)`.
        dt: Step sizes `(b, l, k, h)`, positive.
        rate: Decay rates `(b, l, k, h)`, negative.
        trap: Weights of the present token `(b, l, k, h)`, between 0 and 1.
        angle: Of rotation per unit step, `(b, l, k, r)` radians: of the first r pairs of neighbouring states.
        B: Input maps `(b, l, k, h, n)`.
        C: Output maps, likewise.
        D: Skip weights `(k, h)`.
        order: `(k, m)` or `(b, k, m)`. An empty step is a token of zeros with a step size of zero.
        reduce: None, "sum" or "mean" over directions.
        cu_seqlens: `(s + 1,)` token boundaries of packed sequences.
        memory: Of the tokens before these, in a stream: then neither `order` nor `cu_seqlens`.

    Returns:
        `(b, l, k, h, p)`, or `(b, l, h, p)` with `reduce`; with `memory` also that after the last token.
    """
    b, l, k, _ = dt.shape
    exact = torch.promote_types(dt.dtype, torch.float32)
    dt, rate, trap, angle = (t.to(exact) for t in (dt, rate, trap, angle))
    table = None
    if order is not None or cu_seqlens is not None:
        table, _ = prepare_order(order, b, l, k, x.device)
        if cu_seqlens is not None:
            table, _ = pack_order(table, cu_seqlens, l)
    dealt = _along((1 - trap) * dt, table)  # what each step takes from the one before it
    given = _back(F.pad(dealt[:, 1:], (0, 0, 0, 0, 0, 1)), table, l)
    turns = _along((angle[:, :, :, None] * dt[..., None]).flatten(3), table).cumsum(1)
    turns = _back(turns, table, l).unflatten(3, (dt.shape[3], -1))
    if memory is not None:
        turns = turns + memory.turns[:, None]
    agree = (B.to(exact) * C.to(exact)).sum(-1)  # rotated together, they agree as before
    B, C = _rotate(B, turns), _rotate(C, turns)
    start = None
    if memory is not None:  # and what the first of these tokens takes from the last of those before
        start = memory.scan + (dealt[:, 0, ..., None] * memory.x)[..., None] * memory.B[:, :, :, None]
    y = ssd(
        x, trap * dt + given, None, B, C, D, order=order, cu_seqlens=cu_seqlens, decay=rate * dt, out_dtype=exact,
        initial_state=start, return_final_state=memory is not None,
    )  # fmt: skip
    y, state = (y, None) if memory is None else y
    taken = (given * agree)[..., None] * (x if x.dim() == 5 else x[:, :, None])
    if table is not None:  # tokens that a direction never visits stay zero
        visited = _back(torch.ones_like(dealt[..., :1]), table, l)
        taken = taken * visited[..., None]
    y = y - taken
    if reduce is not None:
        y = y.sum(2) if reduce == "sum" else y.mean(2)
    y = y.to(x.dtype) if x.dtype != torch.float16 else y
    if memory is None or state is None:
        return y
    last = (x if x.dim() == 5 else x[:, :, None])[:, -1].expand_as(memory.x)
    return y, Memory(state, last.to(exact), B[:, -1].to(exact), turns[:, -1].remainder(2 * math.pi))


def _along(x: Tensor, table: Tensor | None) -> Tensor:
    """`(b, l, k, c)` in visiting order, `(b, m, k, c)`, zero at empty steps."""
    if table is None:
        return x
    index = table.long().transpose(1, 2)[..., None].expand(len(x), -1, -1, x.shape[-1])
    return x.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)


def _back(x: Tensor, table: Tensor | None, l: int) -> Tensor:
    """The inverse: `(b, m, k, c)` to `(b, l, k, c)`, zero at tokens that are not visited."""
    if table is None:
        return x
    index = table.long().transpose(1, 2)[..., None].expand_as(x)
    index = torch.where(index < 0, l, index)  # empty steps write to a spare place
    return x.new_zeros(len(x), l + 1, *x.shape[2:]).scatter(1, index, x)[:, :l]


def _rotate(maps: Tensor, turns: Tensor) -> Tensor:
    """`maps (..., n)` with the first pairs of neighbouring states rotated by `turns (..., r)` radians."""
    r = turns.shape[-1]
    pairs, rest = maps[..., : 2 * r].unflatten(-1, (r, 2)), maps[..., 2 * r :]
    sin, cos = turns.sin(), turns.cos()
    first, second = pairs.to(turns.dtype).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([turned.to(maps.dtype), rest], dim=-1)


class _Maps(nn.Module):
    """Norms and biases of B and C, and what becomes of raw steps, rates, weights and angles."""

    def __init__(self, heads: int, d_state: int, rope_fraction: float, k: int = 1, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.pairs = int(rope_fraction * d_state) // 2
        self.dt_bias = nn.Parameter(torch.empty(k, heads, **dd))
        self.B_bias = nn.Parameter(torch.ones(heads, d_state, **dd))
        self.C_bias = nn.Parameter(torch.ones(heads, d_state, **dd))
        self.B_norm = nn.Parameter(torch.ones(d_state, **dd))
        self.C_norm = nn.Parameter(torch.ones(d_state, **dd))
        self.D = nn.Parameter(torch.ones(k, heads, **dd))
        init_step_bias_(self.dt_bias)

    def forward(
        self, x: Tensor, dt: Tensor, rate: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, **options: Any
    ) -> Any:
        """`trapezoid` of raw projections: of heads `(b, l, k, h)`, `angle (b, l, k, r)`, B and C `(b, l, k, g, n)`."""
        order = options.get("order")
        k = max(dt.shape[2], self.D.shape[0], 1 if order is None else order.shape[-2])
        exact = torch.promote_types(dt.dtype, torch.float32)
        dt, rate, trap, angle = (t.to(exact).expand(-1, -1, k, -1) for t in (dt, rate, trap, angle))
        dt = F.softplus(dt + self.dt_bias.to(exact))
        rate = -torch.where(rate >= 0, rate + 1, 1 / (1 - rate.clamp(max=0)))
        heads = dt.shape[3]
        B, C = (
            self._normed(t, weight, bias, heads).expand(-1, -1, k, -1, -1)
            for t, weight, bias in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias))
        )
        D = self.D.expand(k, -1)
        angle = angle.tanh() * math.pi
        return trapezoid(x, dt, rate.clamp(max=_SLOWEST), trap.sigmoid(), angle, B, C, D, **options)

    def init_state(self, batch: int, k: int, channels: int) -> Memory:
        """The memory before the first token, of heads of `channels`: float32 at least, and zero."""
        heads, n = self.B_bias.shape
        sizes = ((channels, n), (channels,), (n,), (self.pairs,))
        exact = torch.promote_types(self.D.dtype, torch.float32)
        return Memory(*(self.D.new_zeros(batch, k, heads, *size, dtype=exact) for size in sizes))

    @staticmethod
    def _normed(maps: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        exact = torch.promote_types(maps.dtype, torch.float32)
        normed = F.rms_norm(maps.to(exact), maps.shape[-1:], weight.to(exact), 1e-5)
        return (normed.repeat_interleave(heads // maps.shape[-2], -2) + bias.to(exact)).to(maps.dtype)


class TrapezoidSSM(nn.Module):
    """What `SelectiveSSM` is, with the recurrence of Mamba-3; it stands in for one of the same width, see `mixer=`.

    `x_proj.weight (k, 3h + r + 2n, d)` gives step, rate and weight of each head, r angles, B and C, in this order; the
    other parameters but `dt_bias` and `D (k, h)` are shared by the directions.

    Args:
        dim: Channels d.
        d_state: States n.
        k: Directions. One set of parameters (k = 1) serves any number of directions.
        head_dim: Channels p of a head; None is the largest divisor of `dim` up to 64.
        rope_fraction: Part of the states that rotate.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        k: int = 1,
        head_dim: int | None = None,
        rope_fraction: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.d_state, self.heads = d_state, count_heads(dim, head_dim)
        self.maps = _Maps(self.heads, d_state, rope_fraction, k, **dd)
        self.x_proj = DirectionLinear(k, dim, 3 * self.heads + self.maps.pairs + 2 * d_state, **dd)

    @property
    def dt_bias(self) -> Tensor:
        """Biases of the steps `(k, h)`."""
        return self.maps.dt_bias

    def forward(
        self,
        u: Tensor,
        z: Tensor | None = None,
        order: Tensor | None = None,
        reduce: str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Scan the tokens along every direction; arguments and result as for `SelectiveSSM`."""
        gated = z is not None
        y = self.maps(*self._maps(u), order=order, cu_seqlens=cu_seqlens, reduce=None if gated else reduce).flatten(-2)
        if z is not None:
            gate = F.silu(z.to(y.dtype))
            y = y * (gate if z.dim() == 4 else gate[:, :, None])
            if reduce is not None:
                y = y.sum(2) if reduce == "sum" else y.mean(2)
        return y

    def init_state(self, batch: int) -> Tensor:
        """The memory before the first token of a stream, one tensor `(b, k, d, s)`: float32 at least, and zero.

        Of each head, its n states by p channels, its last token, and in as many columns as it takes, that token's input
        map and the angles.
        """
        k, width = self.maps.D.shape[0], self.x_proj.weight.shape[-1]
        return self._packed(self.maps.init_state(batch, k, width // self.heads))

    def extend(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream; arguments and results as for `SelectiveSSM`, the state as from `init_state`."""
        y, memory = self.maps(*self._maps(u), memory=self._unpacked(state))
        y = y.flatten(-2)
        if z is not None:
            gate = F.silu(z.to(y.dtype))
            y = y * (gate if z.dim() == 4 else gate[:, :, None])
        return y, self._packed(memory)

    def step(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`extend` for one token: `u` and `z` `(b, d)` or `(b, k, d)` to `(b, k, d)` and the new state."""
        y, state = self.extend(u[:, None], state, None if z is None else z[:, None])
        return y[:, 0], state

    def _maps(self, u: Tensor) -> tuple[Tensor, ...]:
        """What `maps` takes."""
        sizes = [self.heads] * 3 + [self.maps.pairs, self.d_state, self.d_state]
        dt, rate, trap, angle, B, C = self.x_proj(u).split(sizes, dim=-1)
        x = u.to(B.dtype).unflatten(-1, (self.heads, -1))
        return x, dt, rate, trap, angle, B[:, :, :, None], C[:, :, :, None]

    def _packed(self, memory: Memory) -> Tensor:
        p = memory.x.shape[-1]
        rest = torch.cat([memory.B, memory.turns], -1)
        rest = F.pad(rest, (0, -rest.shape[-1] % p)).unflatten(-1, (p, -1))
        return torch.cat([memory.scan, memory.x[..., None], rest], -1).flatten(2, 3)

    def _unpacked(self, state: Tensor) -> Memory:
        state = state.unflatten(2, (self.heads, -1))
        scan, x, rest = state.split([self.d_state, 1, state.shape[-1] - self.d_state - 1], -1)
        B, turns = rest.flatten(-2)[..., : self.d_state + self.maps.pairs].split([self.d_state, self.maps.pairs], -1)
        return Memory(scan, x[..., 0], B, turns)


class Mamba3(nn.Module):
    """The Mamba-3 mixer, one input and one output per head: no convolution, rates of each token, rotating states.

    Directions share all parameters.

    Args:
        dim: Model width.
        d_state: States n.
        expand: Inner width in units of `dim`.
        head_dim: Channels p of a head.
        groups: Groups of heads that share B and C before their biases.
        rope_fraction: Part of the states that rotate.
        out_norm: Norm the output of every head before the gate.
        reduce: "sum" or "mean" over directions.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: heads that do not divide the inner width, groups that do not divide the heads, or another `reduce`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        expand: float = 2,
        head_dim: int = 64,
        groups: int = 1,
        rope_fraction: float = 0.5,
        out_norm: bool = False,
        reduce: str = "sum",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce={reduce!r} is unknown; choose 'sum' or 'mean'")
        self.inner, self.d_state, self.groups, self.reduce = int(expand * dim), d_state, groups, reduce
        self.heads = count_heads(self.inner, head_dim)
        if self.heads % groups:
            raise ValueError(f"groups={groups} does not divide the {self.heads} heads")
        self.maps = _Maps(self.heads, d_state, rope_fraction, **dd)
        self.in_proj = nn.Linear(dim, sum(self._sizes()), bias=False, **dd)
        self.norm = nn.Parameter(torch.ones(self.inner, **dd)) if out_norm else None
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, order: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)` or `(b, k, m)`, to `(b, l, dim)`."""
        z, *maps = self._project(x)
        return self._finish(self.maps(*maps, order=order, cu_seqlens=cu_seqlens, reduce=self.reduce), z)

    def init_state(self, batch: int) -> Memory:
        """The memory of `batch` streams before their first token; it does not grow."""
        return self.maps.init_state(batch, 1, self.inner // self.heads)

    def extend(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        """The next tokens of a stream `(b, l, dim)` to `(b, l, dim)` and the new state."""
        z, *maps = self._project(x)
        y, state = self.maps(*maps, reduce=self.reduce, memory=state)
        return self._finish(y, z), state

    def step(self, x: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        """`extend` for one token `(b, dim)`."""
        y, state = self.extend(x[:, None], state)
        return y[:, 0], state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """The gate, and what `maps` takes."""
        z, u, B, C, dt, rate, trap, angle = self.in_proj(x).split(self._sizes(), dim=-1)
        B, C = (t.unflatten(-1, (self.groups, -1))[:, :, None] for t in (B, C))
        dt, rate, trap, angle = (t[:, :, None] for t in (dt, rate, trap, angle))
        return z, u.unflatten(-1, (self.heads, -1)), dt, rate, trap, angle, B, C

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        if self.norm is not None:
            exact = torch.promote_types(y.dtype, torch.float32)
            y = F.rms_norm(y.to(exact), y.shape[-1:], None, 1e-5) * self.norm.to(exact).unflatten(0, (self.heads, -1))
        return self.out_proj((y.flatten(-2) * F.silu(z.to(y.dtype))).to(z.dtype))

    def _sizes(self) -> list[int]:
        maps = self.groups * self.d_state
        return [self.inner, self.inner, maps, maps, self.heads, self.heads, self.heads, self.maps.pairs]


# torch.fx takes these whole: they look at shapes and dtypes. Not as decorators, which would hide their types.
for _leaf in (_Maps, TrapezoidSSM, Mamba3):
    register_notrace_module(_leaf)

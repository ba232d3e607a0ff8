"""The layers of Mamba-3 (arXiv:2603.15569): a trapezoidal rule, rotating states, one input a head or several."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ._init import init_step_bias_
from ._mamba2 import count_heads
from ._ssm import DirectionLinear
from ._trapezoid import Memory, trapezoid

_SLOWEST = -1e-4  # decay rate


class _Maps(nn.Module):
    """Norms and biases of B and C, and what becomes of raw steps, rates, weights and angles.

    With a `rank`, heads have that many inputs and outputs, and B and C as many rows.
    """

    def __init__(
        self,
        heads: int,
        d_state: int,
        rope_fraction: float,
        k: int = 1,
        rank: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        rows = (heads, d_state) if rank is None else (heads, rank, d_state)
        self.pairs, self.rank = int(rope_fraction * d_state) // 2, rank
        self.dt_bias = nn.Parameter(torch.empty(k, heads, **dd))
        self.B_bias = nn.Parameter(torch.ones(rows, **dd))
        self.C_bias = nn.Parameter(torch.ones(rows, **dd))
        self.B_norm = nn.Parameter(torch.ones(d_state, **dd))
        self.C_norm = nn.Parameter(torch.ones(d_state, **dd))
        self.D = nn.Parameter(torch.ones(k, heads, **dd))
        init_step_bias_(self.dt_bias)

    def forward(
        self, x: Tensor, dt: Tensor, rate: Tensor, trap: Tensor, angle: Tensor, B: Tensor, C: Tensor, **options: Any
    ) -> Any:
        """`trapezoid` of raw projections: of heads `(b, l, k, h)`, `angle (b, l, k, r)`, B and C `(b, l, k, g, n)`.

        With a rank B and C are `(b, l, k, g, rank, n)` and x has as many inputs a head.
        """
        order = options.get("order")
        k = max(dt.shape[2], self.D.shape[0], 1 if order is None else order.shape[-2])
        exact = torch.promote_types(dt.dtype, torch.float32)
        dt, rate, trap, angle = (t.to(exact).expand(-1, -1, k, -1) for t in (dt, rate, trap, angle))
        dt = F.softplus(dt + self.dt_bias.to(exact))
        rate = -torch.where(rate >= 0, rate + 1, 1 / (1 - rate.clamp(max=0)))
        heads = dt.shape[3]
        B, C = (
            self._normed(t, weight, bias, heads).expand(-1, -1, k, *bias.shape)
            for t, weight, bias in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias))
        )
        D = self.D.expand(k, -1)
        angle = angle.tanh() * math.pi
        halves = self.rank is not None and B.shape[-1] % 2 == 0
        return trapezoid(x, dt, rate.clamp(max=_SLOWEST), trap.sigmoid(), angle, B, C, D, halves=halves, **options)

    def init_state(self, batch: int, k: int, channels: int) -> Memory:
        """The memory before the first token, of heads of `channels`: float32 at least, and zero."""
        heads, n, inputs = self.D.shape[1], self.B_norm.shape[0], self.rank or 1
        sizes = ((channels, n), (inputs, channels), (inputs, n), (self.pairs,))
        exact = torch.promote_types(self.D.dtype, torch.float32)
        return Memory(*(self.D.new_zeros(batch, k, heads, *size, dtype=exact) for size in sizes))

    @staticmethod
    def _normed(maps: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        exact = torch.promote_types(maps.dtype, torch.float32)
        normed = F.rms_norm(maps.to(exact), maps.shape[-1:], weight.to(exact), 1e-5)
        return (normed.repeat_interleave(heads // maps.shape[3], 3) + bias.to(exact)).to(maps.dtype)


class TrapezoidSSM(nn.Module):
    """What `SelectiveSSM` is, with the recurrence of Mamba-3; it stands in for one of the same width, see `mixer=`.

    `x_proj.weight (k, 3h + r + 2sn, d)` gives step, rate and weight of each head, r angles, B and C, in this order; the
    other parameters but `dt_bias` and `D (k, h)` are shared by the directions. s is 1, or with a `rank` that: then
    `mimo_x` and `mimo_o (h, rank, p)` are as in `Mamba3`, and the gate, which may be elsewhere, is one for all outputs.

    Args:
        dim: Channels d.
        d_state: States n.
        k: Directions. One set of parameters (k = 1) serves any number of directions.
        head_dim: Channels p of a head; None is the largest divisor of `dim` up to 64.
        rope_fraction: Part of the states that rotate.
        rank: Inputs and outputs of a head; None is one of each, without weights for it.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    mimo_x: Tensor
    mimo_o: Tensor

    def __init__(
        self,
        dim: int,
        d_state: int,
        k: int = 1,
        head_dim: int | None = None,
        rope_fraction: float = 0.5,
        rank: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.d_state, self.heads = d_state, count_heads(dim, head_dim)
        self.maps = _Maps(self.heads, d_state, rope_fraction, k, rank, **dd)
        if rank is not None:
            _add_ranks(self, ("mimo_x", "mimo_o"), (self.heads, rank, dim // self.heads), **dd)
        self.x_proj = DirectionLinear(k, dim, 3 * self.heads + self.maps.pairs + 2 * (rank or 1) * d_state, **dd)

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
        y = self.maps(*self._maps(u), order=order, cu_seqlens=cu_seqlens, reduce=None if gated else reduce)
        y = self._gated(y, z)
        if gated and reduce is not None:
            y = y.sum(2) if reduce == "sum" else y.mean(2)
        return y

    def init_state(self, batch: int) -> Tensor:
        """The memory before the first token of a stream, one tensor `(b, k, d, columns)`: float32 at least, and zero.

        Of each head, its n states by p channels, the inputs of its last token, and in as many columns as it takes, the
        maps of these and the angles.
        """
        k, width = self.maps.D.shape[0], self.x_proj.weight.shape[-1]
        return self._packed(self.maps.init_state(batch, k, width // self.heads))

    def extend(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream; arguments and results as for `SelectiveSSM`, the state as from `init_state`."""
        y, memory = self.maps(*self._maps(u), memory=self._unpacked(state))
        return self._gated(y, z), self._packed(memory)

    def step(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`extend` for one token: `u` and `z` `(b, d)` or `(b, k, d)` to `(b, k, d)` and the new state."""
        y, state = self.extend(u[:, None], state, None if z is None else z[:, None])
        return y[:, 0], state

    def _maps(self, u: Tensor) -> tuple[Tensor, ...]:
        """What `maps` takes."""
        rows = (self.maps.rank or 1) * self.d_state
        dt, rate, trap, angle, B, C = self.x_proj(u).split([self.heads] * 3 + [self.maps.pairs, rows, rows], dim=-1)
        x = u.to(B.dtype).unflatten(-1, (self.heads, -1))
        B, C = B[:, :, :, None], C[:, :, :, None]
        if self.maps.rank is not None:
            x = x[..., None, :] * self.mimo_x.to(x.dtype)
            B, C = (t.unflatten(-1, (self.maps.rank, -1)) for t in (B, C))
        return x, dt, rate, trap, angle, B, C

    def _gated(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Outputs of heads `(b, l, k, h, p)`, or `(b, l, k, h, rank, p)`, to those of channels `(b, l, k, d)`."""
        if self.maps.rank is not None:
            exact = torch.promote_types(y.dtype, torch.float32)
            y = (y.to(exact) * self.mimo_o.to(exact)).sum(-2).to(y.dtype)
        y = y.flatten(-2)
        if z is None:
            return y
        gate = F.silu(z.to(y.dtype))
        return y * (gate if z.dim() == 4 else gate[:, :, None])

    def _packed(self, memory: Memory) -> Tensor:
        p = memory.x.shape[-1]
        rest = torch.cat([memory.B.flatten(-2), memory.turns], -1)
        rest = F.pad(rest, (0, -rest.shape[-1] % p)).unflatten(-1, (p, -1))
        return torch.cat([memory.scan, memory.x.transpose(-1, -2), rest], -1).flatten(2, 3)

    def _unpacked(self, state: Tensor) -> Memory:
        n, inputs = self.d_state, self.maps.rank or 1
        state = state.unflatten(2, (self.heads, -1))
        scan, x, rest = state.split([n, inputs, state.shape[-1] - n - inputs], -1)
        B, turns = rest.flatten(-2)[..., : inputs * n + self.maps.pairs].split([inputs * n, self.maps.pairs], -1)
        return Memory(scan, x.transpose(-1, -2), B.unflatten(-1, (inputs, n)), turns)


class Mamba3(nn.Module):
    """The Mamba-3 mixer: no convolution, rates of each token, rotating states.

    Directions share all parameters. Heads have one input and one output (SISO), or with `rank` several (MIMO): weights
    `mimo_x`, `mimo_z` and `mimo_o (h, rank, p)` make the inputs and gates of a head from its channels, and its channels
    from the gated outputs. MIMO follows the paper's idea and has the published number of parameters, but was compared
    with no published output: layout of `B` and `C`, skip, gate and norm of the ranks may differ from the authors'.

    Args:
        dim: Model width.
        d_state: States n.
        expand: Inner width in units of `dim`.
        head_dim: Channels p of a head.
        groups: Groups of heads that share B and C before their biases.
        rope_fraction: Part of the states that rotate.
        out_norm: Norm the output of every head before the gate.
        rank: Inputs and outputs of a head; None is one of each, without weights for it.
        reduce: "sum" or "mean" over directions.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: heads that do not divide the inner width, groups that do not divide the heads, a rank below 1 or
            with an odd number of states, or another `reduce`.
    """

    mimo_x: Tensor
    mimo_z: Tensor
    mimo_o: Tensor

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        expand: float = 2,
        head_dim: int = 64,
        groups: int = 1,
        rope_fraction: float = 0.5,
        out_norm: bool = False,
        rank: int | None = None,
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
        if rank is not None and (rank < 1 or d_state % 2):
            raise ValueError(f"rank={rank} must be 1 or more, with an even number of states, not d_state={d_state}")
        self.maps = _Maps(self.heads, d_state, rope_fraction, rank=rank, **dd)
        if rank is not None:
            _add_ranks(self, ("mimo_x", "mimo_z", "mimo_o"), (self.heads, rank, head_dim), **dd)
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
        u = u.unflatten(-1, (self.heads, -1))
        if self.maps.rank is None:
            B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        else:
            B, C = (t.unflatten(-1, (self.maps.rank, self.groups, -1)).transpose(-2, -3) for t in (B, C))
            u = u[..., None, :] * self.mimo_x.to(u.dtype)
        dt, rate, trap, angle, B, C = (t[:, :, None] for t in (dt, rate, trap, angle, B, C))
        return z, u, dt, rate, trap, angle, B, C

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Outputs `(b, l, h, p)`, or `(b, l, h, rank, p)`, normed, gated and projected."""
        several = self.maps.rank is not None
        exact = torch.promote_types(y.dtype, torch.float32)
        if self.norm is not None:
            weight = self.norm.to(exact).unflatten(0, (self.heads, -1))
            y = F.rms_norm(y.to(exact), y.shape[-1:], None, 1e-5) * (weight[:, None] if several else weight)
        gate = z.to(y.dtype).unflatten(-1, (self.heads, -1))
        if several:
            gate = gate[..., None, :] * self.mimo_z.to(y.dtype)
        y = y * F.silu(gate)
        if several:
            y = (y.to(exact) * self.mimo_o.to(exact)).sum(-2)
        return self.out_proj(y.flatten(-2).to(z.dtype))

    def _sizes(self) -> list[int]:
        maps = self.groups * self.d_state * (self.maps.rank or 1)
        return [self.inner, self.inner, maps, maps, self.heads, self.heads, self.heads, self.maps.pairs]


def _add_ranks(layer: nn.Module, names: tuple[str, ...], shape: tuple[int, int, int], **dd: Any) -> None:
    """The weights `(h, rank, p)` between a head's channels and its several inputs, gates and outputs."""
    for name in names:
        start = 1.0 if name == "mimo_z" else 1 / shape[1]
        layer.register_parameter(name, nn.Parameter(torch.full(shape, start, **dd)))


# torch.fx takes these whole: they look at shapes and dtypes. Not as decorators, which would hide their types.
for _leaf in (_Maps, TrapezoidSSM, Mamba3):
    register_notrace_module(_leaf)

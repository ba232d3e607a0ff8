"""The recurrence of Mamba-3 (arXiv:2603.15569), a trapezoidal rule and rotating states, by the state-space dual."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ssd
from ..kernels._order import pack_order, prepare_order
from ..kernels._running_sum import running_sum


class Memory(NamedTuple):
    """What a stream keeps of the tokens before; its size does not depend on how many there were."""

    scan: Tensor  # (b, k, h, p, n), the state h_t after the last token
    x: Tensor  # (b, k, h, s, p), the inputs of the last token, of which the next step takes a part
    B: Tensor  # (b, k, h, s, n), their input maps, rotated
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
    halves: bool = False,
) -> Any:  # Tensor, or (Tensor, Memory) with a memory
    """The recurrence of Mamba-3, through the state-space dual.

    With `e = exp(rate dt)`, steps t along the visiting order, and sums over the inputs of a head where it has several:

        h_t = e_t h_(t-1) + (1 - trap_t) dt_t e_t B_(t-1) x_(t-1) + trap_t dt_t B_t x_t
        y_t = C_t h_t + D x_t

    where B and C are first rotated by the sum of `angle dt` over all steps up to t. As h_t plus what step t + 1 will
    take from step t obeys the recurrence of `kernels.ssd`, it is one such scan, and what was added is taken off the
    output again. A token with s inputs and outputs is 2 s - 1 steps of that scan: all inputs, then the other outputs.

    Args:
        x: Tokens `(b, l, h, p)`, shared by the directions, or `(b, l, k, h, p)`; of heads with s inputs
            `(b, l, h, s, p)` or `(b, l, k, h, s, p)`.
        dt: Step sizes `(b, l, k, h)`, positive.
        rate: Decay rates `(b, l, k, h)`, negative.
        trap: Weights of the present token `(b, l, k, h)`, between 0 and 1.
        angle: Of rotation per unit step, `(b, l, k, r)` radians: of the first r pairs of states.
        B: Input maps `(b, l, k, h, n)`, or `(b, l, k, h, s, n)`.
        C: Output maps, likewise.
        D: Skip weights `(k, h)`.
        order: `(k, m)` or `(b, k, m)`. An empty step is a token of zeros with a step size of zero.
        reduce: None, "sum" or "mean" over directions.
        cu_seqlens: `(s + 1,)` token boundaries of packed sequences.
        memory: Of the tokens before these, in a stream: then neither `order` nor `cu_seqlens`.
        halves: State i makes a pair with state i + n / 2, not states 2 i and 2 i + 1.

    Returns:
        `(b, l, k, h, p)`, or `(b, l, k, h, s, p)`, without k with `reduce`; with `memory` also that after the last
        token.

    Raises:
        ValueError: no token, or what `kernels.ssd` refuses.
    """
    b, l, k, _ = dt.shape
    if l == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, l, ...) with l >= 1")
    single = B.dim() == 5
    if single:
        x, B, C = x.unsqueeze(-2), B.unsqueeze(-2), C.unsqueeze(-2)
    exact = torch.promote_types(dt.dtype, torch.float32)
    dt, rate, trap, angle = (t.to(exact) for t in (dt, rate, trap, angle))
    table = None
    if order is not None or cu_seqlens is not None:
        table, _ = prepare_order(order, b, l, k, x.device)
        if cu_seqlens is not None:
            table, _ = pack_order(table, cu_seqlens, l)
    dealt = _along((1 - trap) * dt, table)  # what each step takes from the one before it
    given = _back(F.pad(dealt[:, 1:], (0, 0, 0, 0, 0, 1)), table, l)
    turns = running_sum(_along((angle[:, :, :, None] * dt[..., None]).flatten(3), table), 1)
    turns = _back(turns, table, l).unflatten(3, (dt.shape[3], -1))
    if memory is not None:
        turns = turns + memory.turns[:, None]
    agree = C.to(exact), B.to(exact)  # rotated together, they agree as before
    agree = (agree[0] * agree[1]).sum(-1, keepdim=True) if single else agree[0] @ agree[1].transpose(-1, -2)
    B, C = (_rotate(maps, turns[..., None, :], halves) for maps in (B, C))
    start = None
    if memory is not None:  # and what the first of these tokens takes from the last of those before
        start = memory.scan + dealt[:, 0, ..., None, None] * (memory.x.transpose(-1, -2) @ memory.B)
    y, state = _scan(x, trap * dt + given, rate * dt, B, C, order, cu_seqlens, start)
    own = (x if x.dim() == 6 else x[:, :, None]).to(exact)
    taken = agree * own if single else agree @ own
    own = D.to(exact)[:, :, None, None] * own - given[..., None, None] * taken
    if table is not None:  # tokens that a direction never visits stay zero
        own = own * _back(torch.ones_like(dealt[..., :1]), table, l)[..., None, None]
    y = y + own
    if reduce is not None:
        y = y.sum(2) if reduce == "sum" else y.mean(2)
    y = y.to(x.dtype) if x.dtype != torch.float16 else y
    y = y.squeeze(-2) if single else y
    if memory is None or state is None:
        return y
    last = (x if x.dim() == 6 else x[:, :, None])[:, -1].expand_as(memory.x)
    return y, Memory(state, last.to(exact), B[:, -1].to(exact), turns[:, -1].remainder(2 * math.pi))


def _scan(
    x: Tensor,
    weight: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` of tokens with s inputs and outputs, `(b, l, k, h, s, p)`, and its last state if it was given one."""
    s, l = B.shape[-2], B.shape[1]
    wide = 2 * s - 1

    def spread(t: Tensor, first: int, dim: int = -2) -> Tensor:
        """Rows of `dim` as steps of their token from `first` on, zeros at the others: `(b, l * wide, ...)`."""
        t = t.movedim(dim, 2)
        if wide > 1:
            t = F.pad(t, (0, 0) * (t.dim() - 3) + (first, wide - first - t.shape[2]))
        return t.flatten(1, 2)

    if order is not None and s > 1:
        step = torch.arange(wide, device=order.device)
        order = torch.where(order[..., None] < 0, -1, order[..., None] * wide + step).flatten(-2)
    y = ssd(
        spread(x, 0), spread(weight[:, :, None].expand(-1, -1, s, -1, -1), 0, 2), None, spread(B, 0), spread(C, s - 1),
        order=order, cu_seqlens=None if cu_seqlens is None else cu_seqlens * wide,
        decay=spread(decay[:, :, None], 0, 2), out_dtype=weight.dtype, initial_state=start,
        return_final_state=start is not None,
    )  # fmt: skip
    y, state = (y, None) if start is None else y
    return y.unflatten(1, (l, wide))[:, :, s - 1 :].movedim(2, -2), state


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


def _rotate(maps: Tensor, turns: Tensor, halves: bool) -> Tensor:
    """`maps (..., n)` with the first pairs of states rotated by `turns (..., r)` radians."""
    r, n = turns.shape[-1], maps.shape[-1]
    sin, cos = turns.sin(), turns.cos()
    pairs = maps.unflatten(-1, (2, n // 2)).transpose(-1, -2) if halves else maps[..., : 2 * r].unflatten(-1, (r, 2))
    first, second = pairs[..., :r, :].to(turns.dtype).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).to(maps.dtype)
    if halves:
        return torch.cat([turned, pairs[..., r:, :]], dim=-2).transpose(-1, -2).flatten(-2)
    return torch.cat([turned.flatten(-2), maps[..., 2 * r :]], dim=-1)

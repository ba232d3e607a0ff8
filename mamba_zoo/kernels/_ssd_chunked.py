"""The state-space dual by chunks in plain torch: matrix products on any device, the portable implementation.

Within a chunk every step reads every earlier one through a masked matrix; between chunks only the state passes. Letters
as in `SsdArgs`; c chunks of q steps, r = h / g heads per group. Tensors are `(b, c, g, ...)`. The gradient in the
decays is summed from pairs of an earlier and a later step, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ._running_sum import running_sum
from ._ssd_args import END, SsdArgs, chunked_order

_CHUNK = 32
_ELEMENTS = 2**24  # of the largest intermediate; more samples are taken in turns


def forward(s: SsdArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `SsdArgs` for the shapes."""
    with torch.autocast(s.x.device.type, enabled=False):  # the products here are float32
        return _forward(s, want_final)


def backward(s: SsdArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    grads = {n: torch.zeros(t.shape, dtype=s.state_dtype, device=t.device) for n, t in s.differentiable().items()}
    with torch.autocast(s.x.device.type, enabled=False):
        for v in _visits(s):
            v.backward(v.tokens(dy[:, :, v.k]), None if dfinal is None else dfinal[v.rows, v.k], grads)
    return {name: g.to(getattr(s, name).dtype) for name, g in grads.items()}


def _forward(s: SsdArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    y = s.x.new_zeros(s.y_shape, dtype=s.out_dtype)
    final = s.new_state() if want_final else None
    for v in _visits(s):
        states, last = v.pass_on(v.states_of_chunks(), v.initial(), reverse=False)
        out = v.masked(v.maps, v.delta) @ v.heads_first(v.x)
        out = v.heads_last(out) + v.grown[..., None] * v.matmul(v.C, states)
        if s.D is not None:
            out = out + v.skip() * v.x
        v.write(y[:, :, v.k], out)
        if final is not None:
            final[v.rows, v.k] = last
    return y, final


def _visits(s: SsdArgs) -> Iterator[_Visit]:
    """Every direction, a few samples at a time."""
    chunk = s.chunk or min(_CHUNK, max(16, 1 << (s.m - 1).bit_length()))
    table, first = chunked_order(s.order, s.offsets, chunk)
    per_sample = max(1, table.shape[2] * s.h * max(chunk, s.p, s.n * s.p // chunk))
    some = max(1, min(s.b, _ELEMENTS // per_sample))
    for k in range(s.k):
        bounds = [(0, table.shape[2] // chunk)]
        if first is not None:
            cuts = first[k].tolist()
            bounds = list(pairwise(cuts))
        for start in range(0, s.b, some):
            yield _Visit(s, k, slice(start, min(start + some, s.b)), table, chunk, bounds)


class _Visit:
    """One direction through some samples: tokens gathered in visiting order and cut into chunks."""

    def __init__(self, s: SsdArgs, k: int, samples: slice, table: Tensor, chunk: int, bounds: list[tuple[int, int]]):
        self.s, self.k, self.samples, self.bounds = s, k, samples, bounds
        self.rows = samples if s.offsets is None else slice(None)
        b, self.q, self.acc = samples.stop - samples.start, chunk, s.state_dtype
        order = (table[samples] if table.shape[0] > 1 else table)[:, k].long().expand(b, -1)
        self.c = order.shape[1] // chunk
        self.visited, self.read = order >= 0, order.clamp(min=0)
        self.x = self.tokens(s.x if s.x.dim() == 4 else s.x[:, :, k])  # (b, c, g, q, r, p)
        self.B, self.C = (self.gather(t[:, :, k]).transpose(2, 3) for t in (s.B, s.C))  # (b, c, g, q, n)
        dt = self.steps(s.dt[:, :, k])  # (b, c, g, q, r)
        if s.dt_bias is not None:
            dt = dt + self.per_head(s.dt_bias[k])
        alive = (order != END).view(b, self.c, 1, chunk, 1)
        self.delta = torch.where(alive, F.softplus(dt) if s.dt_softplus else dt, 0.0)
        self.slope = torch.where(alive, torch.sigmoid(dt) if s.dt_softplus else torch.ones_like(dt), 0.0)
        log = self.delta * self.per_head(s.A[k]) if s.A is not None else self.steps(s.decay[:, :, k])  # type: ignore[index]
        self.sums = running_sum(log, 3)
        self.grown = self.sums.exp()  # of the state before the chunk, after each step
        self.left = (self.sums[:, :, :, -1:] - self.sums).exp()  # of each step, at the end of the chunk
        self.whole = self.grown[:, :, :, -1]  # (b, c, g, r)
        self.maps = self.C @ self.B.transpose(-1, -2)  # (b, c, g, q, q): C of a step with B of another

    def gather(self, tokens: Tensor) -> Tensor:
        """`(b, l, ...)` to `(b, c, q, ...)` in visiting order, zero at empty steps."""
        tokens = tokens[self.samples].to(self.acc)
        tail = (1,) * (tokens.dim() - 2)
        index = self.read.view(*self.read.shape, *tail).expand(-1, -1, *tokens.shape[2:])
        found = tokens.gather(1, index).masked_fill(~self.visited.view(*self.visited.shape, *tail), 0)
        return found.unflatten(1, (self.c, self.q))

    def tokens(self, x: Tensor) -> Tensor:
        """`(b, l, h, p)` to `(b, c, g, q, r, p)`."""
        return self.gather(x).unflatten(3, (self.s.g, -1)).transpose(2, 3)

    def steps(self, dt: Tensor) -> Tensor:
        """`(b, l, h)` to `(b, c, g, q, r)`."""
        return self.gather(dt).unflatten(3, (self.s.g, -1)).transpose(2, 3)

    def per_head(self, value: Tensor) -> Tensor:
        """`(h,)` to `(g, 1, r)`."""
        return value.to(self.acc).view(self.s.g, 1, -1)

    def skip(self) -> Tensor:
        """D as `(g, 1, r, p)`."""
        return self.s.D[self.k].to(self.acc).reshape(self.s.g, 1, -1, self.s.p)  # type: ignore[index]

    def initial(self) -> Tensor:
        """`(rows, g, n, r, p)`."""
        s = self.s
        if s.initial_state is None:
            rows = self.x.shape[0] if s.offsets is None else s.rows
            return self.x.new_zeros(rows, s.g, s.n, s.h // s.g, s.p)
        return self.from_outside(s.initial_state[self.rows, self.k])

    def from_outside(self, state: Tensor) -> Tensor:
        """A state `(rows, h, p, n)` as `(rows, g, n, r, p)`."""
        return state.to(self.acc).unflatten(1, (self.s.g, -1)).permute(0, 1, 4, 2, 3)

    @staticmethod
    def heads_first(x: Tensor) -> Tensor:
        """`(..., q, r, p)` to `(..., r, q, p)`; its own inverse."""
        return x.transpose(-2, -3)

    heads_last = heads_first

    @staticmethod
    def matmul(maps: Tensor, state: Tensor) -> Tensor:
        """`(..., i, j)` times `(..., j, r, p)`."""
        return (maps @ state.flatten(-2)).unflatten(-1, state.shape[-2:])

    def masked(self, maps: Tensor, scale: Tensor | None) -> Tensor:
        """`maps (b, c, g, q, q)`, or one per head `(b, c, g, r, q, q)`, of each step with itself and earlier ones.

        Multiplied by the decay in between, and by `scale (b, c, g, q, r)` of the earlier step.
        """
        sums = self.sums.transpose(-1, -2)
        gap = (sums[..., :, None] - sums[..., None, :]).masked_fill(
            torch.ones(self.q, self.q, dtype=torch.bool, device=maps.device).triu(1), -torch.inf
        )
        found = gap.exp_() * (maps[:, :, :, None] if maps.dim() == 5 else maps)
        return found if scale is None else found * scale.transpose(-1, -2)[..., None, :]

    def states_of_chunks(self) -> Tensor:
        """What the steps of each chunk leave in the state at its end, `(b, c, g, n, r, p)`."""
        return self.matmul(self.B.transpose(-1, -2), (self.left * self.delta)[..., None] * self.x)

    def pass_on(self, parts: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Carry a state through the chunks of each row: the states that enter the chunks, and the last, outside form.

        Args:
            parts: What each chunk adds, `(b, c, g, n, r, p)`.
            state: Before the first chunk, `(rows, g, n, r, p)`.
            reverse: From the last chunk to the first.
        """
        entering, ends = torch.zeros_like(parts), []
        for row, (first, last) in enumerate(self.bounds):
            now = state if self.s.offsets is None else state[row : row + 1]
            for i in reversed(range(first, last)) if reverse else range(first, last):
                entering[:, i] = now
                now = self.whole[:, i, :, None, :, None] * now + parts[:, i]
            ends.append(now)
        return entering, torch.cat(ends).permute(0, 1, 3, 4, 2).flatten(1, 2)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Add `(b, c, g, q, ...)` to `target (b, l, ...)` at the tokens of the steps."""
        shape = target.shape[2:]
        rows = value.transpose(2, 3).reshape(*self.read.shape, *shape)
        index = torch.where(self.visited, self.read, target.shape[1])
        index = index.view(*index.shape, *(1,) * len(shape)).expand_as(rows)
        spare = rows.new_zeros(rows.shape[0], target.shape[1] + 1, *shape).scatter_add_(1, index, rows)
        target[self.samples] += spare[:, :-1].to(target.dtype)

    def backward(self, dy: Tensor, dfinal: Tensor | None, grads: dict[str, Tensor]) -> None:
        """Add this visit's part to `grads`, given the gradients of its outputs and of its last states."""
        s, x = self.s, self.x
        states, _ = self.pass_on(self.states_of_chunks(), self.initial(), reverse=False)
        after = torch.zeros_like(self.initial()) if dfinal is None else self.from_outside(dfinal)
        parts = self.matmul(self.C.transpose(-1, -2), self.grown[..., None] * dy)
        ahead, dinitial = self.pass_on(parts, after, reverse=True)  # gradients of the states that leave the chunks

        agree = self.heads_first(dy) @ self.heads_first(x).transpose(-1, -2)  # (b, c, g, r, q, q)
        mixed = self.masked(self.maps, None)
        scaled = mixed * self.delta.transpose(-1, -2)[..., None, :]
        dx = self.heads_last(scaled.transpose(-1, -2) @ self.heads_first(dy))
        leaving = self.left * self.delta
        dx = dx + leaving[..., None] * self.matmul(self.B, ahead)
        if s.D is not None:
            dx = dx + self.skip() * dy
            grads["D"][self.k] += (dy * x).sum((0, 1, 3)).flatten(0, 1)

        pairs = mixed * agree
        later = (pairs @ self.delta.transpose(-1, -2)[..., None])[..., 0].transpose(-1, -2)  # (b, c, g, q, r)
        earlier = pairs.sum(-2).transpose(-1, -2)
        dmaps = self.masked(agree, self.delta).sum(3)
        dC = (self.grown[..., None] * dy).flatten(-2) @ states.flatten(-2).transpose(-1, -2)
        dB = (leaving[..., None] * x).flatten(-2) @ ahead.flatten(-2).transpose(-1, -2)
        from_state = (self.grown[..., None] * dy * self.matmul(self.C, states)).sum(-1)
        to_state = (self.left[..., None] * x * self.matmul(self.B, ahead)).sum(-1)

        gone = to_state * self.delta
        through = self.whole * (ahead * states).sum((3, 5))  # (b, c, g, r)
        both = later - earlier * self.delta + from_state
        dlog = running_sum(both.flip(3), 3).flip(3) + running_sum(gone, 3) - gone + through[:, :, :, None]
        ddelta = earlier + to_state
        if s.A is not None:
            grads["A"][self.k] += (dlog * self.delta).sum((0, 1, 3)).flatten()
            ddelta = ddelta + dlog * self.per_head(s.A[self.k])
        else:
            self.write(grads["decay"][:, :, self.k], dlog)
        ddelta = ddelta * self.slope
        if s.dt_bias is not None:
            grads["dt_bias"][self.k] += ddelta.sum((0, 1, 3)).flatten()
        if s.initial_state is not None:
            grads["initial_state"][self.rows, self.k] += dinitial
        self.write(grads["x"] if s.x.dim() == 4 else grads["x"][:, :, self.k], dx)
        self.write(grads["dt"][:, :, self.k], ddelta)
        self.write(grads["C"][:, :, self.k], dC + dmaps @ self.B)
        self.write(grads["B"][:, :, self.k], dB + dmaps.transpose(-1, -2) @ self.C)

"""The state-space dual written as its recurrence, and the gradient of that recurrence, one step after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._ssd_args import SsdArgs


def saved_shape(s: SsdArgs) -> tuple[int, ...]:
    """The shape of what `forward` saves: nothing."""
    return (0,)


def forward(s: SsdArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, None]:
    """`(y, final state if wanted, nothing saved)`; see `SsdArgs` for the shapes."""
    y = s.x.new_zeros(s.y_shape, dtype=s.state_dtype)
    final = s.new_state()
    for k in range(s.k):
        for row, (first, last) in enumerate(s.sequences(k)):
            v = _Visit(s, k, row, first, last)
            h = v.initial
            for t in range(v.m):
                h = v.decay[:, t, :, None, None] * h + v.drive(t)
                v.write(y[:, :, k], t, (h * v.C[:, t, :, None]).sum(-1) + v.skip * v.x[:, t])
            final[v.rows, k] = h
    return y.to(s.out_dtype), final if want_final else None, None


def backward(s: SsdArgs, dy: Tensor, dfinal: Tensor | None, saved: None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    acc = s.state_dtype
    grads = {name: torch.zeros(t.shape, dtype=acc, device=t.device) for name, t in s.differentiable().items()}
    for k in range(s.k):
        for row, (first, last) in enumerate(s.sequences(k)):
            v = _Visit(s, k, row, first, last)
            v.backward(v.gather(dy[:, :, k]), None if dfinal is None else dfinal[v.rows, k].to(acc), grads)
    return {name: g.to(getattr(s, name).dtype) for name, g in grads.items()}


class _Visit:
    """One direction through one row: its tokens gathered in visiting order, (b, m, ...), B and C once per head."""

    def __init__(self, s: SsdArgs, k: int, row: int, first: int, last: int):
        self.s, self.k, self.m = s, k, last - first
        self.rows = slice(None) if s.offsets is None else slice(row, row + 1)
        order = s.order[:, k, first:last].long().expand(s.b, -1)
        self.visited, self.read = order >= 0, order.clamp(min=0)
        acc = s.state_dtype
        self.x = self.gather(s.x if s.x.dim() == 4 else s.x[:, :, k])
        self.B, self.C = (self.gather(t[:, :, k]).repeat_interleave(s.h // s.g, 2) for t in (s.B, s.C))
        self.dt = self.gather(s.dt[:, :, k])
        if s.dt_bias is not None:
            self.dt = self.dt + s.dt_bias[k].to(acc)
        self.delta = F.softplus(self.dt) if s.dt_softplus else self.dt
        self.A = None if s.A is None else s.A[k].to(acc)
        log = self.gather(s.decay[:, :, k]) if s.decay is not None else self.delta * self.A  # type: ignore[operator]
        self.decay = torch.exp(log)
        self.skip: Tensor | float = 0.0 if s.D is None else s.D[k].to(acc)
        if s.initial_state is None:
            self.initial = self.x.new_zeros(s.b, s.h, s.p, s.n)
        else:
            self.initial = s.initial_state[self.rows, k].to(acc)

    def gather(self, tokens: Tensor) -> Tensor:
        """`(b, l, ...)` in visiting order, zero at empty steps."""
        tail = (1,) * (tokens.dim() - 2)
        index = self.read.view(*self.read.shape, *tail).expand(-1, -1, *tokens.shape[2:])
        found = tokens.to(self.s.state_dtype).gather(1, index)
        return found.masked_fill(~self.visited.view(*self.visited.shape, *tail), 0)

    def write(self, target: Tensor, t: int, value: Tensor) -> None:
        """Add `value` (b, ...) to `target` (b, l, ...) at the tokens of step `t`."""
        some = self.visited[:, t].nonzero()[:, 0]
        target[some, self.read[some, t]] += value[some]

    def drive(self, t: int) -> Tensor:
        """What step `t` adds to the state, (b, h, p, n)."""
        return (self.delta[:, t, :, None] * self.x[:, t])[..., None] * self.B[:, t, :, None]

    def backward(self, dy: Tensor, dfinal: Tensor | None, grads: dict[str, Tensor]) -> None:
        """Add this visit's part to `grads`, given the gradients of its outputs (b, m, h, p) and of its last state."""
        s, k = self.s, self.k
        states = [self.initial]
        for t in range(self.m):
            states.append(self.decay[:, t, :, None, None] * states[-1] + self.drive(t))
        g = torch.zeros_like(states[0]) if dfinal is None else dfinal.clone()
        for t in reversed(range(self.m)):
            delta, decay = self.delta[:, t], self.decay[:, t]
            g = g + dy[:, t, :, :, None] * self.C[:, t, :, None]
            self.write_group(grads["C"], t, (dy[:, t, :, :, None] * states[t + 1]).sum(2))
            into = (g * self.B[:, t, :, None]).sum(-1)  # (b, h, p)
            self.write_group(grads["B"], t, (g * (delta[..., None] * self.x[:, t])[..., None]).sum(2))
            ddelta = (into * self.x[:, t]).sum(-1)
            dlog = decay * (g * states[t]).sum((-1, -2))
            dx = delta[..., None] * into + self.skip * dy[:, t]
            if s.D is not None:
                grads["D"][k] += (dy[:, t] * self.x[:, t]).sum(0)
            if self.A is None:
                self.write(grads["decay"][:, :, k], t, dlog)
            else:
                grads["A"][k] += (dlog * delta).sum(0)
                ddelta = ddelta + dlog * self.A
            if s.dt_softplus:
                ddelta = ddelta * torch.sigmoid(self.dt[:, t])
            if s.dt_bias is not None:
                grads["dt_bias"][k] += ddelta.sum(0)
            self.write(grads["x"] if s.x.dim() == 4 else grads["x"][:, :, k], t, dx)
            self.write(grads["dt"][:, :, k], t, ddelta)
            g = decay[..., None, None] * g
        if s.initial_state is not None:
            grads["initial_state"][self.rows, k] += g

    def write_group(self, grad: Tensor, t: int, value: Tensor) -> None:
        """The same for a gradient per head (b, h, n) of what a group of heads shares."""
        self.write(grad[:, :, self.k], t, value.unflatten(1, (self.s.g, -1)).sum(2))

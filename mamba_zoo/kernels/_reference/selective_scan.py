"""The selective scan written as its recurrence, and the gradient of that recurrence, one step after another.

`recurrence` is plain differentiable torch: the tests take it in float64, through autograd, as the oracle for every
backend, this one's hand-written backward included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._scan_args import ScanArgs


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """Nothing is kept from the forward pass: the backward runs it again."""
    return (0,)


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, what the backward needs if `save`)`; see `ScanArgs` for the shapes."""
    y, final = recurrence(s)
    return y, final if want_final else None, None


def recurrence(s: ScanArgs) -> tuple[Tensor, Tensor]:
    """Equation 2 of arXiv:2312.00752 with the exact step on A and the Euler step on B, as in its published code."""
    columns, finals = [], []
    for k in range(s.k):
        y = s.u.new_zeros(s.b, s.l, s.d, dtype=s.state_dtype)
        states = []
        for row in range(s.rows):
            visit = _Visit(s, row, k)
            h, outputs = visit.initial_state(), []
            for t in range(visit.m):
                h = torch.exp(visit.delta[:, t, :, None] * visit.A) * h + visit.drive(t)
                outputs.append((h * visit.C[:, t, None, :]).sum(-1))
            if outputs:
                y = visit.write(y, torch.stack(outputs, dim=1) + visit.skip())
            states.append(h)
        columns.append(y)
        finals.append(torch.cat(states))
    y = torch.stack(columns, dim=2)
    if s.z is not None:
        y = y * F.silu(_per_direction(s.z, s.state_dtype))
    if s.reduce != "none":
        y = y.sum(2) if s.reduce == "sum" else y.mean(2)
    return y.to(s.out_dtype), torch.stack(finals, dim=1)


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    acc = s.state_dtype
    grads = {name: torch.zeros_like(x, dtype=acc) for name, x in s.differentiable().items()}
    dy = dy.to(acc)
    if s.reduce != "none":
        dy = (dy / s.k if s.reduce == "mean" else dy)[:, :, None].expand(-1, -1, s.k, -1)
    if s.z is not None:
        z = _per_direction(s.z, acc)
        ungated, _ = recurrence(s.replace(z=None, reduce="none", out_dtype=acc))
        gate = torch.sigmoid(z)
        dz = dy * ungated * gate * (1 + z * (1 - gate))
        grads["z"] = dz.sum(2) if s.z.dim() == 3 else dz
        dy = dy * z * gate
    for k in range(s.k):
        for row in range(s.rows):
            h_grad = None if dfinal is None else dfinal[s.state_rows(row), k].to(acc)
            _Visit(s, row, k).backward(dy[:, :, k], h_grad, grads)
    return {name: g.to(getattr(s, name).dtype) for name, g in grads.items()}


class _Visit:
    """One direction through one row: its tokens gathered in visiting order, (b, m, ...)."""

    def __init__(self, s: ScanArgs, row: int, k: int):
        self.s, self.row, self.k = s, row, k
        first, last = s.steps(row, k)
        order = s.order[:, k, first:last].long().expand(s.b, -1)
        self.m = order.shape[1]
        self.empty = (order < 0)[:, :, None]
        self.read = order.clamp(min=0)[:, :, None]
        self.u, self.B, self.C = self.gather(s.u), self.gather(s.B), self.gather(s.C)
        self.dt = self.gather(s.dt)
        if s.dt_bias is not None:
            self.dt = self.dt + s.dt_bias[k].to(s.state_dtype)
        self.delta = F.softplus(self.dt) if s.dt_softplus else self.dt
        self.A = s.A[k].to(s.state_dtype)

    def gather(self, x: Tensor) -> Tensor:
        x = (x if x.dim() == 3 else x[:, :, self.k]).to(self.s.state_dtype)
        return x.gather(1, self.read.expand(-1, -1, x.shape[-1])).masked_fill(self.empty, 0)

    def write(self, y: Tensor, rows: Tensor) -> Tensor:
        """`y` (b, l, c) plus `rows` (b, m, c) at their tokens; empty steps go to a spare token that is dropped."""
        index = torch.where(self.empty, y.shape[1], self.read).expand_as(rows)
        return F.pad(y, (0, 0, 0, 1)).scatter_add(1, index, rows)[:, :-1]

    def initial_state(self) -> Tensor:
        if self.s.initial_state is None:
            return self.u.new_zeros(len(self.u), self.s.d, self.s.n)
        return self.s.initial_state[self.s.state_rows(self.row), self.k].to(self.s.state_dtype)

    def drive(self, t: int) -> Tensor:
        """What step `t` adds to the state, (b, d, n)."""
        return (self.delta[:, t] * self.u[:, t])[:, :, None] * self.B[:, t, None, :]

    def skip(self) -> Tensor | float:
        return 0.0 if self.s.D is None else self.s.D[self.k].to(self.s.state_dtype) * self.u

    def backward(self, dy: Tensor, h_grad: Tensor | None, grads: dict[str, Tensor]) -> None:
        """Add this visit's part to `grads`, given the gradients of its outputs (b, l, d) and of its last state."""
        s, k = self.s, self.k
        dy = self.gather(dy)
        states = [self.initial_state()]
        for t in range(self.m):
            states.append(torch.exp(self.delta[:, t, :, None] * self.A) * states[-1] + self.drive(t))
        g = torch.zeros_like(states[0]) if h_grad is None else h_grad.clone()
        du, ddelta = torch.zeros_like(self.u), torch.zeros_like(self.u)
        dB, dC = torch.zeros_like(self.B), torch.zeros_like(self.C)
        for t in reversed(range(self.m)):
            g = g + dy[:, t, :, None] * self.C[:, t, None, :]
            dC[:, t] = (dy[:, t, :, None] * states[t + 1]).sum(1)
            decay = torch.exp(self.delta[:, t, :, None] * self.A)
            through = g * decay * states[t]
            drive = (g * self.B[:, t, None, :]).sum(-1)
            grads["A"][k] += (through * self.delta[:, t, :, None]).sum(0)
            ddelta[:, t] = (through * self.A).sum(-1) + drive * self.u[:, t]
            dB[:, t] = (g * (self.delta[:, t] * self.u[:, t])[:, :, None]).sum(1)
            du[:, t] = drive * self.delta[:, t]
            g = g * decay
        if s.D is not None:
            grads["D"][k] += (dy * self.u).sum((0, 1))
            du = du + s.D[k].to(s.state_dtype) * dy
        if s.dt_softplus:
            ddelta = ddelta * torch.sigmoid(self.dt)
        if s.dt_bias is not None:
            grads["dt_bias"][k] += ddelta.sum((0, 1))
        if s.initial_state is not None:
            grads["initial_state"][s.state_rows(self.row), k] += g
        for name, rows in {"u": du, "dt": ddelta, "B": dB, "C": dC}.items():
            whole = grads[name]
            target = whole if whole.dim() == 3 else whole[:, :, k]
            target.copy_(self.write(target, rows))


def _per_direction(z: Tensor, dtype: torch.dtype) -> Tensor:
    return (z if z.dim() == 4 else z[:, :, None]).to(dtype)

"""The causal convolution as w indexed sums over the tokens in visiting order, and the gradient of that sum.

`convolution` is plain differentiable torch: the tests take it in float64, through autograd, as the oracle for every
backend, this one's hand-written backward included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._conv_args import ConvArgs


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    y, final = convolution(s)
    return y, final if want_final else None


def convolution(s: ConvArgs) -> tuple[Tensor, Tensor]:
    """The outputs `(b, l, k, d)` at their own tokens, and the last w - 1 inputs of every row."""
    visit = _Visit(s)
    y = visit.sum()
    return visit.write(F.silu(y) if s.silu else y).to(s.x.dtype), visit.final_state()


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    visit = _Visit(s)
    g = visit.read(dy.to(s.state_dtype))
    if s.silu:
        total = visit.sum()
        gate = torch.sigmoid(total)
        g = g * gate * (1 + total * (1 - gate))
    tape = torch.zeros_like(visit.tape)
    taps = []
    for j in range(s.w):
        taps.append((g * visit.tap(j)).sum((0, 2)))
        visit.add_to_tap(tape, j, g * visit.weight[:, :, :, j])
    if dfinal is not None:
        visit.add_to_final_state(tape, dfinal.to(s.state_dtype))
    dx = visit.write(tape[:, :, visit.history :])
    if s.x.dim() == 3:
        dx = dx.sum(2)
    grads = {"x": dx, "weight": torch.stack(taps, dim=-1), "bias": g.sum((0, 2))}
    if s.initial_state is not None:
        grads["initial_state"] = visit.rows_of(tape[:, :, : visit.history])
    return {name: grads[name].to(x.dtype) for name, x in s.differentiable().items()}


class _Visit:
    """All directions at once on their *tape* (b, k, history + m, d): the state of every row, then the tokens visited.

    `source` (k, m, w) says which place on the tape tap j of step t reads, `last` (k, rows or 1, w - 1) which places
    make the final state.
    """

    def __init__(self, s: ConvArgs):
        self.s, self.lag = s, s.w - 1
        order = s.order.expand(s.b, -1, -1).long()
        self.empty = (order < 0)[..., None]
        self.token = order.clamp(min=0)[..., None]
        tokens = self.read(s.x.to(s.state_dtype))
        rows = 1 if s.offsets is None else s.states
        self.history = rows * self.lag
        past = tokens.new_zeros(s.b, s.k, self.history, s.d)
        if s.initial_state is not None:
            # (rows, k, d, lag) -> (b, k, rows * lag, d): one sample holds all packed rows, else one row a sample.
            past = s.initial_state.unflatten(0, (s.b, rows)).permute(0, 2, 1, 4, 3).flatten(2, 3).to(s.state_dtype)
        self.tape = torch.cat([past, tokens], dim=2)
        self.weight = s.weight[:, None].to(s.state_dtype)  # (k, 1, d, w)
        self.direction = torch.arange(s.k, device=order.device)[:, None]
        self.source, self.last = self._places(order.device)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        s, lag = self.s, self.lag
        step = torch.arange(s.m, device=device).expand(s.k, -1)
        if s.offsets is None:
            first, last = torch.zeros_like(step[:, :1]), torch.full_like(step[:, :1], s.m)
            row = torch.zeros_like(step)
        else:
            first, last = s.offsets[:, :-1].long(), s.offsets[:, 1:].long()
            row = torch.searchsorted(last.contiguous(), step.contiguous(), right=True)
        back = torch.arange(s.w, device=device) - lag  # tap j reads the step j - lag away
        place = (step - first.gather(1, row))[..., None] + back  # within the row; negative is its history
        source = torch.where(place >= 0, self.history + step[..., None] + back, row[..., None] * lag + lag + place)
        place = (last - first)[..., None] + back[:-1]
        rows = torch.arange(first.shape[1], device=device)[None, :, None]
        end = torch.where(place >= 0, self.history + last[..., None] + back[:-1], rows * lag + lag + place)
        return source, end

    def read(self, x: Tensor) -> Tensor:
        """Tokens `(b, l, d)` or `(b, l, k, d)` in visiting order: (b, k, m, d), zero at empty steps."""
        s = self.s
        x = (x[:, :, None] if x.dim() == 3 else x).expand(s.b, s.l, s.k, s.d).transpose(1, 2)
        return x.gather(2, self.token.expand(-1, -1, -1, s.d)).masked_fill(self.empty, 0)

    def write(self, rows: Tensor) -> Tensor:
        """Rows `(b, k, m, d)` at their tokens, (b, l, k, d); empty steps go to a spare token that is dropped."""
        s = self.s
        index = torch.where(self.empty, s.l, self.token).expand_as(rows)
        return rows.new_zeros(s.b, s.k, s.l + 1, s.d).scatter(2, index, rows)[:, :, :-1].transpose(1, 2).contiguous()

    def tap(self, j: int) -> Tensor:
        return self.tape[:, self.direction, self.source[:, :, j]]

    def sum(self) -> Tensor:
        """Before the activation, (b, k, m, d)."""
        s = self.s
        total = self.tape.new_zeros(()) if s.bias is None else s.bias[:, None].to(s.state_dtype)
        for j in range(s.w):
            total = total + self.weight[:, :, :, j] * self.tap(j)
        return total

    def add_to_tap(self, tape: Tensor, j: int, rows: Tensor) -> None:
        # Two steps never read the same place through one tap, so nothing is lost without accumulation.
        tape[:, self.direction, self.source[:, :, j]] += rows

    def final_state(self) -> Tensor:
        places = self.last.flatten(1)
        return self.rows_of(self.tape[:, self.direction, places])

    def add_to_final_state(self, tape: Tensor, rows: Tensor) -> None:
        index = self.last.flatten(1)
        grad = rows.unflatten(0, (self.s.b, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)
        tape[:, self.direction, index] += grad

    def rows_of(self, tape: Tensor) -> Tensor:
        """`(b, k, rows * (w - 1), d)` -> `(rows, k, d, w - 1)`, the layout of a state."""
        s = self.s
        rows = 1 if s.offsets is None else s.states
        return tape.unflatten(2, (rows, self.lag)).permute(0, 2, 1, 4, 3).flatten(0, 1).contiguous()

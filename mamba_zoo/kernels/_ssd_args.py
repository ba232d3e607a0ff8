"""What a backend of the state-space dual is given: checked arguments, with their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Steps that only fill a chunk: nothing decays at them. -1 is an empty step, at which the state decays.
END = -2
NAMES = ("x", "dt", "A", "B", "C", "D", "decay", "dt_bias", "initial_state")


@dataclass(slots=True)  # one is made for every call, and freezing triples what that costs
class SsdArgs:
    """Arguments of one call, already checked.

    Letters: b samples, l tokens, h heads of p channels, n states, g groups of heads that share B and C, k directions,
    m steps, s packed sequences. A *row* is a sample, or a packed sequence when `offsets` is given (then b = 1).
    """

    x: Tensor  # (b, l, h, p) shared by the directions, or (b, l, k, h, p); any strides
    dt: Tensor  # (b, l, k, h), before bias and softplus; the tokens' dtype or float32
    A: Tensor | None  # (k, h) float32 (float64 with float64 tokens), like D and dt_bias; None if `decay` is given
    B: Tensor  # (b, l, k, g, n)
    C: Tensor  # (b, l, k, g, n)
    D: Tensor | None  # (k, h, p), possibly expanded
    decay: Tensor | None  # (b, l, k, h), logarithm of what a step multiplies the state by; None: step size times A
    dt_bias: Tensor | None  # (k, h)
    order: Tensor  # (1 | b, k, m) int32, contiguous; -1 is an empty step: x, dt, B, C, decay are zero there
    offsets: Tensor | None  # (k, s + 1) int32: sequence i owns steps offsets[k, i] to offsets[k, i + 1] of direction k
    initial_state: Tensor | None  # (rows, k, h, p, n)
    dt_softplus: bool
    complete: bool  # every direction visits every token, so outputs need no zeros underneath
    chunk: int  # steps that are multiplied at once; 0 leaves it to the backend
    out_dtype: torch.dtype

    @property
    def b(self) -> int:
        return self.dt.shape[0]

    @property
    def l(self) -> int:
        return self.dt.shape[1]

    @property
    def k(self) -> int:
        return self.dt.shape[2]

    @property
    def h(self) -> int:
        return self.dt.shape[3]

    @property
    def p(self) -> int:
        return self.x.shape[-1]

    @property
    def g(self) -> int:
        return self.B.shape[3]

    @property
    def n(self) -> int:
        return self.B.shape[4]

    @property
    def m(self) -> int:
        return self.order.shape[2]

    @property
    def rows(self) -> int:
        """Rows of the initial and final state: samples, or packed sequences."""
        return self.b if self.offsets is None else self.offsets.shape[1] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of state and accumulation."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.b, self.l, self.k, self.h, self.p)

    def new_state(self) -> Tensor:
        """An uninitialised state `(rows, k, h, p, n)`."""
        return self.x.new_empty(self.rows, self.k, self.h, self.p, self.n, dtype=self.state_dtype)

    def differentiable(self) -> dict[str, Tensor]:
        """The given inputs that have a gradient, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def sequences(self, k: int) -> list[tuple[int, int]]:
        """First and one-past-last step of each row of a packed batch in direction `k`; of the whole batch otherwise."""
        if self.offsets is None:
            return [(0, self.m)]
        cuts = self.offsets[k].tolist()
        return list(pairwise(cuts))


def chunked_order(order: Tensor, offsets: Tensor | None, chunk: int) -> tuple[Tensor, Tensor | None]:
    """Visits cut into chunks, none of which holds steps of two packed sequences.

    Args:
        order: `(1 | b, k, m)`.
        offsets: `(k, s + 1)` step boundaries of packed sequences, or None.
        chunk: Steps per chunk.

    Returns:
        The table `(1 | b, k, chunks * chunk)`, `END` where a chunk is not full, and for packed sequences the first
        chunk of each, `(k, s + 1)` int32. The number of chunks depends on shapes alone.
    """
    m = order.shape[2]
    chunks = -(-m // chunk)
    if offsets is None:
        filled = torch.nn.functional.pad(order, (0, chunks * chunk - m), value=END)
        return filled.contiguous(), None
    k, cuts = offsets.shape
    lengths = offsets.diff(dim=1)
    first = torch.nn.functional.pad((lengths + chunk - 1).div(chunk, rounding_mode="floor").cumsum(1), (1, 0))
    step = torch.arange(m, device=order.device, dtype=offsets.dtype).expand(k, -1).contiguous()
    row = torch.searchsorted(offsets[:, 1:].contiguous(), step, right=True).clamp(max=cuts - 2)
    place = first.gather(1, row) * chunk + step - offsets.gather(1, row)
    table = order.new_full((1, k, (chunks + cuts - 1) * chunk), END)
    table[0].scatter_(1, place.long(), order[0])
    return table, first.to(torch.int32).contiguous()

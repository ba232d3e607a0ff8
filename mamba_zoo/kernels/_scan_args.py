"""What a backend of the selective scan is given: checked arguments, with their sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)  # one is made for every call, and freezing triples what that costs
class ScanArgs:
    """Arguments of one call, already checked.

    Letters: b samples, l tokens, d channels, n states, k directions, m steps, s packed sequences. A *row* is a sample,
    or a packed sequence when `offsets` is given (then b = 1).
    """

    u: Tensor  # (b, l, d) shared by the directions, or (b, l, k, d); any strides
    dt: Tensor  # (b, l, k, d), before bias and softplus
    A: Tensor  # (k, d, n) float32 (float64 with float64 tokens), like D and dt_bias
    B: Tensor  # (b, l, k, n)
    C: Tensor  # (b, l, k, n)
    D: Tensor | None  # (k, d)
    z: Tensor | None  # (b, l, d) or (b, l, k, d), the gate before its SiLU
    dt_bias: Tensor | None  # (k, d)
    order: Tensor  # (1 | b, k, m) int32, contiguous; -1 is an empty step: u, dt, B, C are zero and nothing is written
    offsets: Tensor | None  # (k, s + 1) int32: sequence i owns steps offsets[k, i] to offsets[k, i + 1] of direction k
    initial_state: Tensor | None  # (rows, k, d, n)
    dt_softplus: bool
    reduce: str  # "none": y is (b, l, k, d); "sum" or "mean" over directions: (b, l, d)
    complete: bool  # every direction visits every token, so y needs no zeros underneath
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
    def d(self) -> int:
        return self.dt.shape[3]

    @property
    def n(self) -> int:
        return self.A.shape[2]

    @property
    def m(self) -> int:
        return self.order.shape[2]

    @property
    def rows(self) -> int:
        """Loops of the reference: the whole batch at once, or each packed sequence."""
        return 1 if self.offsets is None else self.offsets.shape[1] - 1

    @property
    def states(self) -> int:
        """Rows of the initial and final state: samples, or packed sequences."""
        return self.b if self.offsets is None else self.offsets.shape[1] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of state and accumulation."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def y_shape(self) -> tuple[int, ...]:
        shape = (self.b, self.l, self.k, self.d)
        return shape if self.reduce == "none" else (self.b, self.l, self.d)

    def new_y(self) -> Tensor:
        """An output: uninitialised if every token is visited, else zeros."""
        make = self.u.new_empty if self.complete else self.u.new_zeros
        return make(self.y_shape, dtype=self.out_dtype)

    def new_state(self) -> Tensor:
        """An uninitialised state `(rows, k, d, n)`."""
        return self.u.new_empty(self.states, self.k, self.d, self.n, dtype=self.state_dtype)

    def steps(self, row: int, direction: int) -> tuple[int, int]:
        """First and one-past-last step of a row in one direction."""
        if self.offsets is None:
            return 0, self.m
        return int(self.offsets[direction, row]), int(self.offsets[direction, row + 1])

    def state_rows(self, row: int) -> slice:
        """Which rows of the initial state loop `row` of the reference reads."""
        return slice(None) if self.offsets is None else slice(row, row + 1)

    def differentiable(self) -> dict[str, Tensor]:
        """The given inputs that have a gradient, by name."""
        names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def replace(self, **changes: Any) -> ScanArgs:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

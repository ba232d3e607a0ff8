"""What a backend of the causal convolution is given: checked arguments, with their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)  # one is made for every call, and freezing triples what that costs
class ConvArgs:
    """Arguments of one call, already checked.

    Letters as in `ScanArgs`, and w taps. A *row* is a sample, or a packed sequence when `offsets` is given (then
    b = 1).
    """

    x: Tensor  # (b, l, d) shared by the directions, or (b, l, k, d); any strides
    weight: Tensor  # (k, d, w) float32 (float64 with float64 tokens), like bias and the state; tap w - 1 is the present
    bias: Tensor | None  # (k, d)
    order: Tensor  # (1 | b, k, m) int32, contiguous; -1 is an empty step: a zero token, and nothing is written
    offsets: Tensor | None  # (k, s + 1) int32: sequence i owns steps offsets[k, i] to offsets[k, i + 1] of direction k
    initial_state: Tensor | None  # (rows, k, d, w - 1), oldest first
    silu: bool
    complete: bool  # every direction visits every token, so y needs no zeros underneath

    @property
    def b(self) -> int:
        return self.x.shape[0]

    @property
    def l(self) -> int:
        return self.x.shape[1]

    @property
    def k(self) -> int:
        return self.weight.shape[0]

    @property
    def d(self) -> int:
        return self.weight.shape[1]

    @property
    def w(self) -> int:
        return self.weight.shape[2]

    @property
    def m(self) -> int:
        return self.order.shape[2]

    @property
    def states(self) -> int:
        """Rows of the initial and final state: samples, or packed sequences."""
        return self.b if self.offsets is None else self.offsets.shape[1] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of weights, accumulation and state."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def new_y(self) -> Tensor:
        """An output `(b, l, k, d)`: uninitialised if every token is visited, else zeros."""
        make = self.x.new_empty if self.complete else self.x.new_zeros
        return make(self.b, self.l, self.k, self.d)

    def new_state(self) -> Tensor:
        """An uninitialised state `(rows, k, d, w - 1)`."""
        return self.x.new_empty(self.states, self.k, self.d, self.w - 1, dtype=self.state_dtype)

    def differentiable(self) -> dict[str, Tensor]:
        """The given inputs that have a gradient, by name."""
        names = ("x", "weight", "bias", "initial_state")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

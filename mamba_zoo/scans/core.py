"""A scan: in which order each direction visits the tokens, and how the directions become one again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.figure import Figure

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Scan:
    """`k` visiting orders over `l` tokens, and how their outputs become one.

    A scan is data: the kernels take `order`, so tokens are never moved. `gather`, `restore` and `merge` do the same
    with plain tensors, for models that reorder outside the kernel and for tests.

    Attributes:
        order: `(k, m)` int64; direction `k` reads token `order[k, i]` at step `i`. -1 is an empty step: it stands for
            a token of zeros and nothing is written.
        length: `l`, the number of tokens.
        reduce: Over directions: "sum" (VMamba) or "mean" (Vim).
        size: Grid of the tokens in raster order, such as `(height, width)`; empty if there is none.
        name: For messages and plots.
        extra: Tokens that are on no place of the grid, such as a class token; ascending.
        padded: Whether there are empty steps; found from `order`.

    Raises:
        TypeError: `order` is no integer tensor.
        ValueError: it is not `(k, m)`, holds an index outside -1..l-1, or visits a token twice in one direction.

    Example:
        >>> scan = Scan(torch.tensor([[0, 1, 2], [2, 1, 0]]), length=3)
        >>> scan.merge(scan.restore(scan.gather(torch.ones(1, 3, 1)))).flatten()
        tensor([2., 2., 2.])
    """

    order: Tensor
    length: int
    reduce: Literal["sum", "mean"] = "sum"
    size: tuple[int, ...] = ()
    name: str = ""
    extra: tuple[int, ...] = ()
    padded: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        label = f"scan {self.name!r}" if self.name else "Scan"
        order = self.order
        if (
            not isinstance(order, Tensor)
            or order.is_floating_point()
            or order.is_complex()
            or order.dtype == torch.bool
        ):
            found = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"{label}: order must be an integer tensor of token indices, not {found}")
        if order.dim() != 2 or 0 in order.shape:
            raise ValueError(f"{label}: order must be (directions, steps), both >= 1, not {tuple(order.shape)}")
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"{label}: reduce={self.reduce!r} is unknown; choose 'sum' or 'mean'")
        if self.size and math.prod(self.size) + len(self.extra) != self.length:
            raise ValueError(
                f"{label}: size {self.size} and {len(self.extra)} extra tokens do not make length={self.length}"
            )
        object.__setattr__(self, "order", order.to(torch.int64))
        if not order.is_meta and not isinstance(order, torch._subclasses.FakeTensor):
            table = self.order.detach().cpu().numpy()
            _check_values(table, self.length, label)
            object.__setattr__(self, "padded", bool((table < 0).any()))

    @property
    def k(self) -> int:
        """Directions."""
        return self.order.shape[0]

    @property
    def m(self) -> int:
        """Steps of each direction."""
        return self.order.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """Tokens `(b, l, d)` in visiting order `(b, k, m, d)`; zeros at empty steps."""
        self._expect(x, 3, -2, self.length, "tokens (b, l, d)")
        if self.padded:
            x = F.pad(x, (0, 0, 0, 1))  # index -1 then reads a token of zeros
        return x[:, self.order]

    def restore(self, y: Tensor) -> Tensor:
        """Steps `(b, k, m, d)` back at their tokens `(b, k, l, d)`; zeros where a direction never was."""
        self._expect(y, 4, -2, self.m, "steps (b, k, m, d)")
        index = self.order if not self.padded else torch.where(self.order < 0, self.length, self.order)
        out = y.new_zeros(y.shape[0], self.k, self.length + self.padded, y.shape[3])
        return out.scatter(2, index[None, :, :, None].expand_as(y), y)[:, :, : self.length]

    def merge(self, y: Tensor) -> Tensor:
        """Directions `(b, k, l, d)` reduced to `(b, l, d)`."""
        self._expect(y, 4, -2, self.length, "directions (b, k, l, d)")
        return y.sum(1) if self.reduce == "sum" else y.mean(1)

    def to(self, device: torch.device | str) -> Scan:
        """The same scan with its table on `device`."""
        if self.order.device == torch.device(device):
            return self
        moved = copy.copy(self)
        object.__setattr__(moved, "order", self.order.to(device))
        return moved

    def statistics(self, window: int = 16) -> dict[str, float]:
        """How the orders treat the grid; see `mamba_zoo.scans.statistics.scan_statistics`."""
        from .statistics import scan_statistics

        return scan_statistics(self, window)

    def plot(self, path: str | PathLike[str] | None = None, **options: Any) -> Figure:
        """One panel a direction, its path coloured by step; see `mamba_zoo.scans.plot.plot_scan`."""
        from .plot import plot_scan

        return plot_scan(self, path, **options)

    def coordinates(self) -> np.ndarray:
        """Place of every token on the grid, `(l, dimensions)` int64; -1 in every dimension for extra tokens.

        A scan without `size` lies on a line.
        """
        size = self.size or (self.length - len(self.extra),)
        places = np.full((self.length, len(size)), -1, dtype=np.int64)
        on_grid = np.setdiff1d(np.arange(self.length), self.extra)
        places[on_grid] = np.stack(np.unravel_index(np.arange(math.prod(size)), size), axis=1)
        return places

    def __repr__(self) -> str:
        return (
            f"Scan({self.name or 'unnamed'}, size={self.size}, k={self.k}, m={self.m}, l={self.length}, {self.reduce})"
        )

    def _expect(self, x: Tensor, dim: int, axis: int, value: int, what: str) -> None:
        if x.dim() != dim or x.shape[axis] != value or (dim == 4 and x.shape[1] != self.k):
            raise ValueError(f"{self!r} needs {what}, but the tensor has shape {tuple(x.shape)}")


def check_coverage(scan: Scan) -> None:
    """Raise ValueError if no direction ever visits some token."""
    seen = np.zeros(scan.length + 1, dtype=bool)
    seen[scan.order.cpu().numpy()] = True  # the last place takes the empty steps
    if not seen[:-1].all():
        missing = np.flatnonzero(~seen[:-1])
        raise ValueError(
            f"scan {scan.name!r} never visits {len(missing)} of {scan.length} tokens, token {missing[0]} first; "
            "every token must be visited by some direction"
        )


def _check_values(table: np.ndarray, length: int, label: str) -> None:
    low, high = int(table.min()), int(table.max())
    if low < -1 or high >= length:
        bad = low if low < -1 else high
        raise ValueError(f"{label}: order holds {bad}, but tokens run from 0 to {length - 1} (-1 for an empty step)")
    for direction, row in enumerate(table):
        counts = np.bincount(row + 1, minlength=1)[1:]
        if counts.size and counts.max() > 1:
            raise ValueError(
                f"{label}: direction {direction} visits token {int(counts.argmax())} twice; "
                "each direction may visit a token once"
            )


def uncompiled(function: Function) -> Function:
    """`function`, which torch.compile calls as it is: orders that follow from data, made by NumPy and SciPy."""
    return cast(Function, torch.compiler.disable(function))

"""Maps of time frames: which frames are real, and what a stream must remember of those that went by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans import scan_order


@dataclass
class Frames:
    """What layers over maps `(b, t, f, c)` must know of the time axis besides its values.

    Attributes:
        lengths: Frames of each sample that are real, the first ones; None if all are.
        mask: `(b, t, 1, 1)`, 1 for real frames and 0 for the others; None if all are real.
        state: What causal layers keep between the chunks of a stream, by name; None if the input is whole.
    """

    lengths: tuple[int, ...] | None = None
    mask: Tensor | None = None
    state: dict[str, Tensor] | None = None
    _orders: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int] | None, steps: int, like: Tensor) -> Frames:
        """For a batch whose samples have `lengths` of the `steps` frames; all of them if None."""
        if lengths is None or min(lengths) == steps:
            return cls()
        ends = torch.tensor(lengths, device=like.device)[:, None]
        mask = torch.arange(steps, device=like.device) < ends
        return cls(tuple(lengths), mask[:, :, None, None].to(like.dtype))

    def cut(self, x: Tensor) -> Tensor:
        """`(b, t, ...)` with zeros in the frames that are not real."""
        return x if self.mask is None else x * self.mask.view(*self.mask.shape[:2], *[1] * (x.dim() - 2)).to(x.dtype)

    def order(self, spec: str, steps: int, repeat: int, device: torch.device, less: int = 0) -> Tensor:
        """The order `(k, m)` to visit time in, or `(b * repeat, k, m)` where samples differ in length.

        Args:
            spec: A scan of one axis.
            steps: Steps of the sequence.
            repeat: Sequences of each sample.
            device: Of the table.
            less: By how much a sequence is shorter than the frames it comes from.
        """
        if self.lengths is None:
            return scan_order(spec, (steps,), device)
        key = (spec, repeat, less)
        if key not in self._orders:  # the kernels check a table once, so that layers had better share it
            lengths = [max(n - less, 1) for n in self.lengths]
            tables = {n: scan_order(spec, (n,), device) for n in set(lengths)}
            m = max(table.shape[1] for table in tables.values())
            rows = [F.pad(tables[n], (0, m - tables[n].shape[1]), value=-1) for n in lengths]
            self._orders[key] = torch.stack(rows).repeat_interleave(repeat, 0)
        return self._orders[key]


class MapNorm(nn.Module):
    """Instance norm of maps `(b, t, f, c)` with a weight and a bias per channel.

    Args:
        dim: Channels c.
        causal: Take mean and variance over the frequencies of each frame, instead of over all frames as well.
        together: Over all channels too, as a group norm of one group.
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, dim: int, causal: bool = False, together: bool = False, eps: float = 1e-5, device=None, dtype=None
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.axes = [*([] if causal else [1]), 2, *([3] if together else [])]
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, c)` to the same shape; frames that are not real do not count, and come out as anything."""
        exact = x.float() if x.dtype.itemsize < 4 else x
        if frames.mask is None or 1 not in self.axes:
            variance, mean = torch.var_mean(exact, self.axes, correction=0, keepdim=True)
        else:
            others = [x.shape[axis] for axis in self.axes if axis != 1]
            count = frames.mask.sum(1, keepdim=True) * torch.tensor(others).prod()
            mean = (exact * frames.mask).sum(self.axes, keepdim=True) / count
            variance = ((exact - mean).square() * frames.mask).sum(self.axes, keepdim=True) / count
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias - mean * scale, exact, scale).to(x.dtype)


class MapConv(nn.Module):
    """A convolution of maps `(b, t, f, c)` that keeps the number of frames.

    Args:
        dim_in: Channels read.
        dim_out: Channels written.
        kernel: Taps in time and in frequency.
        dilation: Frames between taps.
        stride: Frequencies between outputs; with more than 1 the frequencies are not padded.
        causal: Look at past frames only.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    name = ""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: tuple[int, int] = (1, 1),
        dilation: int = 1,
        stride: int = 1,
        causal: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        span = dilation * (kernel[0] - 1)
        self.past = span if causal else 0
        padding = (0 if causal else span // 2, 0 if stride > 1 else kernel[1] // 2)
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, (1, stride), padding, (dilation, 1), **dd)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, dim_in)`, zero in frames that are not real, to `(b, t, f', dim_out)`."""
        if self.past:
            before = x.new_zeros(x.shape[0], self.past, *x.shape[2:])
            if frames.state is not None:
                before = frames.state.get(self.name, before)
            x = torch.cat([before, x], dim=1)
            if frames.state is not None:
                frames.state[self.name] = x[:, -self.past :].clone()  # a view would keep all of x
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class WidenFrequency(nn.Module):
    """A transposed convolution over the frequencies of maps `(b, t, f, c)`, 3 taps and stride 2: `f` to `2 f + 1`."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.ConvTranspose2d(dim, dim, (1, 3), (1, 2), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, t, f, dim)` to `(b, t, 2 f + 1, dim)`."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Slope(nn.Module):
    """PReLU over the last axis, with one slope per channel."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 0.25, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same shape."""
        return F.prelu(x.reshape(-1, x.shape[-1]), self.weight.to(x.dtype)).view(x.shape)


class MapUnit(nn.Module):
    """A convolution of maps, a norm and a slope; what it puts out is zero in frames that are not real."""

    def __init__(self, conv: nn.Module, dim: int, causal: bool = False, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.conv = conv
        self.norm = MapNorm(dim, causal, **dd)
        self.slope = Slope(dim, **dd)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(b, t, f, c)` to `(b, t, f', dim)`."""
        x = self.conv(x) if isinstance(self.conv, WidenFrequency) else self.conv(x, frames)
        return frames.cut(self.slope(self.norm(x, frames)))

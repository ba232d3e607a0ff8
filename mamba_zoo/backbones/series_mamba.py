"""A Mamba over the steps of a series of any length: to classify, to forecast, or to give a value at every step.

A model of our own, from the blocks of arXiv:2312.00752, for what the published forecasters cannot do: series of several
lengths, padded or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans import ScanLike, scan_order
from ._block import AddNormBlock, RMSNorm, add_residual
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._series import EPS, SeriesModel, series_scan
from ._stack import State, advance, first_state

Lengths = Sequence[int] | Tensor


class SeriesMamba(SeriesModel):
    """Every step is a token; add-norm-mix blocks; the mean over the steps is classified.

    `pred_len=0` gives `in_chans` values at every step: of the step itself, or with a causal scan of the next one.
    Otherwise forecasts follow from the last step. Series of several lengths are given padded, with `lengths`, or packed
    one after another into one sample, with `cu_seqlens`; both give what each series gives alone, in every direction.
    With `scan="forward"` and a value at every step, endless series are read by `extend` and `step`, in memory that does
    not grow.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window to forecast from; any length is taken.
        pred_len: Steps to forecast; 0 is a value at every step.
        num_classes: Classes; 0 forecasts.
        dim: Width.
        depth: Blocks.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixers in units of `dim`.
        scan: Order of the steps on the grid `(l,)`; "forward" is causal, "none" keeps the convolutions but
            scans nothing.
        use_norm: Normalise every series by its own mean and deviation.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block, rising linearly to it.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size or a scan that is not possible.
    """

    takes_lengths = True

    def __init__(
        self,
        in_chans: int = 1,
        seq_len: int = 96,
        pred_len: int = 0,
        num_classes: int = 0,
        dim: int = 64,
        depth: int = 3,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        scan: ScanLike = "bidirectional",
        use_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        self.per_step = not pred_len
        super().__init__(in_chans, seq_len, pred_len, num_classes, dim, use_norm=use_norm, drop_rate=drop_rate, **dd)
        self.scan, k, ssm = series_scan(scan, "bidirectional", seq_len)
        self.embed = nn.Linear(in_chans, dim, **dd)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            AddNormBlock(dim, Mamba(dim, d_state, d_conv, expand, k=k, reduce="mean", ssm=ssm, **dd), rate, **dd)
            for rate in rates
        )
        self.norm = RMSNorm(dim, **dd)

    def _make_head(self, num_classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
        out = num_classes or (self.in_chans if self.per_step else self.pred_len * self.in_chans)
        return nn.Linear(self.num_features, out, device=device, dtype=dtype)

    def forward_features(
        self,
        x: Tensor,
        marks: Tensor | None = None,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Series as for `forward` to tokens `(b, l, dim)`; those of the padding mean nothing."""
        return self._encode(*self._prepare(x, lengths, cu_seqlens)[:2])

    def forward(
        self,
        x: Tensor,
        marks: Tensor | None = None,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Classify, forecast, or give a value at every step.

        Args:
            x: Series `(b, l, v)`.
            marks: Not read.
            lengths: `(b,)`, how many steps of each series count; the rest may hold anything. None counts all.
            cu_seqlens: `(s + 1,)` boundaries of s series in one sample `(1, l, v)`, from 0 to l; instead of `lengths`.

        Returns:
            `(b | s, num_classes)`, `(b | s, pred_len, v)`, or `(b, l, v)` with zeros in the padding.

        Raises:
            ValueError: shapes or lengths that do not fit.
        """
        x, visits, series, restore = self._prepare(x, lengths, cu_seqlens)
        tokens = self._encode(x, visits)
        if self.num_classes:
            return self.head(self.head_drop(series.mean(tokens)))
        if self.per_step:
            return series.outside(restore(self.head(self.head_drop(tokens))))
        last = self.head(self.head_drop(series.last(tokens)))
        return restore(last.unflatten(-1, (self.pred_len, self.in_chans)), True)

    def init_state(self, batch: int) -> State:
        """The memory of `batch` streams before their first step.

        Raises:
            ValueError: a model whose values follow from later steps, or from all of them.
        """
        found = {"scan": self.scan, "pred_len": self.pred_len, "num_classes": self.num_classes}
        if self.scan != "forward" or not self.per_step or self.num_classes or self.use_norm:
            told = ", ".join(f"{key}={value!r}" for key, value in found.items())
            raise ValueError(
                f"a stream needs scan='forward', pred_len=0, num_classes=0 and use_norm=False; the model has {told}, "
                f"use_norm={self.use_norm}"
            )
        return first_state(self.blocks, batch)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next steps of streams, `(b, l, v)`, to their values, likewise, and the new state; see `init_state`."""
        return self._advance(x, state, "extend")

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` for one step, `(b, v)`."""
        return self._advance(x, state, "step")

    def _advance(self, x: Tensor, state: State, how: str) -> tuple[Tensor, State]:
        hidden, residual, new = advance(self.blocks, self.embed(x), state, how)
        return self.head(self.head_drop(self.norm(add_residual(hidden, residual)).to(hidden.dtype))), new

    def _prepare(self, x: Tensor, lengths: Lengths | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Any, Any, Any]:
        """Checked, normalised series; what the blocks are given besides; where series are; what undoes the norm."""
        if x.dim() != 3 or x.shape[2] != self.in_chans or not x.shape[1]:
            raise ValueError(
                f"the model reads series (b, steps, {self.in_chans}); the input is {tuple(x.shape)}. Build it with "
                "in_chans= of your series"
            )
        series = _Series(x, lengths, cu_seqlens)
        visits: Any = series.order(self.scan)
        if cu_seqlens is not None:
            visits = (visits, cu_seqlens.to(x.device))
        x = series.outside(x)
        if not self.use_norm:
            return x, visits, series, lambda y, per_series=False: y
        mean = series.mean(x)
        square = series.mean(series.outside((x - series.spread(mean)) ** 2))
        deviation = (square + EPS).sqrt()

        def restore(y: Tensor, per_series: bool = False) -> Tensor:
            at = (lambda value: value[:, None]) if per_series else series.spread
            return y * at(deviation) + at(mean)

        return series.outside((x - series.spread(mean)) / series.spread(deviation)), visits, series, restore

    def _encode(self, x: Tensor, visits: Any) -> Tensor:
        hidden, residual = self.embed(x), None
        for block in self.blocks:
            given = (hidden, residual, visits)
            hidden, residual = checkpoint(block, *given) if self.grad_checkpointing else block(*given)  # type: ignore
        return self.norm(add_residual(hidden, residual)).to(hidden.dtype)


class _Series:
    """Where the series of a batch `(b, l, ...)` are: all of each sample, the first steps of it, or packed into one."""

    def __init__(self, x: Tensor, lengths: Lengths | None, cu_seqlens: Tensor | None):
        b, l, _ = x.shape
        self.b, self.l, self.device = b, l, x.device
        self.lengths: list[int] | None = None
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            if lengths is not None or b != 1:
                raise ValueError("cu_seqlens packs series into one sample (b=1) and takes the place of lengths")
            self.lengths = cu_seqlens.diff().tolist()
            if min(self.lengths, default=0) < 1 or sum(self.lengths) != l or int(cu_seqlens[0]) != 0:
                raise ValueError(f"cu_seqlens must rise from 0 to {l}, not {cu_seqlens.tolist()[:6]}")
            self.number = torch.repeat_interleave(torch.tensor(self.lengths)).to(x.device)
        elif lengths is not None:
            self.lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
            if len(self.lengths) != b or min(self.lengths) < 1 or max(self.lengths) > l:
                raise ValueError(f"lengths must be {b} numbers from 1 to {l}, not {self.lengths[:6]}")
            if min(self.lengths) == l:
                self.lengths = None
        self.size = None if self.lengths is None else torch.tensor(self.lengths, device=x.device)

    def order(self, scan: str) -> Tensor:
        """Visiting order of the steps: `(k, l)`, or `(b, k, l)` with empty steps after the end of each series."""
        if self.lengths is None:
            return scan_order(scan, (self.l,), self.device)
        tables = {size: scan_order(scan, (size,), "cpu") for size in set(self.lengths)}
        if self.packed:
            starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
            parts = [tables[size] + start for size, start in zip(self.lengths, starts, strict=False)]
            return torch.cat(parts, dim=1).to(torch.int32).to(self.device)
        rows = [nn.functional.pad(tables[size], (0, self.l - tables[size].shape[1]), value=-1) for size in self.lengths]
        return torch.stack(rows).to(self.device)

    def outside(self, x: Tensor) -> Tensor:
        """`x (b, l, ...)` with zeros in the padding."""
        if self.size is None or self.packed:
            return x
        steps = torch.arange(self.l, device=self.device)
        return x.masked_fill((steps >= self.size[:, None])[..., None], 0.0)

    def mean(self, x: Tensor) -> Tensor:
        """`(b, l, d)` to the mean of each series, `(b | s, d)`."""
        if self.size is None:
            return x.mean(1)
        if self.packed:
            total = x.new_zeros(len(self.size), x.shape[-1]).index_add(0, self.number, x[0])
        else:
            total = self.outside(x).sum(1)
        return total / self.size[:, None]

    def spread(self, value: Tensor) -> Tensor:
        """One row for each series, `(b | s, d)`, at all of its steps: `(b, 1, d)` or `(1, l, d)`."""
        return value[self.number][None] if self.packed else value[:, None]

    def last(self, x: Tensor) -> Tensor:
        """`(b, l, d)` at the last step of each series, `(b | s, d)`."""
        if self.size is None:
            return x[:, -1]
        if self.packed:
            return x[0, self.size.cumsum(0) - 1]
        return x[torch.arange(self.b, device=self.device), self.size - 1]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of this model is taken as it is."""
    return state_dict


@register(
    Card("series", "mamba_zoo", "Apache-2.0", "2312.00752", 122_561, notes="A model of our own, without weights."),
    num_classes=-1,
    input_size=None,
    classifier="head",
)
def series_mamba(pretrained: bool = False, **kwargs: Any) -> SeriesMamba:
    """A bidirectional Mamba over the steps: series `(b, any, v)` to a value at every step, forecasts or classes."""
    return build_model(SeriesMamba, "series_mamba", pretrained, checkpoint_filter_fn, **kwargs)

"""What models of time series share: windows in, forecasts or class scores out, and timm's contract for the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from timm.layers.helpers import get_device_dtype
from torch import Tensor, nn

from ..scans import Scan, ScanLike, as_spec, build_scan
from ._decay import undecayed

EPS = 1e-5


class SeriesModel(nn.Module):
    """A model of windows `(b, seq_len, in_chans)` of series, one channel a variate.

    It forecasts the next `pred_len` steps of every variate, or with `num_classes` gives the scores of a window. With
    `pred_len=0` it gives one value for each step of the window itself, for imputation and anomaly scores.

    Subclasses make tokens in `encode` and turn them into values in `forecast`; both see normalised windows.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window.
        pred_len: Steps to forecast; 0 is the window itself.
        num_classes: Classes; 0 forecasts.
        num_features: Width of the tokens.
        forecast_features: Width that the forecasting head reads, if it is another.
        use_norm: Subtract each window's mean and divide by its deviation, variate by variate, and undo it in forecasts.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        head: The forecasting head or the classifier.
        takes_lengths: Whether `forward` takes windows of several lengths, padded, with `lengths`.

    Raises:
        ValueError: a size that is not possible.
    """

    output_fmt = "NLC"
    takes_lengths = False

    def __init__(
        self,
        in_chans: int,
        seq_len: int,
        pred_len: int,
        num_classes: int,
        num_features: int,
        forecast_features: int | None = None,
        use_norm: bool = True,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        sizes = {"in_chans": (in_chans, 1), "seq_len": (seq_len, 1), "pred_len": (pred_len, 0)}
        for name, (value, least) in {**sizes, "num_classes": (num_classes, 0)}.items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        self.in_chans, self.seq_len, self.num_classes = in_chans, seq_len, num_classes
        self.pred_len = pred_len or seq_len
        self.num_features = self.head_hidden_size = num_features
        self.forecast_features = num_features if forecast_features is None else forecast_features
        self.use_norm = use_norm
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes, device, dtype)

    def _make_head(self, num_classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
        if num_classes:
            return nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)
        return nn.Linear(self.forecast_features, self.pred_len, device=device, dtype=dtype)

    def encode(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Normalised windows `(b, seq_len, v)` to tokens `(b, tokens, num_features)`."""
        raise NotImplementedError

    def forecast(self, tokens: Tensor) -> Tensor:
        """Tokens to normalised values `(b, pred_len, v)`."""
        raise NotImplementedError

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows `(b, l, v)`, normalised, and what undoes it: mean and deviation `(b, 1, v)`."""
        return normalise_windows(x)

    def restore(self, y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Undo `normalise` in forecasts `(b, pred_len, v)`."""
        return y * deviation + mean

    def forward_features(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows `(b, seq_len, v)` to tokens `(b, tokens, num_features)`."""
        check_window(x, self.seq_len, self.in_chans)
        return self.encode(self.normalise(x)[0] if self.use_norm else x, marks)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean of the tokens, then the classifier; `pre_logits`, or a model without classes, stops before it."""
        x = self.head_drop(x.mean(1))
        return self.head(x) if self.num_classes and not pre_logits else x

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Forecast, or classify.

        Args:
            x: Windows `(b, seq_len, v)`.
            marks: Time of each step, `(b, seq_len, marks)`, for models that read it.

        Returns:
            `(b, pred_len, v)`, or `(b, num_classes)`.

        Raises:
            ValueError: windows of another shape.
        """
        if self.num_classes:
            return self.forward_head(self.forward_features(x, marks))
        check_window(x, self.seq_len, self.in_chans)
        if not self.use_norm:
            return self.forecast(self.encode(x, marks))
        x, mean, deviation = self.normalise(x)
        return self.restore(self.forecast(self.encode(x, marks)), mean, deviation)

    def input_shape(self, steps: int | None = None, variates: int | None = None) -> tuple[int, ...]:
        """Shape of one input without the batch."""
        return (steps or self.seq_len, variates or self.in_chans)

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that decay should leave alone, see `undecayed`."""
        return undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: the classifier, or the layer that forecasts."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head: a classifier, or with 0 classes one that forecasts.

        Raises:
            ValueError: a `global_pool` other than "avg".
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r} is unknown; models of series average their tokens: 'avg'")
        self.num_classes = num_classes
        dd: Any = get_device_dtype(self)
        self.head = self._make_head(num_classes, **dd)
        self.head.train(self.training)


def normalise_windows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows `(b, l, v)` with mean 0 and deviation 1 over their steps, the mean and the deviation `(b, 1, v)`."""
    mean = x.mean(1, keepdim=True)
    x = x - mean
    deviation = (x.square().mean(1, keepdim=True) + EPS).sqrt()
    return x / deviation, mean, deviation


def check_window(x: Tensor, seq_len: int, in_chans: int) -> None:
    """Raise ValueError unless `x` is `(b, seq_len, in_chans)`."""
    if x.dim() != 3 or x.shape[1:] != (seq_len, in_chans):
        raise ValueError(
            f"the model reads windows (b, {seq_len}, {in_chans}): batch, steps, variates; the input is "
            f"{tuple(x.shape)}. Build it with seq_len= and in_chans= of your series"
        )


def series_scan(scan: ScanLike, published: str, *size: int) -> tuple[str, int, bool]:
    """A `scan=` argument as a specification, its number of directions, and whether there is a scan at all.

    Args:
        scan: What the user gave; "none" leaves the scan out and keeps the convolutions of `published`.
        published: The order of the published model.
        size: Of the grid.

    Raises:
        ValueError: an unknown name, or one that does not fit the grid.
        TypeError: no name, `Scan` or function.
    """
    ssm = not (isinstance(scan, str) and scan == "none")
    spec = as_spec(scan if ssm else published)
    return spec, scan.k if isinstance(scan, Scan) else build_scan(spec, *size).k, ssm


torch.fx.wrap("check_window")

"""Linear models of series, to compare with: plain, DLinear and NLinear. Zeng et al. 2022, arXiv:2205.13504.

Written from the paper; all variates share the weights, as in its main tables.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._register import Card, build_model, register
from ._series import SeriesModel

KINDS = ("plain", "decomposed", "last")


class LinearSeries(SeriesModel):
    """A linear map from the steps of a window to the steps ahead, the same for every variate.

    As a classifier it is a linear map of all values of the window.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window.
        pred_len: Steps to forecast; 0 is the window itself.
        num_classes: Classes; 0 forecasts.
        kind: "plain"; "decomposed", DLinear: a map for the moving average and one for the rest; or "last", NLinear: of
            differences to the last step.
        average: Steps of the moving average, an odd number.
        use_norm: Normalise every window.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size or a `kind` that is not possible.
    """

    def __init__(
        self,
        in_chans: int = 7,
        seq_len: int = 96,
        pred_len: int = 96,
        num_classes: int = 0,
        kind: str = "plain",
        average: int = 25,
        use_norm: bool = False,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if average < 1 or average % 2 == 0:
            raise ValueError(f"average={average} must be an odd number of steps")
        super().__init__(
            in_chans, seq_len, pred_len, num_classes, seq_len * in_chans, seq_len, use_norm, drop_rate, **dd
        )
        self.kind, self.average = kind, average
        self.trend = nn.Linear(seq_len, self.pred_len, **dd) if kind == "decomposed" and not num_classes else None

    def encode(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows `(b, l, v)` to `(b, v, l)`."""
        return x.transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """All values `(b, v, l)` to class scores."""
        x = self.head_drop(x.flatten(1))
        return self.head(x) if self.num_classes and not pre_logits else x

    def forecast(self, tokens: Tensor) -> Tensor:
        """`(b, v, l)` to `(b, pred_len, v)`."""
        if self.kind == "last":
            last = tokens[..., -1:]
            y = self.head(tokens - last) + last
        elif self.trend is not None:
            reach = self.average // 2
            smooth = F.avg_pool1d(F.pad(tokens, (reach, reach), mode="replicate"), self.average, stride=1)
            y = self.head(tokens - smooth) + self.trend(smooth)
        else:
            y = self.head(tokens)
        return y.transpose(1, 2)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head: a classifier, or with 0 classes one that forecasts."""
        super().reset_classifier(num_classes, global_pool)
        like = self.head.weight
        again = self.kind == "decomposed" and not num_classes
        self.trend = (
            nn.Linear(self.seq_len, self.pred_len, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
            if again
            else None
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of this model is taken as it is."""
    return state_dict


def _card(params: int) -> Card:
    return Card("series", "mamba_zoo", "Apache-2.0", "2205.13504", params, notes="To compare with; not a Mamba.")


def _build(name: str, kind: str, pretrained: bool, kwargs: dict[str, Any]) -> LinearSeries:
    return build_model(LinearSeries, name, pretrained, checkpoint_filter_fn, **{"kind": kind, **kwargs})


@register(_card(9_312), num_classes=-1, input_size=None, classifier="head")
def series_linear(pretrained: bool = False, **kwargs: Any) -> LinearSeries:
    """A linear map of the window: `(b, 96, v)` to `(b, 96, v)`."""
    return _build("series_linear", "plain", pretrained, kwargs)


@register(_card(18_624), num_classes=-1, input_size=None, classifier=("head", "trend"))
def dlinear(pretrained: bool = False, **kwargs: Any) -> LinearSeries:
    """DLinear: linear maps of the moving average and of the rest. Published for ETTh1 at 96 steps: 0.386."""
    return _build("dlinear", "decomposed", pretrained, kwargs)


@register(_card(9_312), num_classes=-1, input_size=None, classifier="head")
def nlinear(pretrained: bool = False, **kwargs: Any) -> LinearSeries:
    """NLinear: a linear map of the differences to the last step."""
    return _build("nlinear", "last", pretrained, kwargs)

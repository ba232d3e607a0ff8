"""TimeMachine: four Mambas at two scales of a series. Ahamed and Cheng 2024, arXiv:2403.09898.

Follows the arithmetic of Atik-Ahamed/TimeMachine@5bf17a728349 TimeMachine_supervised/models/TimeMachine.py
(Apache-2.0).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..scans import ScanLike, scan_order
from ._keys import Key, rename
from ._mixer import Mamba
from ._register import Card, build_model, register
from ._series import EPS, SeriesModel, series_scan
from ._series_published import published_arguments


class TimeMachine(SeriesModel):
    """TimeMachine: two linear embeddings of a window, each mixed by two Mambas, along the embedding and across it.

    With `independent`, every variate is a sample of its own: two of the Mambas scan the n1 or n2 values of an
    embedding, one channel wide, and the other two see a sequence of one token. Without it, all four scan the variates.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window.
        pred_len: Steps to forecast; 0 is the window itself.
        num_classes: Classes; 0 forecasts.
        n1: Width of the first embedding.
        n2: Width of the second.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixers in units of theirs.
        independent: Treat the variates one by one; for few variates. The authors do so up to 21.
        use_norm: Normalise every window.
        affine: Learn a scale and an offset of every variate in the normalisation.
        dropout: Of both embeddings.
        scan: Order of what is scanned: of the values of an embedding on the grids `(n1,)` and `(n2,)`, or of the
            variates on `(v,)`. "none" keeps the convolutions but scans nothing.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size or a scan that is not possible.
    """

    def __init__(
        self,
        in_chans: int = 7,
        seq_len: int = 96,
        pred_len: int = 96,
        num_classes: int = 0,
        n1: int = 512,
        n2: int = 32,
        d_state: int = 256,
        d_conv: int = 2,
        expand: float = 1,
        independent: bool = True,
        use_norm: bool = True,
        affine: bool = True,
        dropout: float = 0.7,
        scan: ScanLike = "forward",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        super().__init__(in_chans, seq_len, pred_len, num_classes, 2 * n1, use_norm=use_norm, drop_rate=drop_rate, **dd)
        self.independent = independent
        self.scan, k, ssm = series_scan(scan, "forward", n1 if independent else in_chans)
        self.scale = nn.Parameter(torch.ones(in_chans, **dd)) if affine and use_norm else None
        self.offset = nn.Parameter(torch.zeros(in_chans, **dd)) if affine and use_norm else None
        self.lin1 = nn.Linear(seq_len, n1, **dd)
        self.lin2 = nn.Linear(n1, n2, **dd)
        self.dropout = nn.Dropout(dropout)
        widths = {"mamba1": 1 if independent else n2, "mamba2": n2, "mamba3": n1, "mamba4": 1 if independent else n1}
        for name, width in widths.items():
            self.add_module(name, Mamba(width, d_state, d_conv, expand, k=k, ssm=ssm, **dd))
        self.lin3 = nn.Linear(n2, n1, **dd)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows `(b, l, v)`, normalised and scaled, their mean and deviation `(b, 1, v)`."""
        x, mean, deviation = super().normalise(x)
        if self.scale is not None and self.offset is not None:
            x = x * self.scale + self.offset
        return x, mean, deviation

    def restore(self, y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Undo `normalise`."""
        if self.scale is not None and self.offset is not None:
            y = (y - self.offset) / (self.scale + EPS**2)
        return super().restore(y, mean, deviation)

    def encode(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows `(b, l, v)` to tokens `(b, v, 2 * n1)`; there is no use for marks."""
        b, _, v = x.shape
        x = x.transpose(1, 2)
        if self.independent:
            x = x.flatten(0, 1)[:, None]
        first = self.lin1(x)
        kept = self.dropout(first)
        fine = self._mix("mamba3", kept) + self._mix_values("mamba4", kept)
        second = self.lin2(kept)
        kept = self.dropout(second)
        coarse = self._mix_values("mamba1", kept) + second + self._mix("mamba2", kept)
        tokens = torch.cat([self.lin3(coarse) + first, fine], dim=-1)
        return tokens.reshape(b, v, tokens.shape[-1])

    def _mix_values(self, name: str, x: Tensor) -> Tensor:
        """Along the values of an embedding if the variates are independent, else along the variates."""
        return self._mix(name, x.transpose(1, 2)).transpose(1, 2) if self.independent else self._mix(name, x)

    def _mix(self, name: str, x: Tensor) -> Tensor:
        # A sequence of one token has one order, whatever the scan, which may be for another length.
        order = None if x.shape[1] == 1 else scan_order(self.scan, (x.shape[1],), x.device)
        mixer = getattr(self, name)
        return checkpoint(mixer, x, order) if self.grad_checkpointing else mixer(x, order)  # type: ignore[return-value]

    def forecast(self, tokens: Tensor) -> Tensor:
        """Tokens `(b, v, 2 * n1)` to `(b, pred_len, v)`."""
        return self.head(tokens).transpose(1, 2)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        depths = [(r"^lin1|^mamba3|^mamba4", (0,)), (r"^lin2|^mamba1|^mamba2", (1,)), (r"^lin3", (2,))]
        return {"stem": r"^scale|^offset", "blocks": depths}


KEYS = [
    Key(r"^revin_layer\.affine_weight$", "scale"),
    Key(r"^revin_layer\.affine_bias$", "offset"),
    Key(r"^(mamba\d)\.(A_log|D)$", r"\1.ssm.\2", 0),
    Key(r"^(mamba\d)\.conv1d\.weight$", r"\1.conv.weight", 0, lambda weight: weight.squeeze(1)),
    Key(r"^(mamba\d)\.conv1d\.bias$", r"\1.conv.bias", 0),
    Key(r"^(mamba\d)\.(x_proj|dt_proj)\.weight$", r"\1.ssm.\2.weight", 0),
    Key(r"^(mamba\d)\.dt_proj\.bias$", r"\1.ssm.dt_bias", 0),
    Key(r"^lin4\.", "head."),
]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names."""
    return rename(state_dict, KEYS)


@register(
    Card(
        "series",
        "Atik-Ahamed/TimeMachine@5bf17a728349 TimeMachine_supervised/models/TimeMachine.py",
        "Apache-2.0",
        "2403.09898",
        1_425_858,
        notes="No trained weights were published.",
    ),
    num_classes=-1,
    input_size=None,
    classifier="head",
)
def timemachine(pretrained: bool = False, published: str | None = None, **kwargs: Any) -> TimeMachine:
    """TimeMachine: windows `(b, 96, 7)` to `(b, 96, 7)`, or other sizes as given.

    `published` takes the settings of the paper for a data set, steps read and steps forecast, such as "etth1_96_720":
    see `_series_published.PUBLISHED`. Published test errors of ETTh1 at 96, 192, 336 and 720 steps: 0.364, 0.415, 0.429
    and 0.458; the published test leaves out the windows that do not fill a batch.
    """
    arguments = {**published_arguments("timemachine", published), **kwargs}
    return build_model(TimeMachine, "timemachine", pretrained, checkpoint_filter_fn, **arguments)


torch.fx.wrap("scan_order")

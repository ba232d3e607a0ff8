"""MambaTS: one scan over the patches of all variates, in an order that training learns. Cai et al. 2024,
arXiv:2405.16440.

Follows the arithmetic of XiudingCai/MambaTS-pytorch@3b6797d9bf51 models/MambaTS.py (MIT). The order at test time is
found here by a search that always ends in the same order, and is kept with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..kernels._order import trust_order
from ..scans import ScanLike, scan_order
from ._block import AddNormBlock, LayerNorm, add_residual
from ._keys import Key, rename
from ._register import Card, build_model, register
from ._series import SeriesModel, series_scan
from ._series_published import published_arguments
from ._ssm import DirectionLinear, SelectiveSSM, resolve_dt_rank
from ._tour import short_path

LEARNED = "learned"


class _DroppedLinear(DirectionLinear):
    """A linear map per direction, and dropout of what it gives."""

    def __init__(self, dropout: float, k: int, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__(k, in_features, out_features, device, dtype)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.dropout, self.training)


class PlainMamba(nn.Module):
    """A Mamba layer without the convolution and its activation: the "temporal Mamba block" of MambaTS.

    Args:
        dim: Model width.
        d_state: States n.
        expand: Inner width in units of `dim`.
        dropout: Of the projection to steps, B and C.
        k: Directions, which are added.
        ssm: False leaves the scan and its parameters out.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: float = 2,
        dropout: float = 0.0,
        k: int = 1,
        ssm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank("auto", dim), k, **dd) if ssm else None
        if dropout > 0 and self.ssm is not None:
            x_proj = self.ssm.x_proj.weight
            self.ssm.x_proj = _DroppedLinear(dropout, k, x_proj.shape[2], x_proj.shape[1], **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)` or `(b, k, m)`, to `(b, l, dim)`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = x * F.silu(z) if self.ssm is None else self.ssm(x, z, order, "sum")
        return self.out_proj(y.to(x.dtype))


class MambaTS(SeriesModel):
    """MambaTS: patches of every variate, one variate after another, in one causal sequence.

    With `scan="learned"`, training visits the variates of every window in an order of its own, and `record` notes what
    each order cost. At test time the variates are visited in the order that costs least from each to the next; it is
    found when the model goes into evaluation mode, and is part of the weights.

    Args:
        in_chans: Variates v.
        seq_len: Steps of a window, a multiple of `patch_size`.
        pred_len: Steps to forecast; 0 is the window itself.
        num_classes: Classes; 0 forecasts.
        dim: Width.
        depth: Blocks.
        patch_size: Steps of a patch.
        d_state: States n.
        expand: Inner width of the mixers in units of `dim`.
        scan: "learned", or an order of the tokens on the grid `(v, seq_len / patch_size)`, used in training as
            well. "none" scans nothing, so that patches do not meet before the head.
        use_norm: Normalise every window.
        dropout: Of the projections to step sizes, B and C.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        visit: `(v,)` int64, the order of the variates in evaluation mode if it is learned.

    Raises:
        ValueError: a size or a scan that is not possible.
    """

    def __init__(
        self,
        in_chans: int = 7,
        seq_len: int = 720,
        pred_len: int = 96,
        num_classes: int = 0,
        dim: int = 16,
        depth: int = 5,
        patch_size: int = 48,
        d_state: int = 16,
        expand: float = 2,
        scan: ScanLike = LEARNED,
        use_norm: bool = True,
        dropout: float = 0.3,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: Any = {"device": device, "dtype": dtype}
        if seq_len % patch_size:
            raise ValueError(f"seq_len={seq_len} must be a multiple of patch_size={patch_size}")
        patches = seq_len // patch_size
        super().__init__(
            in_chans, seq_len, pred_len, num_classes, dim, patches * dim, use_norm=use_norm, drop_rate=drop_rate, **dd
        )
        self.patch_size, self.patches = patch_size, patches
        self.learned = isinstance(scan, str) and scan == LEARNED
        given: ScanLike = "forward" if self.learned else scan
        self.scan, k, ssm = series_scan(given, "forward", in_chans, patches)
        self.embed = nn.Linear(patch_size, dim, bias=False, **dd)
        self.blocks = nn.ModuleList(
            AddNormBlock(dim, PlainMamba(dim, d_state, expand, dropout, k, ssm, **dd), norm=LayerNorm, **dd)
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim, **dd)
        # Cost and number of times for every pair of variates, one after the other; pairs (i, i) are starts.
        for name, shape in {"cost": (in_chans, in_chans), "count": (in_chans, in_chans), "ends": (in_chans,)}.items():
            self.register_buffer(name, torch.zeros(shape, device=device) if self.learned else None)
        self.register_buffer("visit", torch.arange(in_chans, device=device) if self.learned else None)
        self._visited: Tensor | None = None  # (b, v), of the last forward pass in training
        self._recorded = False

    cost: Tensor
    count: Tensor
    ends: Tensor
    visit: Tensor

    def encode(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Windows `(b, l, v)` to tokens `(b, v * patches, dim)`; there is no use for marks."""
        order = self._order(len(x), x.device)
        hidden = self.embed(x.transpose(1, 2).unflatten(-1, (self.patches, self.patch_size))).flatten(1, 2)
        residual = None
        for block in self.blocks:
            given = (hidden, residual, order)
            hidden, residual = checkpoint(block, *given) if self.grad_checkpointing else block(*given)  # type: ignore
        return self.norm(add_residual(hidden, residual)).to(hidden.dtype)

    def _order(self, b: int, device: torch.device) -> Tensor:
        """`(k, m)`, or `(b, 1, m)` for windows that each have an order of their own."""
        if not self.learned:
            return scan_order(self.scan, (self.in_chans, self.patches), device)
        if not self.training:
            order = self._tokens(self.visit)[None]
        else:
            self._visited = torch.rand(b, self.in_chans, device=device).argsort(-1)
            order = self._tokens(self._visited)[:, None]
        if not torch.compiler.is_compiling():
            trust_order(order, order.shape[-1])
        return order

    def _tokens(self, variates: Tensor) -> Tensor:
        """Tokens `(..., v * patches)` of variates `(..., v)`, those of each in order of time."""
        steps = torch.arange(self.patches, device=variates.device)
        return (variates[..., None] * self.patches + steps).flatten(-2).to(torch.int32)

    def forecast(self, tokens: Tensor) -> Tensor:
        """Tokens `(b, v * patches, dim)` to `(b, pred_len, v)`."""
        return self.head(tokens.unflatten(1, (self.in_chans, self.patches)).flatten(2)).transpose(1, 2)

    @torch.no_grad()
    def record(self, losses: Tensor) -> None:
        """Note what the orders of the last training batch cost.

        Args:
            losses: `(b,)`, of the windows of that batch; divided by their deviation over the batch.

        Raises:
            RuntimeError: no batch was trained on since the last call.
        """
        if not self.learned:
            return
        visited, self._visited = self._visited, None
        if visited is None or len(visited) != len(losses):
            raise RuntimeError("record() needs the losses of the batch that forward() was given last, in training mode")
        if len(losses) < 2:
            return  # one window has no deviation
        losses = losses.detach().float()
        losses = losses / (losses.std() + 1e-8)
        before = torch.cat([visited[:, :1], visited[:, :-1]], dim=1)
        pairs = (before * self.in_chans + visited).flatten()
        self.cost.view(-1).index_add_(0, pairs, losses.repeat_interleave(self.in_chans).to(self.cost.dtype))
        self.count.view(-1).index_add_(0, pairs, torch.ones_like(pairs, dtype=self.count.dtype))
        self.ends.index_add_(0, visited[:, -1], losses.to(self.ends.dtype))
        self._recorded = True

    def train(self, mode: bool = True) -> MambaTS:
        """Training or evaluation mode; the latter brings the order of the variates up to date."""
        if not mode and self._recorded:
            self._recorded = False
            self.set_order(cheapest_order(self.cost, self.count))
        return super().train(mode)

    def set_order(self, order: Sequence[int]) -> None:
        """Visit the variates in this order in evaluation mode.

        Raises:
            ValueError: it is no permutation of the variates, or the order is not learned.
        """
        if not self.learned:
            raise ValueError(f"the order follows from scan={self.scan!r}; build the model with scan='{LEARNED}'")
        if sorted(order) != list(range(self.in_chans)):
            raise ValueError(f"order={tuple(order)} must be a permutation of the {self.in_chans} variates")
        self.visit.copy_(torch.as_tensor(list(order)))


def cheapest_order(cost: Tensor, count: Tensor) -> list[int]:
    """The order of variates with the least mean cost, from the sums that `MambaTS.record` keeps.

    A pair that training never visited costs as much as the most expensive one.

    Args:
        cost: `(v, v)` sums of losses.
        count: `(v, v)` how many.
    """
    total, times = cost.detach().double().cpu().numpy(), count.detach().double().cpu().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / times
    known = np.isfinite(mean)
    mean = np.where(known, mean, mean[known].max() if known.any() else 0.0)
    return short_path(mean, int(mean.diagonal().argmin()))


KEYS = [
    Key(r"^value_embedding\.1\.", "embed."),
    Key(r"^encoder\.adjacency_matrix$", "cost"),
    Key(r"^encoder\.count_matrix$", "count"),
    Key(r"^encoder\.ending_points$", "ends"),
    Key(r"^encoder\.layers\.", "blocks."),
    Key(r"^encoder\.norm_f\.", "norm."),
    Key(r"mixer\.(A_log|D)$", r"mixer.ssm.\1", 0),
    Key(r"mixer\.x_proj(\.0)?\.weight$", "mixer.ssm.x_proj.weight", 0),
    Key(r"mixer\.dt_proj\.weight$", "mixer.ssm.dt_proj.weight", 0),
    Key(r"mixer\.dt_proj\.bias$", "mixer.ssm.dt_bias", 0),
    Key(r"^head\.linear\.", "head."),
]
_LEARNED_BUFFERS = ("cost", "count", "ends", "visit")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict in our names, with the order that its costs give.

    A model whose order is not learned has no use for what the authors' files say of it.
    """
    published = any(key.startswith("encoder.") for key in state_dict)
    state = rename(state_dict, KEYS)
    if published and not getattr(model, "learned", True):
        return {key: value for key, value in state.items() if key not in _LEARNED_BUFFERS}
    if published:
        state["visit"] = torch.tensor(cheapest_order(state["cost"], state["count"]))
    return state


@register(
    Card(
        "series",
        "XiudingCai/MambaTS-pytorch@3b6797d9bf51 models/MambaTS.py",
        "MIT",
        "2405.16440",
        40_096,
        notes="No trained weights were published.",
    ),
    num_classes=-1,
    input_size=None,
    classifier="head",
)
def mambats(pretrained: bool = False, published: str | None = None, **kwargs: Any) -> MambaTS:
    """MambaTS: windows `(b, 720, 7)` to `(b, 96, 7)`, or other sizes as given.

    `published` takes the settings of the paper for a data set, steps read and steps forecast, such as "weather_720_96":
    see `_series_published.PUBLISHED`.
    """
    arguments = {**published_arguments("mambats", published), **kwargs}
    return build_model(MambaTS, "mambats", pretrained, checkpoint_filter_fn, **arguments)


register_notrace_module(PlainMamba)

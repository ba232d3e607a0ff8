"""A selective scan that knows by which move each token was reached (arXiv:2403.17695, section 3.3)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels import selective_scan
from ._ssm import SelectiveSSM

# order tensor -> what `_routes` derives from it, once for all layers. Goes with the table that the scans cache.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class DirectionAwareSSM(SelectiveSSM):
    """A selective scan whose directions share all parameters, and whose input map B knows how each token was reached.

    `direction_B (5, n)` is added to B: its row 0 where a direction starts or jumps, then rows 1 to 4 where it arrives
    by a move to the right, the left, up or down.

    The published code lets each direction visit the tokens in its order, but not their steps, B and C: the token
    visited at step t meets those of token t of the raster. The trained weights depend on it, so this is the default. A
    direction that does not visit all tokens takes the steps, B and C of those that it visits, in raster order.

    Args:
        dim: Channels d.
        d_state: States n.
        dt_rank: Rank r of the step projection.
        aligned: Let every token meet its own step, B and C, as the paper describes it.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, aligned: bool = False, device=None, dtype=None):
        super().__init__(dim, d_state, dt_rank, device=device, dtype=dtype)
        self.aligned = aligned
        self.direction_B = nn.Parameter(torch.empty(5, d_state, device=device, dtype=dtype))
        trunc_normal_(self.direction_B, std=0.02)

    def called_as_this(self, layer: nn.Module) -> nn.Module:
        """`layer`, called with an order and a grid."""
        return _OfGrid(layer)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - an order and a grid are needed
        self, u: Tensor, order: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Tokens `(b, l, d)` of a grid `(h, w)`, visited by `order (k, m)`, to the sum over directions `(b, l, d)`."""
        k = order.shape[0]
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        routes = _routes(order, grid, self.aligned)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        scan = partial(
            selective_scan,
            dt=self.dt_proj(dt).expand(-1, -1, k, -1),
            A=A.expand(k, -1, -1),
            B=(B + self.direction_B[routes.moves]).to(C.dtype),
            C=C.expand(-1, -1, k, -1),
            D=self.D.expand(k, -1),
            dt_bias=self.dt_bias.expand(k, -1),
            dt_softplus=True,
            out_dtype=torch.float32 if C.dtype == torch.float16 else None,
        )
        if self.aligned:
            return scan(u, order=order, reduce="sum")
        y = scan(_spread(u, routes.source, routes.inverse), order=routes.order)
        return _collect(y, routes.source, routes.inverse)


class _OfGrid(nn.Module):
    """Another layer in the place of a `DirectionAwareSSM`: its directions are summed, and it does not see moves."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.layer(u, order=order, reduce="sum")


class _Routes:
    """What a direction-aware scan derives from an order `(k, m)` over l tokens.

    Attributes:
        order: `(k, m)` int32: the tokens that a direction visits, in raster order; its empty steps stay empty.
        source: `(l * k,)`: the token visited at the step that `order` gives to token i of direction k, for each (i, k).
        inverse: `(l * k,)`: where to find token i of direction k among the (i, k) that `source` made.
        moves: `(l, k)`: row of `direction_B` for each token and direction.
    """

    def __init__(self, order: Tensor, grid: tuple[int, int], aligned: bool):
        k, l = order.shape[0], math.prod(grid)
        order = order.long()
        visited = order >= 0
        in_raster = order.masked_fill(~visited, l).sort(-1).values
        rank = (visited.cumsum(-1) - 1).clamp(min=0)
        raster = in_raster.gather(-1, rank).masked_fill(~visited, l)
        spare = order.masked_fill(~visited, l)  # empty steps write to a spare place that is cut off
        tokens = torch.arange(l + 1, device=order.device).expand(k, -1)
        source = tokens.scatter(-1, raster, spare)[:, :l]
        inverse = tokens.scatter(-1, spare, raster)[:, :l]
        direction = torch.arange(k, device=order.device)
        moves = tokens.new_zeros(k, l + 1).scatter(-1, spare if aligned else raster, _moves(order, rank, grid[1]))
        self.order = raster.masked_fill(~visited, -1).int()
        self.source = source.T.reshape(-1)
        self.inverse = (inverse.T * k + direction).reshape(-1)
        self.moves = moves[:, :l].T


def _moves(order: Tensor, rank: Tensor, width: int) -> Tensor:
    """How each step of `order (k, m)` was reached: 0 first or jump, 1 right, 2 left, 3 up, 4 down."""
    m = order.shape[1]
    path = order.new_zeros(order.shape[0], m + 1).scatter(-1, torch.where(order < 0, m, rank), order)
    before = path.gather(-1, (rank - 1).clamp(min=0))
    step = torch.where(rank > 0, order - before, 0)
    same_row = order // width == before // width
    sideways = torch.where(same_row & (step == 1), 1, torch.where(same_row & (step == -1), 2, 0))
    upright = torch.where(~same_row & (step == -width), 3, torch.where(~same_row & (step == width), 4, 0))
    return sideways + upright


def _routes(order: Tensor, grid: tuple[int, int], aligned: bool) -> _Routes:
    if order.is_meta or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return _Routes(order, grid, aligned)
    known: Any = _known.setdefault(order, {})
    if (grid, aligned) not in known:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            known[grid, aligned] = _Routes(order, grid, aligned)
    return known[grid, aligned]


@torch.library.custom_op("mamba_zoo::spread_tokens", mutates_args=())
def _spread(x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    """Tokens `(b, l, d)` to `(b, l, k, d)`: entry (i, k) is token `source[i, k]`."""
    return x.index_select(1, source).unflatten(1, (x.shape[1], -1))


@torch.library.custom_op("mamba_zoo::collect_tokens", mutates_args=())
def _collect(y: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
    """`(b, l, k, d)` to tokens `(b, l, d)`: each sums what `_spread` took from it. The adjoint of `_spread`."""
    return y.flatten(1, 2).index_select(1, inverse).view(y.shape).sum(2)


@_spread.register_fake
def _(x, source, inverse):
    b, l, d = x.shape
    return x.new_empty(b, l, source.shape[0] // l, d)


@_collect.register_fake
def _(y, source, inverse):
    b, l, _, d = y.shape
    return y.new_empty(b, l, d)


def _keep_tables(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


# Ops of our own, because torch would differentiate index_select by an addition at every index, one after another.
_spread.register_autograd(
    lambda ctx, grad: (_collect(grad, *ctx.saved_tensors), None, None), setup_context=_keep_tables
)
_collect.register_autograd(
    lambda ctx, grad: (_spread(grad, *ctx.saved_tensors), None, None), setup_context=_keep_tables
)

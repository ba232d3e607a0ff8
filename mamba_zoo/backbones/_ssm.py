"""The selective state-space layer: per-token projections, and one scan that follows any number of directions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step
from ..scans import Scan, ScanLike, as_spec, build_scan
from ._init import init_decay_, init_step_bias_, init_uniform_
from ._projected_scan import is_one_function, projected_scan
from ._recompute import recomputed


class DirectionLinear(nn.Module):
    """One linear map per direction, without bias; its `weight` is `(k, out_features, in_features)`.

    Args:
        k: Directions.
        in_features: Channels read.
        out_features: Channels written.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(self, k: int, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(k, out_features, in_features, device=device, dtype=dtype))
        init_uniform_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, in)` shared by the directions, or `(b, l, k, in)`, to `(b, l, k, out)`, possibly strided."""
        return self.product(*self.operands(x))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `product` multiplies: the tokens, and a weight `(k * out, ...)` for all directions or one for each."""
        if x.dim() == 3 or len(self.weight) == 1:
            return x, self.weight.flatten(0, 1)
        if not x.is_cuda:
            return x, self.weight
        # One wide product with a block-diagonal weight: the weight gradient of k thin batched products, whose sum
        # runs over all tokens, takes cuBLAS 10 ms a layer of vmamba_tiny's first stage at batch 128.
        blocks = torch.diag_embed(self.weight.movedim(0, -1)).permute(2, 0, 3, 1)
        return x.flatten(2), blocks.flatten(2).flatten(0, 1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` of the tokens whose `operands` these are."""
        if weight.dim() == 2:
            y = F.linear(x, weight)
            return y if x.dim() == 4 else y.unflatten(-1, (len(self.weight), -1))
        y = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
        return y.transpose(0, 1).unflatten(0, x.shape[:2])

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        k, out, features = self.weight.shape
        return f"k={k}, in_features={features}, out_features={out}"


class CausalConv1d(nn.Module):
    """A depthwise convolution per direction, causal along the visiting order, then SiLU.

    Args:
        k: Directions; each has its own taps `weight[k]`, `(d, w)`, and `bias[k]`, `(d,)`.
        dim: Channels d.
        width: Taps w; the last one multiplies the present token.
        bias: Whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, k: int, dim: int, width: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(k, dim, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(k, dim, device=device, dtype=dtype)) if bias else None
        init_uniform_(self.weight, width)
        if self.bias is not None:
            init_uniform_(self.bias, width)

    def forward(self, x: Tensor, order: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, d)` or `(b, l, k, d)` to `(b, l, k, d)`, each direction along its row of `order`."""
        return causal_conv1d(x, self.weight, self.bias, order, activation="silu", cu_seqlens=cu_seqlens)

    def extend(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens `(b, l, d)` or `(b, l, k, d)` after those in `state (b, k, d, w - 1)`, and the new state."""
        return causal_conv1d(x, self.weight, self.bias, activation="silu", initial_state=state, return_final_state=True)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """`extend` for one token, `(b, d)` or `(b, k, d)` to `(b, k, d)`."""
        return causal_conv1d_step(state, x, self.weight, self.bias, activation="silu")

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        k, dim, width = self.weight.shape
        return f"k={k}, dim={dim}, width={width}, bias={self.bias is not None}"


class SelectiveSSM(nn.Module):
    """Step sizes, input and output maps from the tokens, then the selective scan in k directions.

    The parameters of all directions are stacked: `x_proj.weight (k, r + 2n, d)` gives the low-rank step, B and C, in
    this order; `dt_proj.weight (k, d, r)` with `dt_bias (k, d)` the step; `A_log (k, d, n)` and `D (k, d)`. Decay
    rates, skip weights and step biases are used in float32 whatever dtype they are kept in, through autocast as well:
    after `model.bfloat16()` they are rounded once, and `-exp(A_log)` is still computed in float32.

    Args:
        dim: Channels d.
        d_state: States n.
        dt_rank: Rank r of the step projection.
        k: Directions.
        device: Of the parameters.
        dtype: Of the parameters.

    Source:
        arXiv:2312.00752, algorithm 2.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, k: int = 1, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.d_state, self.dt_rank = d_state, dt_rank
        self.x_proj = DirectionLinear(k, dim, dt_rank + 2 * d_state, **dd)
        self.dt_proj = DirectionLinear(k, dt_rank, dim, **dd)
        self.dt_bias = nn.Parameter(torch.empty(k, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(k, dim, d_state, **dd))
        self.D = nn.Parameter(torch.ones(k, dim, **dd))
        init_step_bias_(self.dt_bias)
        init_decay_(self.A_log)

    def forward(
        self,
        u: Tensor,
        z: Tensor | None = None,
        order: Tensor | None = None,
        reduce: str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Scan the tokens along every direction.

        Args:
            u: Tokens `(b, l, d)` shared by the directions, or `(b, l, k, d)`.
            z: Gate `(b, l, d)` or `(b, l, k, d)` before its SiLU.
            order: `(k, m)` or `(b, k, m)` visiting order; None is 0..l-1.
            reduce: None, "sum" or "mean" over directions.
            cu_seqlens: `(s + 1,)` token boundaries of packed sequences, as for `kernels.selective_scan`.

        Returns:
            `(b, l, k, d)`, or `(b, l, d)` with `reduce`; float32 when the tokens are float16, whose sums over
            directions and states overflow, otherwise in their dtype.
        """
        alike = cu_seqlens is None and (order is None or order.dim() == 2)
        if self.dt_bias.shape[-1] == 1 and alike and u.shape[0]:  # a scan has a channel at least
            return self._one_channel(u, z, order, reduce)
        alone = u.shape[1] == 1 and cu_seqlens is None and (order is None or order.shape[-1] == 1)
        x_proj, dt_proj = self.x_proj, self.dt_proj
        if not alone and type(x_proj) is type(dt_proj) is DirectionLinear:
            given = (u, z, x_proj.weight, dt_proj.weight, self.dt_bias, self.A_log, self.D)
            if is_one_function((x_proj, dt_proj), *given):
                return projected_scan(*given, order, reduce, cu_seqlens)
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        steps = self.dt_proj.operands(low)  # kept by the product anyway
        dt = self.dt_proj.product(*steps)
        if alone:
            return self._one_token(u, dt, B, C, z, order, reduce)
        with recomputed(dt, self.dt_proj.product, *steps):  # the widest of all tensors here, made of a few channels
            return selective_scan(
                u,
                dt,
                self.decay(),
                B,
                C,
                self.D,
                z,
                order,
                self.dt_bias,
                dt_softplus=True,
                reduce=reduce,
                cu_seqlens=cu_seqlens,
                out_dtype=torch.float32 if B.dtype == torch.float16 else None,
            )

    def _one_channel(self, u: Tensor, z: Tensor | None, order: Tensor | None, reduce: str | None) -> Tensor:
        """The scan of a single channel, whose B and C are the token times one map each.

        The token leaves both maps, so that all samples share them and are the channels of one scan: B and C of every
        sample and state, by far the widest tensors of such a layer, are never made.
        """
        dtype = u.dtype
        u, weight = self._wide(u)[..., 0], self._wide(self.x_proj.weight)[..., 0]
        low, B, C = weight.split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (k, ...)
        each = u if u.dim() == 3 else u[:, :, None]  # (b, l, k or 1)
        dt = each * (self.dt_proj.weight[:, 0] * low).sum(-1)
        (b, l, k), squares = dt.shape, u.square()
        # Squares do not fit float16, and nothing here is wide. The meta device has no autocast to leave.
        with nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False):
            y = selective_scan(
                squares.movedim(0, -1)[None],
                dt.movedim(0, -1)[None],
                self.decay().expand(k, b, -1),
                B.expand(1, l, -1, -1),
                C.expand(1, l, -1, -1),
                order=order,
                dt_bias=self.dt_bias.expand(k, b),
                dt_softplus=True,
                out_dtype=u.dtype,
            )
        skip = self.D[:, 0]
        if order is not None:  # none for tokens that a direction leaves out
            visited = skip.new_zeros(len(order), l + 1).scatter(1, torch.where(order < 0, l, order).long(), 1.0)
            skip = skip * visited[:, :l].T
        y = (each * (y[0].movedim(-1, 0) + skip))[..., None]
        return self._gated(y, z, reduce, dtype)

    def _one_token(
        self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None, order: Tensor | None, reduce: str | None
    ) -> Tensor:
        """The scan of a single token, which finds no memory: B and C meet before they meet the channels."""
        dtype = u.dtype
        u, dt, B, C = (self._wide(x) for x in (u if u.dim() == 4 else u[:, :, None], dt, B, C))
        y = u * (F.softplus(dt + self.dt_bias) * (B * C).sum(-1, keepdim=True) + self.D)
        if order is not None:  # directions may leave the token out
            y = y * (order >= 0 if order.dim() == 2 else (order >= 0)[:, None])
        y = y + 0 * self.A_log.sum()  # decay rates have a gradient, which is zero
        return self._gated(y, z, reduce, dtype)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _gated(self, y: Tensor, z: Tensor | None, reduce: str | None, dtype: torch.dtype) -> Tensor:
        """What the scan does behind its states, for `(b, l, k, d)` of tokens that were of `dtype`."""
        if z is not None:
            y = y * F.silu(self._wide(z if z.dim() == 4 else z[:, :, None]))
        y = y if reduce is None else y.sum(2) if reduce == "sum" else y.mean(2)
        return y if dtype == torch.float16 else y.to(dtype)

    def called_as_this(self, layer: nn.Module) -> nn.Module:
        """`layer`, which is called like a `SelectiveSSM`, so that it can take the place of this one; see `mixer=`."""
        return layer

    def decay(self) -> Tensor:
        """The decay rates A `(k, d, n)`, negative, in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def init_state(self, batch: int) -> Tensor:
        """The memory before the first token of a stream, `(b, k, d, n)`: float32 at least, and zero."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return self.A_log.new_zeros(batch, *self.A_log.shape, dtype=dtype)

    def extend(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream, in their own order in every direction.

        Args:
            u: Tokens `(b, l, d)` or `(b, l, k, d)`.
            state: `(b, k, d, n)` after the tokens before; see `init_state`.
            z: Gate, as for `forward`.

        Returns:
            `(b, l, k, d)` and the new state.
        """
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return selective_scan(
            u,
            self.dt_proj(dt),
            self.decay(),
            B,
            C,
            self.D,
            z,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_state=state,
            return_final_state=True,
            out_dtype=torch.float32 if B.dtype == torch.float16 else None,
        )

    def step(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`extend` for one token: `u` and `z` `(b, d)` or `(b, k, d)` to `(b, k, d)` and the new state."""
        dt, B, C = self.x_proj(u[:, None])[:, 0].split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = self.dt_proj(dt[:, None])[:, 0]
        return selective_scan_step(state, u, dt, self.decay(), B, C, self.D, z, self.dt_bias, dt_softplus=True)


def resolve_dt_rank(dt_rank: int | str, dim: int) -> int:
    """`dt_rank`, or for "auto" one sixteenth of the model width, rounded up.

    Raises:
        ValueError: another string, or a rank below 1.
    """
    if dt_rank == "auto":
        return -(-dim // 16)
    if isinstance(dt_rank, str) or dt_rank < 1:
        raise ValueError(f"dt_rank={dt_rank!r} must be 'auto' or at least 1")
    return dt_rank


def resolve_scan(scan: ScanLike, dimensions: int = 2) -> tuple[str, int]:
    """A `scan=` argument as a specification for `scans.scan_order`, and its number of directions on a grid.

    "none" stands for no scan at all, and has 0 directions.

    Args:
        scan: What the user gave.
        dimensions: Of the grids it is for: 2 for images, 3 for videos.

    Raises:
        ValueError: an unknown name.
        TypeError: no name, `Scan` or function.
    """
    if isinstance(scan, str) and scan == "none":
        return scan, 0
    spec = as_spec(scan)
    return spec, scan.k if isinstance(scan, Scan) else build_scan(spec, *[8] * dimensions).k

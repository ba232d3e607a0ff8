"""Token mixers: project, convolve, scan, merge the directions, gate, project back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..scans import scan_order
from ._block import LayerNorm, normed_again
from ._depthwise import DepthwiseConv, again
from ._ssm import CausalConv1d, SelectiveSSM, resolve_dt_rank

REDUCTIONS = ("sum", "mean")


class Mamba(nn.Module):
    """The Mamba mixer in k directions: every direction has its own causal convolution and state-space layer.

    `k = 1` is the mixer of arXiv:2312.00752; `k = 2` over the orders "bidirectional" with `reduce="mean"` is Vim's
    (arXiv:2401.09417). The gate multiplies every direction before they are reduced.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        k: Directions, the rows of the order that `forward` is given.
        reduce: "sum" or "mean" over directions.
        bias: Whether the two linear projections have a bias.
        conv_bias: Whether the convolution has one.
        ssm: False leaves the scan and its parameters out, so that the convolved tokens are gated and reduced.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: unknown `reduce`, or a bad `dt_rank`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        k: int = 1,
        reduce: str = "sum",
        bias: bool = False,
        conv_bias: bool = True,
        ssm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce={reduce!r} is unknown; choose one of {REDUCTIONS}")
        inner = int(expand * dim)
        self.reduce = reduce
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        self.conv = CausalConv1d(k, inner, d_conv, bias=conv_bias, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank(dt_rank, dim), k, **dd) if ssm else None
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor, order: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)` or `(b, k, m)`, to `(b, l, dim)`.

        `cu_seqlens (s + 1,)` are the token boundaries of sequences packed into one sample (b = 1), each mixed as if it
        were alone.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv(x, order, cu_seqlens)
        if self.ssm is None:
            y = (u.sum(2) if self.reduce == "sum" else u.mean(2)) * F.silu(z)
        else:
            y = self.ssm(u, z, order, self.reduce, cu_seqlens)
        return self.out_proj(y.to(u.dtype))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """A stream's memory before its first token: of the convolution `(b, k, d, w - 1)`, of the scan `(b, k, d, n)`.

        Both float32 at least, and zero. Their size does not depend on how long the stream is.
        """
        weight = self.conv.weight
        k, inner, width = weight.shape
        conv = weight.new_zeros(batch, k, inner, width - 1, dtype=torch.promote_types(weight.dtype, torch.float32))
        return conv, conv[..., :0] if self.ssm is None else self.ssm.init_state(batch)

    def extend(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The next tokens of a stream `(b, l, dim)` to `(b, l, dim)` and the new state; all directions run forwards."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv.extend(x, state[0])
        if self.ssm is None:
            y, scan = u * F.silu(z)[:, :, None], state[1]
        else:
            y, scan = self.ssm.extend(u, state[1], z)
        return self._merge(y, u.dtype), (conv, scan)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`extend` for one token `(b, dim)`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv.step(x, state[0])
        if self.ssm is None:
            y, scan = u * F.silu(z)[:, None], state[1]
        else:
            y, scan = self.ssm.step(u, state[1], z)
        return self._merge(y, u.dtype), (conv, scan)

    def _merge(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Directions `(..., k, d)` to one output."""
        return self.out_proj((y.sum(-2) if self.reduce == "sum" else y.mean(-2)).to(dtype))


class SS2D(nn.Module):
    """The 2-D selective scan of VMamba (arXiv:2401.10166): one depthwise convolution, k directions summed, a norm.

    Args:
        dim: Model width.
        d_state: States n.
        ssm_ratio: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        scan: Orders as a specification for `scans.scan_order`.
        k: Directions of `scan`; 0 leaves the scan and its parameters out.
        gate: Whether the normed output is multiplied by SiLU of a second projection of the input.
        conv_bias: Whether the depthwise 3x3 convolution has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | str = "auto",
        scan: str = "cross",
        k: int = 4,
        gate: bool = False,
        conv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(ssm_ratio * dim)
        self.scan, self.gate = scan, gate
        self.in_proj = nn.Linear(dim, inner * (2 if gate else 1), bias=False, **dd)
        self.conv = DepthwiseConv(inner, 3, conv_bias, "silu", **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank(dt_rank, dim), k, **dd) if k else None
        self.out_norm = LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """A map `(b, h, w, dim)` to one of the same shape."""
        _, h, w, _ = x.shape
        x = self.in_proj(x)
        x, z = x.chunk(2, dim=-1) if self.gate else (x, None)
        y = u = self.conv(x)
        if self.ssm is not None:
            with again(self.conv, u, x):
                y = self.visit(self.ssm, u.flatten(1, 2), (h, w)).unflatten(1, (h, w))
        normed = self.out_norm(y, narrow=True).to(u.dtype)
        if z is not None:
            return self.out_proj(normed * F.silu(z))
        with normed_again(normed, self.out_norm, y):
            return self.out_proj(normed)

    def visit(self, ssm: SelectiveSSM, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(b, l, inner)` of a grid `(h, w)` to what the directions of `scan` make of them together."""
        return ssm(u, order=scan_order(self.scan, grid, u.device), reduce="sum")


# torch.fx takes these whole: they look at shapes and dtypes. Not as decorators, which would hide their types.
for _leaf in (Mamba, SS2D):
    register_notrace_module(_leaf)

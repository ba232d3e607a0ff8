"""The layers of Mamba-2 (arXiv:2405.21060): heads, each with one decay, through the state-space dual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from torch import Tensor, nn

from ..kernels import ssd, ssd_step
from ._init import init_step_bias_
from ._ssm import CausalConv1d, DirectionLinear

_HEAD = 64  # channels of a head, at most, where nobody says how many


class DualSSM(nn.Module):
    """What `SelectiveSSM` is, with heads of one decay each: step sizes, B and C from the tokens, then `kernels.ssd`.

    It stands in for a `SelectiveSSM` of the same width, see `mixer=`. The parameters of all directions are stacked:
    `x_proj.weight (k, h + 2n, d)` gives the step of each head, B and C, in this order; `dt_bias`, `A_log` and `D` are
    `(k, h)`. They are used in float32 whatever dtype they are kept in.

    Args:
        dim: Channels d.
        d_state: States n.
        k: Directions. One set of parameters (k = 1) serves any number of directions.
        head_dim: Channels p of a head; None is the largest divisor of `dim` up to 64.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: `head_dim` does not divide `dim`.
    """

    def __init__(self, dim: int, d_state: int, k: int = 1, head_dim: int | None = None, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.d_state, self.heads = d_state, count_heads(dim, head_dim)
        self.x_proj = DirectionLinear(k, dim, self.heads + 2 * d_state, **dd)
        self.dt_bias = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.A_log = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.D = nn.Parameter(torch.ones(k, self.heads, **dd))
        init_step_bias_(self.dt_bias)
        init_rates_(self.A_log)

    def forward(
        self,
        u: Tensor,
        z: Tensor | None = None,
        order: Tensor | None = None,
        reduce: str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Scan the tokens along every direction; arguments and result as for `SelectiveSSM`."""
        dt, B, C = self._maps(u)
        k = max(dt.shape[2], 1 if order is None else order.shape[-2])
        dt, B, C = (t.expand(-1, -1, k, *t.shape[3:]) for t in (dt, B, C))
        A, D, bias = (t.expand(k, -1) for t in (self.decay(), self.D, self.dt_bias))
        y = ssd(
            self._by_head(u), dt, A, B, C, D, None if z is None else self._by_head(z), order, bias, dt_softplus=True,
            reduce=reduce, cu_seqlens=cu_seqlens, out_dtype=torch.float32 if B.dtype == torch.float16 else None,
        )  # fmt: skip
        return y.flatten(-2)

    def decay(self) -> Tensor:
        """The decay rates A `(k, h)`, negative, in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def init_state(self, batch: int) -> Tensor:
        """The memory before the first token of a stream, `(b, k, d, n)`: float32 at least, and zero."""
        k, width = self.A_log.shape[0], self.x_proj.weight.shape[-1]
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return self.A_log.new_zeros(batch, k, width, self.d_state, dtype=dtype)

    def extend(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of a stream; arguments and results as for `SelectiveSSM`, the state `(b, k, d, n)`."""
        dt, B, C = self._maps(u)
        y, state = ssd(
            self._by_head(u), dt, self.decay(), B, C, self.D, None if z is None else self._by_head(z),
            dt_bias=self.dt_bias, dt_softplus=True, initial_state=self._by_head(state, 2), return_final_state=True,
            out_dtype=torch.float32 if B.dtype == torch.float16 else None,
        )  # fmt: skip
        return y.flatten(-2), state.flatten(2, 3)

    def step(self, u: Tensor, state: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`extend` for one token: `u` and `z` `(b, d)` or `(b, k, d)` to `(b, k, d)` and the new state."""
        dt, B, C = (t[:, 0] for t in self._maps(u[:, None]))
        y, state = ssd_step(
            self._by_head(state, 2), self._by_head(u), dt, self.decay(), B, C, self.D,
            None if z is None else self._by_head(z), self.dt_bias, dt_softplus=True,
        )  # fmt: skip
        return y.flatten(-2), state.flatten(2, 3)

    def _maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps `(b, l, k, h)`, B and C `(b, l, k, 1, n)`."""
        dt, B, C = self.x_proj(u).split([self.heads, self.d_state, self.d_state], dim=-1)
        return dt, B[:, :, :, None], C[:, :, :, None]

    def _by_head(self, x: Tensor, dim: int = -1) -> Tensor:
        return x.unflatten(dim, (self.heads, -1))


class GatedNorm(nn.Module):
    """A root-mean-square norm in groups of channels, and a gate.

    `norm(y * silu(z)) * weight`, or `norm(y) * weight * silu(z)`.

    Args:
        dim: Channels.
        groups: Groups of neighbouring channels, each normed by itself.
        norm_first: Norm before the gate, the second form.
        eps: Added to the mean square.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(self, dim: int, groups: int = 1, norm_first: bool = False, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.groups, self.norm_first, self.eps = groups, norm_first, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Both `(..., dim)`, to the dtype of `z`; computed in float32 at least."""
        exact = torch.promote_types(z.dtype, torch.float32)
        y, gate = y.to(exact), F.silu(z.to(exact))
        y = (y if self.norm_first else y * gate).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(exact)
        return (y * gate if self.norm_first else y).to(z.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, groups={self.groups}, norm_first={self.norm_first}, eps={self.eps}"


class Mamba2(nn.Module):
    """The Mamba-2 mixer: one projection for all that the scan needs, one convolution for x, B and C, a gated norm.

    Of k directions, each has its own convolution, steps, rates and skips; they are reduced before the norm.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        head_dim: Channels p of a head.
        groups: Groups of heads that share B and C.
        k: Directions, the rows of the order that `forward` is given.
        reduce: "sum" or "mean" over directions.
        bias: Whether the two linear projections have a bias.
        conv_bias: Whether the convolution has one.
        channel_skip: A skip weight D for every channel instead of every head.
        gated_norm: Norm along with the gate; False gates alone.
        norm_first: Norm before the gate.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: heads that do not divide the inner width, groups that do not divide the heads, or another `reduce`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        groups: int = 1,
        k: int = 1,
        reduce: str = "sum",
        bias: bool = False,
        conv_bias: bool = True,
        channel_skip: bool = False,
        gated_norm: bool = True,
        norm_first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce={reduce!r} is unknown; choose 'sum' or 'mean'")
        inner = int(expand * dim)
        self.inner, self.d_state, self.groups, self.reduce = inner, d_state, groups, reduce
        self.heads = count_heads(inner, head_dim)
        if self.heads % groups:
            raise ValueError(f"groups={groups} does not divide the {self.heads} heads")
        mixed = inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, inner + mixed + self.heads, bias=bias, **dd)
        self.conv = CausalConv1d(k, mixed, d_conv, bias=conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.A_log = nn.Parameter(torch.empty(k, self.heads, **dd))
        self.D = nn.Parameter(torch.ones(k, self.heads, *([head_dim] if channel_skip else []), **dd))
        self.norm = GatedNorm(inner, groups, norm_first, **dd) if gated_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        init_step_bias_(self.dt_bias)
        init_rates_(self.A_log)

    def forward(self, x: Tensor, order: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)` or `(b, k, m)`, to `(b, l, dim)`.

        `cu_seqlens (s + 1,)` are the token boundaries of sequences packed into one sample (b = 1).
        """
        z, mixed, dt = self._project(x)
        u, B, C = self._split(self.conv(mixed, order, cu_seqlens))
        dt = dt[:, :, None].expand(*u.shape[:3], -1)
        out_dtype = torch.float32 if u.dtype == torch.float16 else None
        y = ssd(
            u, dt, self.decay(), B, C, self.D, None, order, self.dt_bias, dt_softplus=True, reduce=self.reduce,
            cu_seqlens=cu_seqlens, out_dtype=out_dtype,
        )  # fmt: skip
        return self._finish(y, z)

    def decay(self) -> Tensor:
        """The decay rates A `(k, h)`, negative, in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The memory before the first token of a stream: of the convolution `(b, k, c, w - 1)`, and the scan's.

        The latter is `(b, k, h, p, n)`; both are float32 at least, and zero.
        """
        weight = self.conv.weight
        k, channels, width = weight.shape
        exact = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        conv = torch.zeros(batch, k, channels, width - 1, **exact)
        return conv, torch.zeros(batch, k, self.heads, self.inner // self.heads, self.d_state, **exact)

    def extend(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The next tokens of a stream `(b, l, dim)` to `(b, l, dim)` and the new state; all directions run forwards."""
        z, mixed, dt = self._project(x)
        mixed, conv = self.conv.extend(mixed, state[0])
        u, B, C = self._split(mixed)
        dt = dt[:, :, None].expand(*u.shape[:3], -1)
        y, scan = ssd(
            u, dt, self.decay(), B, C, self.D, None, None, self.dt_bias, dt_softplus=True, reduce=self.reduce,
            initial_state=state[1], return_final_state=True,
            out_dtype=torch.float32 if u.dtype == torch.float16 else None,
        )  # fmt: skip
        return self._finish(y, z), (conv, scan)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`extend` for one token `(b, dim)`."""
        z, mixed, dt = self._project(x)
        mixed, conv = self.conv.step(mixed, state[0])
        u, B, C = self._split(mixed)
        dt = dt[:, None].expand(*u.shape[:2], -1)
        y, scan = ssd_step(state[1], u, dt, self.decay(), B, C, self.D, None, self.dt_bias, dt_softplus=True)
        return self._finish(y.sum(1) if self.reduce == "sum" else y.mean(1), z), (conv, scan)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gate, what is convolved, and steps."""
        return self.in_proj(x).split([self.inner, self.conv.weight.shape[1], self.heads], dim=-1)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved rows `(..., k, c)` to x `(..., k, h, p)`, B and C `(..., k, g, n)`."""
        u, B, C = mixed.split([self.inner, self.groups * self.d_state, self.groups * self.d_state], dim=-1)
        return u.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        gated = y.to(z.dtype) * F.silu(z) if self.norm is None else self.norm(y, z)
        return self.out_proj(gated)


def count_heads(dim: int, head_dim: int | None) -> int:
    """Heads of `head_dim` channels, or of the largest divisor of `dim` up to 64.

    Raises:
        ValueError: `head_dim` does not divide `dim`.
    """
    if head_dim is None:
        head_dim = next(p for p in range(min(_HEAD, dim), 0, -1) if dim % p == 0)
    if head_dim < 1 or dim % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the inner width {dim}")
    return dim // head_dim


@torch.no_grad()
def init_rates_(A_log: Tensor) -> Tensor:
    """`A = -exp(A_log)` is uniform between -16 and -1, as in the published code."""
    return A_log.copy_((1 + 15 * torch.rand(A_log.shape, dtype=torch.float32, device=A_log.device)).log())


# torch.fx takes these whole: they look at shapes and dtypes. Not as decorators, which would hide their types.
for _leaf in (DualSSM, GatedNorm, Mamba2):
    register_notrace_module(_leaf)

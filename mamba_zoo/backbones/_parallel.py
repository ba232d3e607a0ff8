"""Mamba blocks side by side, one a direction, each with parameters of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._frames import Frames
from ._keys import Key
from ._ssm import CausalConv1d, DirectionLinear, SelectiveSSM, resolve_dt_rank


class ParallelMamba(nn.Module):
    """k whole Mamba blocks `x + mixer(norm(x))` on the same sequence, their outputs beside one another.

    Every block has its own norm, projections, convolution and state-space layer, and its own visiting order. With the
    orders "bidirectional" this is the block of SEMamba (arXiv:2405.06573) and SPMamba (arXiv:2404.02063), which run one
    block forwards and another on the reversed sequence. All directions are convolved and scanned together, and nothing
    is reversed.

    Args:
        dim: Model width.
        d_state: States n.
        d_conv: Taps of the convolution.
        expand: Inner width in units of `dim`.
        dt_rank: Rank of the step projection; "auto" is one sixteenth of `dim`, rounded up.
        k: Directions.
        eps: Of the norm.
        ssm: False leaves the scan and its parameters out.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    name = ""

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 4,
        dt_rank: int | str = "auto",
        k: int = 2,
        eps: float = 1e-5,
        ssm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.eps = eps
        self.norm_weight = nn.Parameter(torch.ones(k, dim, **dd))
        self.in_proj = DirectionLinear(k, dim, 2 * inner, **dd)
        self.conv = CausalConv1d(k, inner, d_conv, **dd)
        self.ssm = SelectiveSSM(inner, d_state, resolve_dt_rank(dt_rank, dim), k, **dd) if ssm else None
        self.out_proj = DirectionLinear(k, inner, dim, **dd)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, dim)`, visited by `order` `(k, m)` or `(b, k, m)`, to `(b, l, k * dim)`."""
        u, z = self._project(x)
        u = self.conv(u, order)
        y = u * F.silu(z) if self.ssm is None else self.ssm(u, z, order)
        return self._finish(x, y.to(u.dtype))

    def extend(self, x: Tensor, frames: Frames) -> Tensor:
        """The next tokens of a stream, whose memory is in `frames.state`; every direction visits them as they come."""
        state: Any = frames.state
        u, z = self._project(x)
        k, inner, taps = self.conv.weight.shape
        exact = torch.promote_types(u.dtype, torch.float32)
        before = state.get(f"{self.name}.conv")
        if before is None:
            before = torch.zeros(len(x), k, inner, taps - 1, dtype=exact, device=x.device)
        u, state[f"{self.name}.conv"] = self.conv.extend(u, before)
        if self.ssm is None:
            return self._finish(x, u * F.silu(z))
        before = state.get(f"{self.name}.ssm")
        if before is None:
            before = self.ssm.init_state(len(x))
        y, state[f"{self.name}.ssm"] = self.ssm.extend(u, before, z)
        return self._finish(x, y.to(u.dtype))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the inner width, `(b, l, k, inner)` each."""
        normed = F.rms_norm(x, x.shape[-1:], None, self.eps)
        # The norms of the directions differ in their weights alone, which go into the projections: one product for all.
        weight = self.in_proj.weight * self.norm_weight[:, None]
        k, width, _ = weight.shape
        u, z = F.linear(normed.to(x.dtype), weight.flatten(0, 1)).unflatten(-1, (k, width)).chunk(2, dim=-1)
        return u, z

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.out_proj(y) + x[:, :, None]).flatten(2)


def parallel_keys(published: str, ours: str) -> list[Key]:
    """The rows of a key table for one such block, published as `forward_blocks` and `backward_blocks`.

    Args:
        published: Regular expression of what precedes these two, with a group.
        ours: What replaces it.
    """
    leaves = {
        r"norm\.weight": "norm_weight",
        r"mixer\.in_proj\.weight": "in_proj.weight",
        r"mixer\.conv1d\.weight": "conv.weight",
        r"mixer\.conv1d\.bias": "conv.bias",
        r"mixer\.x_proj\.weight": "ssm.x_proj.weight",
        r"mixer\.dt_proj\.weight": "ssm.dt_proj.weight",
        r"mixer\.dt_proj\.bias": "ssm.dt_bias",
        r"mixer\.A_log": "ssm.A_log",
        r"mixer\.D": "ssm.D",
        r"mixer\.out_proj\.weight": "out_proj.weight",
    }
    return [
        Key(
            rf"{published}{way}_blocks\.0\.{leaf}$",
            f"{ours}{name}",
            slot,
            (lambda weight: weight.squeeze(1)) if name == "conv.weight" else None,
        )
        for slot, way in enumerate(("forward", "backward"))
        for leaf, name in leaves.items()
    ]

"""The layers of PCM: embedding and residual layers of points, and a stage with its mixers.

Follows the arithmetic of SkyworkAI/PointCloudMamba@57fdb29d3cf1 openpoints/models/PCM/PCM.py (no licence stated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans._cloud import trusted
from ._block import AddNormBlock, RMSNorm
from ._mixer import Mamba
from ._point_windows import PointStream
from ._points import furthest_points, nearest_points, take_points


class PointLinear(nn.Module):
    """Linear, batch norm, ReLU over points `(..., in)` to `(..., out)`."""

    def __init__(self, dim: int, out: int, bias: bool = False, act: bool = True, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.proj = nn.Linear(dim, out, bias=bias, **dd)
        self.norm = nn.BatchNorm1d(out, **dd)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return self.act(self.norm(self.proj(x).flatten(0, -2))).unflatten(0, x.shape[:-1])


class ResidualPoints(nn.Module):
    """`ReLU(net2(net1(x)) + x)` for every point."""

    def __init__(self, dim: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.net1 = PointLinear(dim, dim, bias, **dd)
        self.net2 = PointLinear(dim, dim, bias, act=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same shape."""
        return F.relu(self.net2(self.net1(x)) + x)


class PCMStage(nn.Module):
    """Points are thinned out, gather their neighbours, and pass mixers, each along an order of its own.

    Args:
        dim: Width of what comes in.
        out: Width of the stage.
        reducer: One of so many points is kept.
        neighbours: Points that each one gathers.
        pre_blocks: Residual layers on gathered points.
        rates: Stochastic depth of each mixer.
        project_residual: Whether the residual stream changes its width here.
        prompt_dim: Width of the prompts.
        d_state: States n.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        reducer: int,
        neighbours: int,
        pre_blocks: int,
        rates: Sequence[float],
        project_residual: bool,
        prompt_dim: int,
        d_state: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.reducer, self.neighbours = reducer, neighbours
        self.alpha = nn.Parameter(torch.ones(dim + 3, **dd))
        self.beta = nn.Parameter(torch.zeros(dim + 3, **dd))
        self.transfer = PointLinear(2 * dim + 3, out, **dd)
        self.pre = nn.Sequential(*(ResidualPoints(out, **dd) for _ in range(pre_blocks)))
        self.residual_proj = nn.Linear(dim, out, bias=False, **dd) if project_residual else None
        self.pos_proj = nn.Linear(3, out, bias=False, **dd)
        self.prompt_proj = nn.Linear(prompt_dim, out, bias=False, **dd)
        self.blocks = nn.ModuleList(
            AddNormBlock(out, Mamba(out, d_state, k=2, reduce="sum", **dd), rate, RMSNorm, **dd) for rate in rates
        )

    def enter(self, stream: PointStream) -> PointStream:
        """Points with `dim` features, thinned out in the order they are stored, to points with `out` features."""
        index = None
        if self.reducer > 1:
            index = furthest_points(stream.xyz, len(stream) // self.reducer).sort(dim=1).values
        x = self.gather(stream.xyz, stream.x, index)
        xyz, residual = stream.xyz, stream.residual
        if index is not None:
            xyz, residual = take_points(xyz, index), None if residual is None else take_points(residual, index)
        if residual is not None and self.residual_proj is not None:
            residual = self.residual_proj(residual.to(x.dtype)).to(residual.dtype)
        return PointStream(xyz, x, residual)

    def gather(self, xyz: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
        """Features `(b, n, dim)` at points `(b, n, 3)` to features `(b, m, out)` of the points that `index` keeps."""
        both = torch.cat([x, xyz.to(x.dtype)], dim=-1)
        kept, centres, own = (both, xyz, x) if index is None else (take_points(v, index) for v in (both, xyz, x))
        near = nearest_points(xyz, centres, self.neighbours)[1]
        offset = (take_points(both, near) - kept[:, :, None]).float()
        offset = (offset / (offset.std(dim=(1, 2, 3), keepdim=True) + 1e-5)).to(x.dtype) * self.alpha + self.beta
        own = own[:, :, None].expand(-1, -1, self.neighbours, -1)
        return self.pre(self.transfer(torch.cat([offset, own], dim=-1))).amax(2)

    def mix(
        self, block: nn.Module, xyz: Tensor, x: Tensor, residual: Tensor | None, order: Tensor, prompt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One mixer along `order (b, n)`, the projected `prompt (p, dim)` read before and after all points."""
        b, n, _ = x.shape
        p = len(prompt)
        ends = self.prompt_proj(prompt).to(x.dtype).expand(b, -1, -1)
        tokens = torch.cat([ends, x + self.pos_proj(xyz.to(x.dtype)), ends], dim=1)
        if residual is not None:
            wide = ends.to(residual.dtype)
            residual = torch.cat([wide, residual, wide], dim=1)
        ahead = torch.arange(p, device=x.device).expand(b, -1)
        forth = torch.cat([ahead, order + p, ahead + (n + p)], dim=1)
        table = trusted(torch.stack([forth, forth.flip(1)], dim=1), n + 2 * p)
        mixed, stream = block(tokens, residual, table)
        return mixed[:, p : p + n], stream[:, p : p + n]

"""Weights for channels, seen from their mean over the tokens: the attention of LocalMamba (arXiv:2403.09338)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._block import LayerNorm


class ChannelGate(nn.Module):
    """A weight between 0 and 1 for every channel: norm, mean over tokens, and two linear layers with GELU in between.

    Args:
        dim: Channels d.
        reduction: `dim` in units of the hidden width.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, reduction: int = 8, device=None, dtype=None):
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.reduce = nn.Linear(dim, dim // reduction, **dd)
        self.select = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """`(..., d)` to its weights, of size 1 along `axes`, which are averaged over."""
        mean = self.norm(x).mean(axes, keepdim=True).to(self.reduce.weight.dtype)
        return torch.sigmoid(self.select(F.gelu(self.reduce(mean)))).to(x.dtype)

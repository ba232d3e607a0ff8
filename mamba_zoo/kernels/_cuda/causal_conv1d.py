"""The causal convolution on NVIDIA GPUs: a few multiplications per byte, so Triton's kernel is as fast as memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .._backend import implementation
from .._conv_args import ConvArgs
from .._triton import refuse


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    return implementation(_served_by(s.x.dtype), "causal_conv1d").forward(s, want_final)


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    return implementation(_served_by(s.x.dtype), "causal_conv1d").backward(s, dy, dfinal)


@lru_cache(maxsize=8)  # asking reads the environment
def _served_by(dtype: torch.dtype) -> str:
    """Triton, or the reference where Triton is missing."""
    return "triton" if refuse("cuda", dtype) is None else "reference"

"""Plain torch, one step after another, any device and dtype: the oracle, and the fallback where nothing else runs."""

from __future__ import annotations

import torch


def refuse(device: str, dtype: torch.dtype) -> str | None:
    """The reference never refuses."""
    return None

"""Float32 loops for the CPU, compiled by numba at first use and cached on disk."""

from __future__ import annotations

import importlib.util

import torch

from .._arguments import DTYPES


def refuse(device: str, dtype: torch.dtype) -> str | None:
    """None if this backend serves `dtype` on `device`, else why not."""
    if device != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"it computes in float32, so {str(dtype).removeprefix('torch.')} is left to the reference"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    return None

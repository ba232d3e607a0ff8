"""Triton kernels: the portable path for GPUs, and the fast one where the CUDA backend cannot run."""

from __future__ import annotations

import importlib.util
import os

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda as well


def refuse(device: str, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve `dtype` on `device`, or None.

    With TRITON_INTERPRET=1 in the environment they serve CPU tensors instead, very slowly, and only if asked for by
    name.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cpu" if interpreted else device not in _DEVICES:
        wanted = "CPU tensors while TRITON_INTERPRET=1 is set" if interpreted else "a GPU"
        return f"Triton kernels need {wanted}, not {device}"
    if dtype not in _DTYPES:
        return f"Triton kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None

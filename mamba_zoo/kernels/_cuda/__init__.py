"""CUDA C++ compiled at run time by NVRTC: no toolkit, no build step. The fastest backend on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from .._arguments import DTYPES


def refuse(device: str, dtype: torch.dtype) -> str | None:
    """None if this backend serves `dtype` on `device`, else why not."""
    if device != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device}"
    if torch.version.hip is not None:
        return "this is an AMD GPU, which Triton serves"
    if dtype not in DTYPES:
        return f"it computes in float32, so {str(dtype).removeprefix('torch.')} is left to the reference"
    return _unavailable()


@lru_cache(maxsize=1)
def _unavailable() -> str | None:
    """Why kernels cannot be compiled on this machine, if they cannot."""
    try:
        if importlib.util.find_spec("cuda.bindings") is None:
            return "cuda-bindings is not installed (pip install cuda-bindings)"
        from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue] (a built extension)

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        return f"NVRTC cannot be loaded (pip install nvidia-cuda-nvrtc): {error}"
    from .nvrtc import architecture

    try:
        for device in range(torch.cuda.device_count()):
            architecture(device)
    except RuntimeError as error:  # older than the GPU, or so new that it has dropped it
        return str(error)
    return None

"""Triton kernels: the portable path for GPUs, and the fast one where the CUDA backend cannot run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

from .._arguments import DTYPES

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
    if dtype not in DTYPES:
        return f"Triton kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None if interpreted else _missing()


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """What is not there of that with which Triton builds a launcher for each kernel when it is first needed."""
    if sys.platform != "linux":
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler, and there is none: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton has it
    folder = sysconfig.get_path("include", scheme)
    named = [x for key in ("CPATH", "C_INCLUDE_PATH") for x in os.environ.get(key, "").split(os.pathsep) if x]
    if not any((Path(x) / "Python.h").exists() for x in (folder, *named)):
        return f"Triton builds its launchers with Python's headers, and {folder} has no Python.h: install python3-dev"
    return None

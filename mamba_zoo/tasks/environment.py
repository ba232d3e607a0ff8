"""What this machine has: versions, devices, compilers. Nothing here raises because an optional thing is broken."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

State = Literal["ok", "absent", "broken"]

# distribution, module, whether mamba_zoo cannot do without it, what it is for
PACKAGES: tuple[tuple[str, str, bool, str], ...] = (
    ("torch", "torch", True, "everything"),
    ("torchvision", "torchvision", True, "image data"),
    ("timm", "timm", True, "model registry, training parts"),
    ("numpy", "numpy", True, "everything"),
    ("numba", "numba", True, "fast kernels on the CPU"),
    ("scipy", "scipy", True, "statistics of compare"),
    ("scikit-learn", "sklearn", True, "the digits data"),
    ("matplotlib", "matplotlib", True, "plots and reports"),
    ("pytorch-lightning", "pytorch_lightning", True, "fit, test, predict, compare"),
    ("torchmetrics", "torchmetrics", True, "scores"),
    ("triton", "triton", False, "portable GPU kernels"),
    ("cuda-bindings", "cuda.bindings", False, "fastest GPU kernels, compiled by NVRTC"),
    ("torchaudio", "torchaudio", False, "audio models"),
    ("soundfile", "soundfile", False, "reading wav and flac"),
    ("pystoi", "pystoi", False, "intelligibility of speech"),
    ("torch-geometric", "torch_geometric", False, "graph models"),
    ("open3d", "open3d", False, "reading meshes and point clouds"),
    ("pycocotools", "pycocotools", False, "scores of detection"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What.
        state: "ok", "absent" or "broken".
        detail: Version or value; for a broken thing, the error.
        needed: Whether mamba_zoo cannot work without it.
        use: What it is for.
    """

    name: str
    state: State
    detail: str
    needed: bool = False
    use: str = ""


def packages() -> list[Finding]:
    """Import each package that mamba_zoo can use."""
    return [_package(*row) for row in PACKAGES]


def devices() -> list[Finding]:
    """The processor and every accelerator that torch sees, with driver and run-time versions."""
    found = [
        _probe("python", lambda: f"{platform.python_version()} on {platform.system()} {platform.machine()}", True),
        _probe("processor", _processor),
        _probe("numba threads", _numba),
        _probe("CUDA of torch", _torch_cuda),
        _probe("CUDA driver", _driver),
        _probe("NVRTC", _nvrtc),
    ]
    return [*found, *_gpus()]


def machine() -> dict[str, str]:
    """What results depend on, in a few words: kept with every run."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "torch": str(torch.__version__),
        "mamba_zoo": _version("mamba_zoo") or "not installed",
        "python": platform.python_version(),
        **({} if gpu else {"threads": str(torch.get_num_threads())}),
    }


def _package(distribution: str, module: str, needed: bool, use: str) -> Finding:
    found = _version(distribution)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and found is None
        detail = "not installed" if absent else f"{found or 'unknown version'} does not import: {describe(error)}"
        return Finding(distribution, "absent" if absent else "broken", detail, needed, use)
    seconds = time.perf_counter() - started
    slow = f", imported in {seconds:.1f} s" if seconds > 1 else ""
    return Finding(distribution, "ok", f"{found or 'version unknown'}{slow}", needed, use)


def _probe(name: str, look: Callable[[], str | None], needed: bool = False) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detail = look()
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError)
        return Finding(name, "absent" if absent else "broken", describe(error), needed)
    return Finding(name, "absent" if detail is None else "ok", detail or "none", needed)


def describe(error: BaseException) -> str:
    """An error on one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    import torch

    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    simd = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {cores} cores, {simd}"


def _numba() -> str:
    import llvmlite.binding as llvm
    import numba

    features = llvm.get_host_cpu_features()
    vector = [
        name for name in ("avx2", "fma", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve") if features.get(name)
    ]
    return f"{numba.get_num_threads()} of {numba.config.NUMBA_NUM_THREADS}; {llvm.get_host_cpu_name()}: " + (  # type: ignore[attr-defined]
        " ".join(vector) or "no vector units known"
    )


def _torch_cuda() -> str | None:
    import torch

    return str(torch.version.cuda) if torch.version.cuda else None


def _driver() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    driver: Any = importlib.import_module("cuda.bindings.driver")
    status, raw = driver.cuDriverGetVersion()
    if int(status):
        raise RuntimeError(f"cuDriverGetVersion returned {status}")
    return f"supports CUDA {raw // 1000}.{raw % 1000 // 10}"


def _nvrtc() -> str:
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status):
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return f"{major}.{minor}"


def _gpus() -> list[Finding]:
    def count() -> int:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    try:
        number = count()
    except Exception as error:
        return [Finding("GPU", "broken", describe(error))]
    if number == 0:
        return [Finding("GPU", "absent", "none that torch can use")]
    return [_probe(f"GPU {i}", lambda i=i: _gpu(i)) for i in range(number)]


def _gpu(index: int) -> str:
    import torch

    found = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, {found.multi_processor_count} SMs, "
        f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    )

"""Compile a kernel for the GPU at hand, keep it on disk, launch it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportAttributeAccessIssue] (built extensions)

_OPTIONS = ("--std=c++17", "--disable-warnings")
_lock = threading.RLock()
_Parameters = ctypes.c_char_p * 1  # points into the bytes, which the call that launches copies


class Kernel:
    """One function of a compiled module, loaded on one device."""

    def __init__(self, image: bytes, name: str, device: int, shared: int):
        self.device, self.shared = device, shared
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # torch creates the context that it and we share
            self._context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))
            _checked(driver.cuCtxPushCurrent(self._context))
            # A kernel first needed while a graph is captured may be loaded: that touches no captured stream.
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            mode = _checked(driver.cuThreadExchangeStreamCaptureMode(mode))
            try:
                # The module must outlive the function.
                self._module = _checked(driver.cuModuleLoadData(image))
                self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
                if shared:
                    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    _checked(driver.cuFuncSetAttribute(self._function, attribute, shared))
                _checked(driver.cuFuncLoad(self._function))  # now, not at the first launch
            finally:
                _checked(driver.cuThreadExchangeStreamCaptureMode(mode))
                _checked(driver.cuCtxPopCurrent())

    def launch(self, blocks: int, threads: int, argument: bytes) -> None:
        """Queue the kernel on torch's current stream of its device, `argument` being its one parameter."""
        if blocks == 0:
            return
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self._launch(blocks, threads, argument)
        return self._launch(blocks, threads, argument)

    def _launch(self, blocks: int, threads: int, argument: bytes) -> None:
        # The address of the stream, which torch.cuda.current_stream() would wrap in an object for 10 us.
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        parameters = _Parameters(argument)
        call = (self._function, blocks, 1, 1, threads, 1, 1, self.shared, stream, ctypes.addressof(parameters), 0)
        (status,) = driver.cuLaunchKernel(*call)
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # A thread in which torch has not touched the device yet.
            _checked(driver.cuCtxSetCurrent(self._context))
            (status,) = driver.cuLaunchKernel(*call)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"launch of {blocks} blocks of {threads} threads failed: {status.name}")


@lru_cache(maxsize=4096)
def load(source: str, name: str, device: int, shared: int = 0) -> Kernel:
    """The kernel `name` of `source`, compiled for `device` unless it is cached.

    Args:
        source: CUDA C++ without includes.
        name: Of an `extern "C"` kernel in it.
        device: Index of the CUDA device.
        shared: Bytes of dynamic shared memory that a block gets.
    """
    with _lock:
        return Kernel(cubin(source, architecture(device)), name, device, shared)


@lru_cache(maxsize=64)
def architecture(device: int) -> str:
    """The newest architecture that this NVRTC knows and `device` runs, such as "sm_90"."""
    major, minor = capability(device)
    known = _checked(nvrtc.nvrtcGetSupportedArchs())
    # Machine code runs on later minor versions of its major version.
    fitting = [a for a in known if a // 10 == major and a % 10 <= minor]
    if not fitting:
        raise RuntimeError(
            f"NVRTC {'.'.join(map(str, _version()))} cannot compile for compute capability {major}.{minor}; "
            "another version of nvidia-cuda-nvrtc may"
        )
    return f"sm_{max(fitting)}"


@lru_cache(maxsize=64)
def capability(device: int) -> tuple[int, int]:
    """Compute capability of `device`."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block of `device` may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def cubin(source: str, arch: str) -> bytes:
    """Machine code of `source`, from the cache if it is there and intact."""
    key = hashlib.sha256("\0".join([source, arch, *_OPTIONS, *map(str, _version())]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if (image := _read(path)) is None:
        image, _ = compile_source(source, arch)
        _write(path, image)
    return image


def compile_source(source: str, arch: str, *options: str) -> tuple[bytes, str]:
    """Machine code of `source` and the compiler's log.

    Raises:
        RuntimeError: the source does not compile.
    """
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"mamba_zoo.cu", 0, None, None))
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={arch}", *_OPTIONS, *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        # The bindings write into the bytes that they are given; older ones take nothing else.
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace").rstrip("\0")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{status.name} while compiling for {arch}:\n{text[:4000]}")
        image = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, image))
        return image, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept: `mamba_zoo/cuda` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "mamba_zoo" / "cuda"


def _read(path: Path) -> bytes | None:
    """A cache entry, or None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:32], content[32:]
    return image if hashlib.sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    """Store a cache entry: other processes see all of it or nothing. A cache that cannot be written is left alone."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@lru_cache(maxsize=1)
def _version() -> tuple[int, int]:
    return _checked(nvrtc.nvrtcVersion())


def _checked(result: tuple) -> Any:
    """What a call of the bindings returns beside its status.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"{type(status).__name__} {status.name}")
    return values[0] if len(values) == 1 else tuple(values)

"""What the launches of every op share: the device, widths that loads may assume, and 64-bit offsets."""

from __future__ import annotations

import contextvars
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._plans import Plans

_VERSION = "3.6."  # of Triton, whose launcher `_Handle` calls; others launch in the ordinary way


class _Handle(NamedTuple):
    """A compiled kernel as Triton's own launcher takes it."""

    run: Callable
    function: int
    metadata: tuple
    constants: tuple


# By kernel, device, dtypes and alignment of tensors, and all other arguments: at least as fine as what Triton tells
# apart when it compiles.
_handles: Plans[_Handle] = Plans()


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """Run `programs` programs on the device of `like`, which need not be the current one, where Triton launches.

    Args:
        kernel: A function of Triton's.
        programs: How many.
        like: A tensor on the device.
        args: The kernel's first arguments.
        constants: The others by name, and options of the compiler.
    """
    if programs == 0:
        return
    if not like.is_cuda:
        kernel[(programs,)](*args, **constants)
    elif torch._C._cuda_getDevice() == like.get_device():
        _queue(kernel, programs, like.get_device(), args, constants)
    else:
        with torch.cuda.device(like.device):
            _queue(kernel, programs, like.get_device(), args, constants)


class Launch:
    """A launch with all arguments but the tensors, which come first: calls that share it find their handle by those.

    Args:
        kernel: A function of Triton's.
        programs: How many.
        numbers: The kernel's arguments after the tensors.
        constants: The others by name, and options of the compiler.
    """

    def __init__(self, kernel: Any, programs: int, numbers: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self.is_new = programs > 0  # and has not run on a GPU yet
        self._found: Plans[_Handle] = Plans()

    def __call__(self, like: Tensor, *tensors: Tensor | None) -> None:
        """Run it with `tensors`, on the device of `like`."""
        if self.programs == 0:
            return
        if not like.is_cuda:
            self.kernel[(self.programs,)](*tensors, *self.numbers, **self.constants)
        elif torch._C._cuda_getDevice() == like.get_device():
            self._queue(like.get_device(), tensors)
        else:
            with torch.cuda.device(like.device):
                self._queue(like.get_device(), tensors)

    def form(self, device: int, tensors: tuple[Tensor | None, ...]) -> tuple:
        """What Triton compiles apart, or more than that."""
        kinds = (None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors)
        return (id(self.kernel), device, *kinds, *self.constants.items())

    def compiled(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """Triton's kernel for `tensors`, or where it compiles asynchronously, its future."""
        return self.kernel.warmup(*tensors, *self.numbers, grid=(self.programs,), **self.constants)

    def _queue(self, device: int, tensors: tuple[Tensor | None, ...]) -> None:
        self.is_new = False
        key: list[Any] = [device]
        values: list[Any] = []
        for x in tensors:
            if x is None:
                key.append(None)
                values.append(None)
            else:
                address = x.data_ptr()
                key += (x.dtype, address % 16)
                values.append(address)
        found = (*key,)
        handle = self._found.get(found)
        if handle is None or _observed(self.kernel):
            _first(self._found, found, self.kernel, self.programs, (*tensors, *self.numbers), self.constants)
            return
        values += self.numbers
        _again(handle, self.programs, device, values)


Given = tuple[Launch, tuple[Tensor | None, ...]]  # and its tensors
_compiled: set[tuple] = set()  # forms


def in_turn(like: Tensor, *launches: Given) -> None:
    """Run launches one after another, each with its tensors, all on the device of `like`.

    What Triton has to compile for them it compiles side by side, so that a first call waits for the slowest only.
    """
    if like.is_cuda and any(launch.is_new for launch, _ in launches):
        device = like.get_device()
        forms = {launch.form(device, tensors): (launch, tensors) for launch, tensors in launches if launch.programs}
        new = [given for form, given in forms.items() if form not in _compiled]
        # While a graph is recorded, other threads would spoil it.
        if len(new) > 1 and hasattr(_triton(), "AsyncCompileMode") and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(device):
                # In a context of its own: Triton leaves its mode set if a compilation fails.
                contextvars.Context().run(_compile_together, device, new)
        _compiled.update(forms)
    for launch, tensors in launches:
        launch(like, *tensors)


def _compile_together(device: int, launches: list[Given]) -> None:
    """Compile and load kernels in threads: most of it is other programs' work, or done without Python's lock."""
    triton = _triton()
    with ThreadPoolExecutor() as threads:
        with triton.AsyncCompileMode(threads):
            found = [launch.compiled(tensors) for launch, tensors in launches]
        kernels = [kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel for kernel in found]
        different = {id(kernel): kernel for kernel in kernels if kernel is not None}  # none is loaded twice at once
        list(threads.map(partial(_load, device), different.values()))


def _load(device: int, kernel: Any) -> None:
    """Have Triton build the launcher of a compiled kernel and load it, as its first launch would."""
    with torch.cuda.device(device):
        _ = kernel.run


def _queue(kernel: Any, programs: int, device: int, args: tuple, constants: dict[str, Any]) -> None:
    """Launch through the handle of an earlier launch: finding it out anew takes Triton several times as long."""
    key: list[Any] = [id(kernel), device]
    values = []
    for x in args:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            key += (x.dtype, address % 16)
            values.append(address)
        else:
            key.append(x)
            values.append(x)
    key += constants.items()
    found = (*key,)
    handle = _handles.get(found)
    if handle is None or _observed(kernel):
        _first(_handles, found, kernel, programs, args, constants)
    else:
        _again(handle, programs, device, values)


def _first(
    handles: Plans[_Handle], key: tuple, kernel: Any, programs: int, args: tuple, constants: dict[str, Any]
) -> None:
    """Launch in the ordinary way, and keep the handle."""
    compiled = kernel[(programs,)](*args, **constants)
    if _triton().__version__.startswith(_VERSION) and torch.version.hip is None:
        constant = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        handles.keep(key, _Handle(compiled.run, compiled.function, compiled.packed_metadata, constant))


def _again(handle: _Handle, programs: int, device: int, values: list) -> None:
    """One launch of a grid of `programs`, without what Triton would tell its hooks."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    handle.run(
        programs, 1, 1, stream, handle.function, handle.metadata, None, None, None, *values, *handle.constants
    )  # fmt: skip


def _observed(kernel: Any) -> bool:
    """Whether a profiler has asked Triton to be told about launches."""
    hooks = _triton().knobs.runtime
    return bool(kernel.pre_run_hooks or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


@lru_cache(maxsize=1)
def _triton() -> Any:
    return importlib.import_module("triton")


def strides(x: Tensor, per: int = 1) -> tuple[int, int, int]:
    """Strides of samples, tokens and directions in units of `per` elements; 0 for a tensor the directions share."""
    return x.stride(0) // per, x.stride(1) // per, x.stride(2) // per if x.dim() == 4 else 0


def common_width(tensors: list[Tensor | None], *sizes: int) -> int:
    """How many elements loads may take at once: the largest power of two, up to 16 bytes, that divides every stride,
    size and address.
    """
    width = 8
    for x in tensors:
        if x is None:
            continue
        width = min(width, 16 // x.element_size())
        whole = [x.data_ptr() // x.element_size(), *(s for s in x.stride()[:-1])]
        while any(value % width for value in whole):
            width //= 2
    while any(size % width for size in sizes):
        width //= 2
    return width


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether the offset of some row within its sample does not fit 32 bits."""
    return any(
        x is not None and sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in tensors
    )


def stored_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """What kernels write for results of `dtype` (that of `x` by default).

    The same, but for the interpreter: it truncates to bfloat16 instead of rounding, so there torch rounds afterwards.
    """
    dtype = x.dtype if dtype is None else dtype
    return torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype

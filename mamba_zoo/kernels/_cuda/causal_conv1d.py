"""The causal convolution on NVIDIA GPUs: arguments packed for the kernels of conv.cu (see docs/kernels.md)."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from .._conv_args import ConvArgs
from .._plans import Plans
from . import _conv_plan, _plan, nvrtc
from ._conv_plan import Launch, Variant
from ._sums import Sum, Sums
from ._tensors import address, aligned, readable, strides, unreadable

# Args of conv.cu in two parts.
_ADDRESSES = struct.Struct("12Q")
_SIZES = struct.Struct("11q8i")
_STATE_THREADS = 128
_ROWS = (0, 1, 4)  # x, dy and the order among the tensors of a call
_setups: Plans[_Setup] = Plans()


def forward(s: ConvArgs, want_final: bool) -> tuple[Tensor, Tensor | None]:
    """`(y, final state if wanted)`; see `ConvArgs` for the shapes."""
    setup, inputs = _prepare(s)
    # Tokens that no direction visits stay zero.
    y = (s.x.new_empty if s.complete else s.x.new_zeros)(setup.rows_shape)
    addresses = [address(x) for x in inputs]
    setup.launch("forward", *addresses, y.data_ptr(), 0, 0, 0)
    if not want_final:
        return y, None
    final = s.new_state()
    setup.launch("final", *addresses, 0, 0, 0, final.data_ptr())
    return y, final


def backward(s: ConvArgs, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    setup, inputs = _prepare(s, dy, dfinal)
    # Directions that share x add to one gradient. The sum of two is the same in any turn; where that of more must be
    # the same every time, each direction writes a part, and the launch at the end sums them.
    added = setup.added and (setup.k == 2 or not torch.are_deterministic_algorithms_enabled())
    parts = setup.x_shared and not added
    new = s.x.new_empty if s.complete and not added else s.x.new_zeros
    dx = new(setup.rows_shape if parts else setup.x_shape)
    addresses = [address(x) for x in inputs]
    # Every block of runs has its own sums for weights and bias, in one tensor.
    sums = s.weight.new_empty(setup.sums_size)
    weight = torch.empty_like(s.weight, memory_format=torch.contiguous_format)
    bias = None if s.bias is None else torch.empty_like(s.bias, memory_format=torch.contiguous_format)
    start = sums.data_ptr()
    bias_start = 0 if bias is None else start + setup.bias_offset
    name = "backward_added" if added else "backward"
    setup.launch(name, *addresses, dx.data_ptr(), start, bias_start, 0)
    grads = {"x": dx, "weight": weight}
    pairs = [(start, weight.data_ptr())]
    if bias is not None:
        grads["bias"] = bias
        pairs.append((bias_start, bias.data_ptr()))
    if parts:
        grads["x"] = s.x.new_empty(setup.x_shape)
        pairs.append((dx.data_ptr(), grads["x"].data_ptr()))
    setup.sums(parts).launch(pairs)
    if s.initial_state is not None:
        grads["initial_state"] = torch.empty_like(s.initial_state, memory_format=torch.contiguous_format)
        setup.launch("initial", *addresses, 0, 0, 0, grads["initial_state"].data_ptr())
    return grads


def _prepare(
    s: ConvArgs, dy: Tensor | None = None, dfinal: Tensor | None = None
) -> tuple[_Setup, tuple[Tensor | None, ...]]:
    """The setup that serves the layout of a call, and the inputs in the order of Args, as the kernels read them."""
    x = s.x
    given = (x, dy, s.weight, s.bias, s.order, s.offsets, s.initial_state, dfinal)
    # Strides say which tensors are given and how many dimensions they have.
    key = (
        *[None if t is None else t.stride() for t in given], x.shape, s.weight.shape, s.order.shape,
        None if s.offsets is None else s.offsets.shape, x.dtype, s.silu, x.get_device(),
        (x.data_ptr() | (0 if dy is None else dy.data_ptr())) & 15,
    )  # fmt: skip
    setup = _setups.get(key)
    if setup is None:
        setup = _setups.keep(key, _Setup(s, given))
    if setup.copied:
        given = readable(given, setup.copied)
    return setup, given


class _Setup:
    """What shapes, strides and alignment decide, worked out once for all calls that share them."""

    def __init__(self, s: ConvArgs, given: tuple[Tensor | None, ...]):
        self.copied = unreadable(given, _ROWS)
        given = readable(given, self.copied)
        tokens = [x for x in given[:2] if x is not None]
        x, dy, dfinal = tokens[0], given[1], given[-1]
        self.rows_shape = (s.b, s.l, s.k, s.d)
        self.b, self.k, self.d = s.b, s.k, s.d
        self.m, self.w, self.states = s.m, s.w, s.states
        self.device, self.dtype = x.get_device(), x.dtype
        self.x_shape = tuple(x.shape)
        self.x_shared = x.dim() == 3 and self.k > 1
        self.aligned = next(
            w for w in (8, 4, 2, 1) if w * x.itemsize <= 16 and self.d % w == 0 and all(aligned(t, w) for t in tokens)
        )
        adds = _plan.adds_directions(self.k, nvrtc.capability(self.device))
        self.added = self.x_shared and adds and self.aligned * x.itemsize >= 4
        self._variant = Variant(x.dtype, s.silu, s.offsets is not None, dfinal is not None)
        self._strides = [*strides(x), *strides(dy)]
        self._order_strides = (0 if s.order.shape[0] == 1 else s.order.stride(0), s.order.stride(1))
        launch = self.launch_of("backward")
        self._parts = -(-self.b * self._runs(launch)[1] // launch.slots)
        self.bias_offset = 4 * self._parts * s.weight.numel()
        self.sums_size = self._parts * (s.weight.numel() + (0 if s.bias is None else s.bias.numel()))
        self._has_bias = s.bias is not None
        self._kernels: dict[str, tuple[nvrtc.Kernel, int, int, bytes]] = {}
        self._sums: dict[bool, Sums] = {}

    def launch(self, name: str, *addresses: int) -> None:
        """Queue a kernel with these addresses, in the order of Args."""
        found = self._kernels.get(name)
        if found is None:
            found = self._kernels[name] = self._load(name)
        loaded, blocks, threads, sizes = found
        loaded.launch(blocks, threads, _ADDRESSES.pack(*addresses) + sizes)

    def launch_of(self, name: str) -> Launch:
        """How `name` is launched."""
        return _conv_plan.launch(_pass(name), self.w, self.d, self.aligned)

    def sums(self, parts: bool) -> Sums:
        """The launch that sums what blocks wrote for weights and bias, and of x what directions wrote in `parts`."""
        found = self._sums.get(parts)
        if found is None:
            channels = self.k * self.d
            jobs = [Sum(False, False, channels * self.w, self._parts, channels * self.w)]
            if self._has_bias:
                jobs.append(Sum(False, False, channels, self._parts, channels))
            if parts:
                half = self.dtype != torch.float32
                jobs.append(Sum(half, half, math.prod(self.x_shape), self.k, self.d))
            found = self._sums[parts] = Sums(jobs, self.dtype, self.device)
        return found

    def _runs(self, launch: Launch) -> tuple[int, int]:
        """Steps of a run, and runs of a sample."""
        run = _conv_plan.steps(launch, self.m, self.b, self.k * -(-self.d // launch.channels))
        return run, -(-self.m // run)

    def _load(self, name: str) -> tuple[nvrtc.Kernel, int, int, bytes]:
        launch, added = self.launch_of(name), name == "backward_added"
        run, runs = self._runs(launch)
        blocks = -(-self.d // launch.channels)
        _, l, k, d = self.rows_shape
        size = self.dtype.itemsize
        width = 1 if added else k  # directions of what is written
        out = (l * width * d * size, width * d * size, 0 if added else d * size)
        sizes = _SIZES.pack(
            *self._strides, *out, *self._order_strides, self.b, k, d, self.m, self.states, run, max(runs, 1), blocks
        )
        source = _conv_plan.source(_pass(name), launch, self._variant.with_(added=added))
        loaded = nvrtc.load(source, f"conv_{name.removesuffix('_added')}", self.device)
        if name in ("final", "initial"):
            needed = self.states * k * d if self.w > 1 else 0
            return loaded, -(-needed // _STATE_THREADS), _STATE_THREADS, sizes
        return loaded, -(-self.b * runs // launch.slots) * k * blocks, launch.threads, sizes


def _pass(kernel: str) -> str:
    """The pass that a kernel belongs to."""
    return "forward" if kernel in ("forward", "final") else "backward"

"""The selective scan on NVIDIA GPUs: arguments packed for the kernels of this folder (see docs/kernels.md)."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from .._scan_args import ScanArgs
from . import _plan, nvrtc
from ._plan import Variant

# Args of common.cu in two parts, Carry and Job of finish.cu.
_POINTERS = struct.Struct("27Q")
_SIZES = struct.Struct("21q11if")
_CARRY = struct.Struct("5Q8i")
_JOB = struct.Struct("2Q2q6if4x")
_MOST_JOBS = 8
_OUTPUTS = (
    "y", "du", "ddt", "dz", "dB", "dC", "final", "saved", "dA", "dD", "dbias", "dinitial", "carry", "carry_dt",
)  # fmt: skip
_setups: dict[tuple, _Setup] = {}


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """States that the forward pass keeps for the backward pass, `(runs of slots, slots, n, d)`."""
    runs, slots = _kept(s, _spacing(s))
    return (runs, slots, s.n, s.d)


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, what the backward needs if `save`)`; see `ScanArgs` for the shapes."""
    call = _Call(s)
    setup = call.setup
    saved = s.u.new_empty(setup.saved_shape, dtype=torch.float32) if save else None
    final = s.new_state() if want_final else None
    parts = s.reduce != "none" and setup.k > 1
    y = call.zeros_unless_complete(setup.rows_shape if parts else s.y_shape, s.out_dtype)
    out = {"y": y, "saved": saved, "final": final}
    if setup.chunks == 1:
        call.launch("forward", out, keep=save)
    else:
        out |= call.chunk_states()
        call.launch("forward", out, part=1)
        call.carry(out, call.initial, reverse=False)
        call.launch("forward", out, part=2, keep=save)
    if parts:
        whole = s.u.new_empty(s.y_shape, dtype=s.out_dtype)
        half = y.dtype != torch.float32
        _finish(setup.device, s.out_dtype, [(y.data_ptr(), half, whole, setup.k, setup.d, setup.scale)])
        y = whole
    return y, final, saved


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    call = _Call(s, dy, dfinal)
    setup = call.setup
    new, shape, dtype, exact = s.u.new_empty, setup.rows_shape, s.u.dtype, torch.float32
    out: dict = {"saved": saved, "du": call.zeros_unless_complete(shape, dtype)}
    out["ddt"] = call.zeros_unless_complete(shape, dtype)
    if s.z is not None:
        out["dz"] = call.zeros_unless_complete(shape, dtype)
    sums = 2 if setup.blocks == 1 else 1 if torch.are_deterministic_algorithms_enabled() else 0
    maps = (setup.blocks if sums == 1 else 1, *shape[:3], setup.n)
    if sums == 0:
        out["dB"], out["dC"] = s.u.new_zeros((2, *maps), dtype=exact)
    else:
        kind = exact if sums == 1 else dtype
        out["dB"], out["dC"] = call.zeros_unless_complete(maps, kind), call.zeros_unless_complete(maps, kind)
    channels = setup.rows * setup.chunks * setup.k * setup.d
    sums_of_steps = new(channels * (setup.n + 2), dtype=exact)  # dA, dD and dbias, one after another
    out["dA"] = first = sums_of_steps.data_ptr()
    out["dD"] = first + 4 * channels * setup.n
    out["dbias"] = first + 4 * channels * (setup.n + 1)
    if s.initial_state is not None:
        out["dinitial"] = s.new_state()
    if setup.chunks == 1:
        call.launch("backward", out, sums=sums)
    else:
        out |= call.chunk_states()
        call.launch("forward", out, part=3)
        call.carry(out, call.dfinal, reverse=True)
        call.launch("backward", out, part=2, sums=sums)
    return _gather(s, setup, out, sums)  # its sums are queued before `sums_of_steps` is given back


def _gather(s: ScanArgs, setup: _Setup, out: dict, sums: int) -> dict[str, Tensor]:
    """The gradients, from what the backward kernel wrote per direction, row, chunk and block of channels."""
    grads: dict[str, Tensor] = {"dt": out["ddt"]}
    jobs = []

    def add(name: str, part: Tensor | int, like: Tensor, count: int, inner: int) -> None:
        grads[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        half = isinstance(part, Tensor) and part.dtype != torch.float32
        jobs.append((_pointer(part), half, grads[name], count, inner, 1.0))

    for name, given in (("u", s.u), ("z", s.z)):
        if given is not None and (given.dim() == 4 or setup.k == 1):
            grads[name] = out[f"d{name}"].view(given.shape)
        elif given is not None:
            add(name, out[f"d{name}"], given, setup.k, setup.d)
    for name, given in (("B", s.B), ("C", s.C)):
        part = out[f"d{name}"]
        if sums == 2:
            grads[name] = part[0]
        else:
            add(name, part, given, len(part), given.numel())
    runs, channels = setup.rows * setup.chunks, setup.k * setup.d
    add("A", out["dA"], s.A, runs, channels * setup.n)
    for name, part, given in (("D", out["dD"], s.D), ("dt_bias", out["dbias"], s.dt_bias)):
        if given is not None:
            add(name, part, given, runs, channels)
    if s.initial_state is not None:
        grads["initial_state"] = out["dinitial"]
    _finish(setup.device, s.u.dtype, jobs)
    return grads


class _Call:
    """One problem: its tensors as the kernels can read them, and the setup that serves their layout."""

    def __init__(self, s: ScanArgs, dy: Tensor | None = None, dfinal: Tensor | None = None):
        self.s = s
        rows = [None if x is None else _unit_rows(x) for x in (s.u, s.dt, s.B, s.C, s.z, dy)]
        self.A, self.D, self.bias, self.initial, self.dfinal, self.offsets = (
            x if x is None or x.is_contiguous() else x.contiguous()
            for x in (s.A, s.D, s.dt_bias, s.initial_state, dfinal, s.offsets)
        )
        self.order = s.order if s.order.stride(2) == 1 or s.order.shape[2] == 1 else s.order.contiguous()
        # Keeps alive what was copied above until the kernels are queued.
        self.tensors = (
            *rows, self.A, self.D, self.bias, self.order, self.offsets, self.initial, self.dfinal
        )  # fmt: skip
        self.pointers = [0 if x is None else x.data_ptr() for x in self.tensors]
        a, b, c, d, e, f = self.pointers[:6]
        key = (
            *(None if x is None else (x.shape, x.stride()) for x in rows), s.A.shape, self.order.shape,
            self.order.stride(), None if self.offsets is None else self.offsets.shape, s.u.dtype, s.out_dtype,
            s.dt_softplus, s.reduce, s.complete, s.u.get_device(), (a | b | e | f) & 15, (c | d) & 15,
        )  # fmt: skip
        setup = _setups.get(key)
        if setup is None:
            if len(_setups) > 4096:  # variable lengths
                _setups.clear()
            setup = _setups[key] = _Setup(s, rows, self.order)
        self.setup = setup

    def zeros_unless_complete(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output of the kernels: tokens that no direction visits stay zero."""
        make = self.s.u.new_empty if self.s.complete else self.s.u.new_zeros
        return make(shape, dtype=dtype)

    def chunk_states(self) -> dict[str, Tensor]:
        """Room for the state of every chunk and its summed step size."""
        setup, new = self.setup, self.s.u.new_empty
        shape = (setup.rows, setup.k, setup.chunks, setup.n, setup.d)
        return {"carry": new(shape, dtype=torch.float32), "carry_dt": new((*shape[:3], setup.d), dtype=torch.float32)}

    def carry(self, out: dict, start: Tensor | None, reverse: bool) -> None:
        """States at the beginnings of chunks, or gradients at their ends, from what `part` 1 or 3 wrote."""
        t = self.setup
        packed = _CARRY.pack(
            *(_pointer(x) for x in (out["carry"], out["carry_dt"], self.A, start, self.offsets)),
            t.d, t.n, t.k, t.rows, t.m, t.chunk, t.chunks, reverse,
        )  # fmt: skip
        kernel = nvrtc.load(_plan.finish_source(self.s.u.dtype), "scan_carry", t.device)
        kernel.launch(-(-t.rows * t.k * t.n * t.d // 128), 128, packed)

    def launch(self, kernel: str, out: dict, part: int = 0, sums: int = 0, keep: bool = False) -> None:
        """Queue a pass; common.cu and backward.cu explain its numbers."""
        loaded, blocks, threads, sizes = self.setup.kernel(kernel, part, sums, keep)
        pointers = _POINTERS.pack(*self.pointers, *(_pointer(out.get(name)) for name in _OUTPUTS))
        loaded.launch(blocks, threads, pointers + sizes)


class _Setup:
    """What shapes, strides and alignment decide, worked out once for all calls that share them."""

    def __init__(self, s: ScanArgs, rows: list[Tensor | None], order: Tensor):
        b, l, k, d = self.rows_shape = tuple(s.dt.shape)
        self.k, self.d, self.n, self.m, self.rows = k, d, s.A.shape[2], order.shape[2], s.states
        self.device = s.u.get_device()
        self.scale = 1 / k if s.reduce == "mean" else 1.0
        spacing = _spacing(s)
        runs, slots = _kept(s, spacing)
        self.saved_shape = (runs, slots, self.n, d)
        tokens = [x for i, x in enumerate(rows) if x is not None and i not in (2, 3)]
        self.width = 2 if d % 2 == 0 and all(_aligned(x, 2) for x in tokens) else 1
        maps = [x for x in rows[2:4] if x is not None]
        map_width = next(w for w in (4, 2, 1) if self.n % w == 0 and all(_aligned(x, w) for x in maps))
        self.variant = Variant(
            s.u.dtype, s.out_dtype, map_width, spacing, s.dt_softplus, s.z is not None,
            empty=not s.complete and s.offsets is None, exact=self.n == _plan.padded(self.n),
        )  # fmt: skip
        programs = self.rows * k * d
        self.chunk = _plan.chunk_length(programs, self.m, self.n, spacing) if self.rows <= 8 else 0
        self.chunks = max(1, -(-self.m // self.chunk)) if self.chunk else 1
        if self.chunks == 1:
            self.chunk = max(self.m, 1)
        self.programs = programs * self.chunks
        self.launches = {
            "forward": _plan.forward_launch(self.n, d, self.programs, self.width),
            "backward": _plan.fit_shared(
                _plan.backward_launch(self.n, d, self.programs, self.width), spacing, nvrtc.shared_memory(self.device)
            ),
        }
        self.blocks = -(-d // self.launches["backward"].channels)  # of channels, in the backward pass
        self._strides = [stride for x in rows for stride in _strides(x)]
        self._order_strides = (0 if order.shape[0] == 1 else order.stride(0), order.stride(1))
        self._sizes = (b * l * k * self.n, l, k, d, self.n, self.m, self.rows, self.chunk, self.chunks)
        self._slots = slots
        self._kernels: dict[tuple, tuple[nvrtc.Kernel, int, int, bytes]] = {}

    def kernel(self, name: str, part: int, sums: int, keep: bool) -> tuple[nvrtc.Kernel, int, int, bytes]:
        """The compiled kernel, its blocks, threads per block, and what follows the pointers in its argument."""
        key = (name, part, sums, keep)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._load(*key)
        return found

    def _load(self, name: str, part: int, sums: int, keep: bool) -> tuple[nvrtc.Kernel, int, int, bytes]:
        launch = self.launches[name]
        variant = self.variant.with_(part=part, sums=sums, keep=keep)
        blocks = -(-self.d // launch.channels)
        chunks = self.chunks - 1 if part in (1, 3) else self.chunks
        sizes = _SIZES.pack(*self._strides, *self._order_strides, *self._sizes, chunks, blocks, self._slots, self.scale)
        shared = _plan.tile_states(launch, variant.spacing) if name == "backward" else 0
        loaded = nvrtc.load(_plan.source(name, launch, variant), f"scan_{name}", self.device, shared)
        return loaded, self.rows * chunks * self.k * blocks, launch.threads, sizes


def _finish(device: int, dtype: torch.dtype, jobs: list[tuple[int, bool, Tensor, int, int, float]]) -> None:
    """Sums of parts `(outer, count, inner)` over count, in one launch.

    A job is `(address of the parts, whether they are 16-bit, result, count, inner, scale)`.
    """
    packed, first = [], 0
    for part, half, result, count, inner, scale in jobs:
        total = result.numel()
        split = 8 if count >= 16 else 1
        wide = 4 if split == 1 and inner % 4 == 0 else 1
        packed.append(
            _JOB.pack(
                part, result.data_ptr(), total, inner, count, first, half,
                result.dtype != torch.float32, split, wide, scale,
            )
        )  # fmt: skip
        first += -(-total // (256 // split * wide))
    packed.append(bytes(_JOB.size * (_MOST_JOBS - len(jobs))))
    _finish_kernel(device, dtype).launch(first, 256, b"".join(packed))


@lru_cache(maxsize=64)
def _finish_kernel(device: int, dtype: torch.dtype) -> nvrtc.Kernel:
    return nvrtc.load(_plan.finish_source(dtype), "scan_finish", device)


def _spacing(s: ScanArgs) -> int:
    shared = sum(x is not None and x.dim() == 3 for x in (s.u, s.z))
    own = 1 + sum(x is not None and x.dim() == 4 for x in (s.u, s.z))
    return _plan.spacing(s.n, s.u.element_size() * (own + shared / s.k))


def _kept(s: ScanArgs, spacing: int) -> tuple[int, int]:
    """Runs of slots for kept states, and slots per run. The state before the first step is not kept."""
    if s.offsets is None:
        return s.b * s.k, (s.m + spacing - 1) // spacing - 1 if s.m else 0
    return s.k, s.m // spacing + s.offsets.shape[1] - 1


def _unit_rows(x: Tensor) -> Tensor:
    """`x` with neighbouring channels next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Bytes from sample to sample, token to token and direction to direction."""
    if x is None:
        return 0, 0, 0
    size = x.element_size()
    sample, token, *direction = x.stride()[:-1]
    return sample * size, token * size, direction[0] * size if direction else 0


def _aligned(x: Tensor, width: int) -> bool:
    """Whether any `width` neighbours that start at a multiple of `width` can be read at once."""
    return x.data_ptr() % (width * x.element_size()) == 0 and all(stride % width == 0 for stride in x.stride()[:-1])


def _pointer(x: Tensor | int | None) -> int:
    return 0 if x is None else x if isinstance(x, int) else x.data_ptr()

"""The selective scan on NVIDIA GPUs: arguments packed for the kernels of this folder (see docs/kernels.md)."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from .._plans import Plans
from .._scan_args import ScanArgs
from . import _plan, nvrtc
from ._plan import Variant
from ._sums import Sum, Sums
from ._tensors import address, aligned, readable, strides, unreadable

# Args of common.cu in two parts, and Carry of finish.cu.
_POINTERS = struct.Struct("27Q")
_SIZES = struct.Struct("21q11if")
_CARRY = struct.Struct("5Q8i")
_OUTPUTS = (
    "y", "u", "dt", "z", "B", "C", "final", "saved", "A", "D", "dt_bias", "initial_state", "carry", "carry_dt",
)  # fmt: skip  # gradients under the names of their inputs
_ROWS = (0, 1, 2, 3, 4, 5, 9)  # u, dt, B, C, z, dy and the order among the tensors of a call
_setups: Plans[_Setup] = Plans()


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """States that the forward pass keeps for the backward pass, `(runs of slots, slots, n, d)`."""
    runs, slots = _kept(s, _spacing(s))
    return (runs, slots, s.n, s.d)


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, what the backward needs if `save`)`; see `ScanArgs` for the shapes."""
    call = _Call(s)
    setup = call.setup
    # Tokens that no direction visits stay zero.
    zeros = setup.adds_y or not s.complete
    y = (s.u.new_zeros if zeros else s.u.new_empty)(setup.written_shape, dtype=s.out_dtype)
    saved = s.u.new_empty(setup.saved_shape, dtype=torch.float32) if save else None
    final = s.new_state() if want_final else None
    out = {"y": y.data_ptr(), "saved": address(saved), "final": address(final)}
    if setup.chunks == 1:
        call.launch("forward", out, keep=save, added=setup.adds_y)
    else:
        states = call.chunk_states(out)
        call.launch("forward", out, part=1)
        call.carry(states, reverse=False)
        call.launch("forward", out, part=2, keep=save, added=setup.adds_y)
    if setup.written_shape != setup.y_shape:
        whole = s.u.new_empty(setup.y_shape, dtype=s.out_dtype)
        setup.sum_of_directions().launch([(y.data_ptr(), whole.data_ptr())])
        y = whole
    return y, final, saved


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    call = _Call(s, dy, dfinal)
    setup = call.setup
    contiguous = torch.contiguous_format
    written = torch.empty_like if s.complete else torch.zeros_like  # as in the forward pass
    # Directions that share u or z add to one gradient. For the same result every time they write a part each, which the
    # launch at the end sums.
    same = torch.are_deterministic_algorithms_enabled()
    added = 0 if same else setup.added
    grads = {"dt": written(s.dt, memory_format=contiguous)}
    for bit, name, x in ((1, "u", s.u), (4, "z", s.z)):
        if x is not None and added & bit:
            grads[name] = torch.zeros_like(x, memory_format=contiguous)
        elif x is not None:
            grads[name] = written(x if setup.k == 1 else s.dt, memory_format=contiguous)
    if s.initial_state is not None:
        grads["initial_state"] = s.new_state()
    sums = 2 if setup.blocks == 1 else 1 if same else 0
    if sums == 2:
        grads["B"], grads["C"] = (written(x, memory_format=contiguous) for x in (s.B, s.C))
    out = {name: x.data_ptr() for name, x in grads.items()}
    out["saved"] = saved.data_ptr()
    # One tensor holds all parts that are summed at the end. dB and dC have one for every block of channels, or one that
    # the blocks add to unless the result must be the same every time; dA, dD and dbias one for every row and chunk.
    maps = 0 if sums == 2 else setup.maps_size * (setup.blocks if sums == 1 else 1)
    maps += -maps % 4  # sums are read 16 bytes at a time
    channels = setup.rows * setup.chunks * setup.k * setup.d
    zeros = sums == 0 or (sums == 1 and not s.complete)
    parts = (s.u.new_zeros if zeros else s.u.new_empty)(2 * maps + channels * (setup.n + 2), dtype=torch.float32)
    start = parts.data_ptr()
    if sums != 2:
        out["B"], out["C"] = start, start + 4 * maps
    out["A"] = start + 8 * maps
    out["D"] = out["A"] + 4 * channels * setup.n
    out["dt_bias"] = out["D"] + 4 * channels
    if setup.chunks == 1:
        call.launch("backward", out, sums=sums, added=added)
    else:
        states = call.chunk_states(out)
        call.launch("forward", out, part=3)
        call.carry(states, reverse=True)
        call.launch("backward", out, part=2, sums=sums, added=added)
    names, total = setup.sums_of_parts(sums, added)
    results = {name: torch.empty_like(getattr(s, name), memory_format=contiguous) for name in names}
    total.launch([(out[name], x.data_ptr()) for name, x in results.items()])
    return grads | results  # only now may the memory of the parts be used again


class _Call:
    """One problem: its tensors as the kernels can read them, and the setup that serves their layout."""

    def __init__(self, s: ScanArgs, dy: Tensor | None = None, dfinal: Tensor | None = None):
        self.s = s
        given = (s.u, s.dt, s.B, s.C, s.z, dy, s.A, s.D, s.dt_bias, s.order, s.offsets, s.initial_state, dfinal)
        pointers = [0 if x is None else x.data_ptr() for x in given]
        a, b, c, d, e, f = pointers[:6]
        # Strides say which tensors are given and how many dimensions they have. Written for speed: one call makes two.
        key = (
            *[None if x is None else x.stride() for x in given], s.dt.shape, s.A.shape, s.order.shape,
            None if s.offsets is None else s.offsets.shape, s.u.dtype, s.out_dtype, s.dt_softplus, s.reduce, s.complete,
            s.u.get_device(), (a | b | e | f) & 15, (c | d) & 15,
        )  # fmt: skip
        setup = _setups.get(key)
        if setup is None:
            setup = _setups.keep(key, _Setup(s, given))
        if setup.copied:
            given = readable(given, setup.copied)
            pointers = [0 if x is None else x.data_ptr() for x in given]
        self.setup, self.given, self.pointers = setup, given, pointers  # copies live until the kernels are queued

    def chunk_states(self, out: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Room for the state of every chunk and its summed step size, added to the outputs."""
        setup, new = self.setup, self.s.u.new_empty
        shape = (setup.rows, setup.k, setup.chunks, setup.n, setup.d)
        states = new(shape, dtype=torch.float32), new((*shape[:3], setup.d), dtype=torch.float32)
        out["carry"], out["carry_dt"] = (x.data_ptr() for x in states)
        return states

    def carry(self, states: tuple[Tensor, Tensor], reverse: bool) -> None:
        """States at the beginnings of chunks, or gradients at their ends, from what `part` 1 or 3 wrote."""
        t, (*_, A, _, _, _, offsets, initial, dfinal) = self.setup, self.pointers
        packed = _CARRY.pack(
            states[0].data_ptr(), states[1].data_ptr(), A, dfinal if reverse else initial, offsets,
            t.d, t.n, t.k, t.rows, t.m, t.chunk, t.chunks, reverse,
        )  # fmt: skip
        kernel = nvrtc.load(_plan.finish_source(self.s.u.dtype), "scan_carry", t.device)
        kernel.launch(-(-t.rows * t.k * t.n * t.d // 128), 128, packed)

    def launch(
        self, kernel: str, out: dict[str, int], part: int = 0, sums: int = 0, added: int = 0, keep: bool = False
    ) -> None:
        """Queue a pass; common.cu and backward.cu explain its numbers."""
        loaded, blocks, threads, sizes = self.setup.kernel(kernel, part, sums, added, keep)
        pointers = _POINTERS.pack(*self.pointers, *[out.get(name, 0) for name in _OUTPUTS])
        loaded.launch(blocks, threads, pointers + sizes)


class _Setup:
    """What shapes, strides and alignment decide, worked out once for all calls that share them."""

    def __init__(self, s: ScanArgs, given: tuple[Tensor | None, ...]):
        self.copied = unreadable(given, _ROWS)
        given = readable(given, self.copied)
        rows, order = given[:6], s.order
        b, l, k, d = self.rows_shape = tuple(s.dt.shape)
        self.k, self.d, self.n, self.m, self.rows = k, d, s.A.shape[2], order.shape[2], s.states
        self.device, self.dtype, self.out_dtype = s.u.get_device(), s.u.dtype, s.out_dtype
        self.scale = 1 / k if s.reduce == "mean" else 1.0
        spacing = _spacing(s)
        runs, slots = _kept(s, spacing)
        self.saved_shape = (runs, slots, self.n, d)
        self.maps_size = s.B.numel()
        self.y_shape = s.y_shape
        can_add = _plan.adds_directions(k, nvrtc.capability(self.device))
        # The sum of two is the same in any turn, so y is the same in every run.
        self.adds_y = int(can_add and k == 2 and self.y_shape != self.rows_shape)
        self.written_shape = self.rows_shape if k > 1 and not self.adds_y else self.y_shape
        self.u_shared, self.z_shared = (k > 1 and x is not None and x.dim() == 3 for x in (s.u, s.z))
        self.added = self.u_shared + 4 * self.z_shared if can_add else 0
        self.per_channel = [name for name in ("D", "dt_bias") if getattr(s, name) is not None]
        self._directions: Sums | None = None
        self._sums: dict[tuple[int, int], tuple[tuple[str, ...], Sums]] = {}
        tokens = [x for i, x in enumerate(rows) if x is not None and i not in (2, 3)]
        # Neighbouring channels that are read as one word.
        chunk = next(
            w for w in (8, 4, 2, 1) if w * s.u.itemsize <= 16 and d % w == 0 and all(aligned(x, w) for x in tokens)
        )
        self.width = min(2, chunk)
        maps = [x for x in rows[2:4] if x is not None]
        map_width = next(w for w in (4, 2, 1) if self.n % w == 0 and all(aligned(x, w) for x in maps))
        self.variant = Variant(
            s.u.dtype, s.out_dtype, map_width, chunk, spacing, s.dt_softplus, s.z is not None,
            empty=not s.complete and s.offsets is None, exact=self.n == _plan.padded(self.n),
        )  # fmt: skip
        programs = self.rows * k * d
        self.chunk = _plan.chunk_length(programs, self.m, self.n, spacing) if self.rows <= 8 else 0
        self.chunks = max(1, -(-self.m // self.chunk)) if self.chunk else 1
        if self.chunks == 1:
            self.chunk = max(self.m, 1)
        self.programs = programs * self.chunks
        limit = nvrtc.shared_memory(self.device)
        self.launches = {
            name: _plan.fit_shared(name, choose(self.n, d, self.programs, self.width), self.variant, limit)
            for name, choose in (("forward", _plan.forward_launch), ("backward", _plan.backward_launch))
        }
        self.blocks = -(-d // self.launches["backward"].channels)  # of channels, in the backward pass
        self._strides = [stride for x in rows for stride in strides(x)]
        self._order_strides = (0 if order.shape[0] == 1 else order.stride(0), order.stride(1))
        self._sizes = (b * l * k * self.n, l, k, d, self.n, self.m, self.rows, self.chunk, self.chunks)
        self._slots = slots
        self._kernels: dict[tuple, tuple[nvrtc.Kernel, int, int, bytes]] = {}

    def kernel(self, name: str, part: int, sums: int, added: int, keep: bool) -> tuple[nvrtc.Kernel, int, int, bytes]:
        """The compiled kernel, its blocks, threads per block, and what follows the pointers in its argument."""
        key = (name, part, sums, added, keep)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._load(*key)
        return found

    def _load(self, name: str, part: int, sums: int, added: int, keep: bool) -> tuple[nvrtc.Kernel, int, int, bytes]:
        launch = self.launches[name]
        variant = self.variant.with_(part=part, sums=sums, added=added, keep=keep)
        blocks = -(-self.d // launch.channels)
        chunks = self.chunks - 1 if part in (1, 3) else self.chunks
        sizes = _SIZES.pack(*self._strides, *self._order_strides, *self._sizes, chunks, blocks, self._slots, self.scale)
        shared = _plan.shared_memory(name, launch, variant)
        loaded = nvrtc.load(_plan.source(name, launch, variant), f"scan_{name}", self.device, shared)
        return loaded, self.rows * chunks * self.k * blocks, launch.threads, sizes

    def sum_of_directions(self) -> Sums:
        """The launch that makes y of the outputs of every direction."""
        if self._directions is None:
            half = self.out_dtype != torch.float32
            total = math.prod(self.y_shape)
            self._directions = Sums([Sum(half, half, total, self.k, self.d, self.scale)], self.out_dtype, self.device)
        return self._directions

    def sums_of_parts(self, sums: int, added: int) -> tuple[tuple[str, ...], Sums]:
        """Gradients that the backward kernel writes in parts: their names, and the launch that sums the parts."""
        found = self._sums.get((sums, added))
        if found is None:
            found = self._sums[sums, added] = self._plan_sums(sums, added)
        return found

    def _plan_sums(self, sums: int, added: int) -> tuple[tuple[str, ...], Sums]:
        half, runs, channels = self.dtype != torch.float32, self.rows * self.chunks, self.k * self.d
        tokens, maps = math.prod(self.rows_shape) // self.k, self.maps_size
        jobs: dict[str, Sum] = {}
        for name, parts in (("u", self.u_shared and not added & 1), ("z", self.z_shared and not added & 4)):
            if parts:
                jobs[name] = Sum(half, half, tokens, self.k, self.d)
        if sums != 2:
            count = self.blocks if sums == 1 else 1
            jobs["B"] = jobs["C"] = Sum(False, half, maps, count, maps)
        jobs["A"] = Sum(False, False, channels * self.n, runs, channels * self.n)
        for name in self.per_channel:
            jobs[name] = Sum(False, False, channels, runs, channels)
        return tuple(jobs), Sums(list(jobs.values()), self.dtype, self.device)


def _spacing(s: ScanArgs) -> int:
    shared = sum(x is not None and x.dim() == 3 for x in (s.u, s.z))
    own = 1 + sum(x is not None and x.dim() == 4 for x in (s.u, s.z))
    return _plan.spacing(s.n, s.u.element_size() * (own + shared / s.k))


def _kept(s: ScanArgs, spacing: int) -> tuple[int, int]:
    """Runs of slots for kept states, and slots per run. The state before the first step is not kept."""
    if s.offsets is None:
        return s.b * s.k, (s.m + spacing - 1) // spacing - 1 if s.m else 0
    return s.k, s.m // spacing + s.offsets.shape[1] - 1

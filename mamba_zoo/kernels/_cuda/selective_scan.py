"""The selective scan on NVIDIA GPUs: arguments packed for the kernels of this folder (see docs/kernels.md)."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from .._scan_args import ScanArgs
from . import _plan, nvrtc
from ._plan import Launch, Variant

# Args of common.cu, Carry and Job of finish.cu.
_ARGS = struct.Struct("27Q21q11if")
_CARRY = struct.Struct("5Q8i")
_JOB = struct.Struct("2Q2q6if4x")
_MOST_JOBS = 8


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """States that the forward pass keeps for the backward pass, `(runs of slots, slots, n, d)`."""
    runs, slots = _kept(s, _spacing(s))
    return (runs, slots, s.n, s.d)


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, what the backward needs if `save`)`; see `ScanArgs` for the shapes."""
    call = _Call(s)
    b, l, k, d = s.dt.shape
    saved = s.u.new_empty(saved_shape(s), dtype=torch.float32) if save else None
    final = s.new_state() if want_final else None
    parts = s.reduce != "none" and k > 1
    y = call.zeros_unless_complete((b, l, k, d) if parts else s.y_shape, s.out_dtype)
    call.run_forward(y, saved, final)
    if parts:
        whole = s.u.new_empty(s.y_shape, dtype=s.out_dtype)
        _finish(call.device, s.out_dtype, [(y, whole, k, d, 1 / k if s.reduce == "mean" else 1.0)])
        y = whole
    return y, final, saved


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    return _Call(s, dy, dfinal).run_backward(saved)


class _Call:
    """One problem: inputs made readable for the kernels, and the variant that serves it."""

    def __init__(self, s: ScanArgs, dy: Tensor | None = None, dfinal: Tensor | None = None):
        self.s = s
        self.b, self.l, self.k, self.d = s.dt.shape
        self.n, self.m, self.rows = s.A.shape[2], s.order.shape[2], s.states
        self.u, self.dt, self.B, self.C = _unit_rows(s.u), _unit_rows(s.dt), _unit_rows(s.B), _unit_rows(s.C)
        self.z = None if s.z is None else _unit_rows(s.z)
        self.dy = None if dy is None else _unit_rows(dy)
        self.A, self.D, self.bias, self.initial, self.dfinal = (
            None if x is None else x.contiguous() for x in (s.A, s.D, s.dt_bias, s.initial_state, dfinal)
        )
        self.order = s.order if s.order.stride(2) == 1 or self.m == 1 else s.order.contiguous()
        self.offsets = None if s.offsets is None else s.offsets.contiguous()
        self.device = s.u.get_device()
        self.spacing = _spacing(s)
        self.kept = _kept(s, self.spacing)
        tokens = [x for x in (self.u, self.dt, self.z, self.dy) if x is not None]
        self.strides = [_strides(x) for x in (self.u, self.dt, self.B, self.C, self.z, self.dy)]
        self.width = 2 if self.d % 2 == 0 and all(_aligned(x, 2) for x in tokens) else 1
        map_width = next(w for w in (4, 2, 1) if self.n % w == 0 and _aligned(self.B, w) and _aligned(self.C, w))
        self.variant = Variant(
            s.u.dtype, s.out_dtype, map_width, self.spacing, s.dt_softplus, s.z is not None,
            empty=not s.complete and s.offsets is None, exact=self.n == _plan.padded(self.n),
        )  # fmt: skip
        programs = self.rows * self.k * self.d
        self.chunk = _plan.chunk_length(programs, self.m, self.n, self.spacing) if self.rows <= 8 else 0
        self.chunks = max(1, -(-self.m // self.chunk)) if self.chunk else 1
        if self.chunks == 1:
            self.chunk = max(self.m, 1)
        self.programs = programs * self.chunks

    def zeros_unless_complete(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output of the kernels: tokens that no direction visits stay zero."""
        make = self.s.u.new_empty if self.s.complete else self.s.u.new_zeros
        return make(shape, dtype=dtype)

    def run_forward(self, y: Tensor, saved: Tensor | None, final: Tensor | None) -> None:
        launch = _plan.forward_launch(self.n, self.d, self.programs, self.width)
        outputs = {"y": y, "saved": saved, "final": final}
        variant = self.variant.with_(keep=saved is not None)
        if self.chunks == 1:
            return self.launch("forward", launch, variant, outputs)
        outputs |= self.chunk_states()
        self.launch("forward", launch, self.variant.with_(part=1), outputs, chunks=self.chunks - 1)
        self.carry(outputs, self.initial, reverse=False)
        return self.launch("forward", launch, variant.with_(part=2), outputs)

    def run_backward(self, saved: Tensor) -> dict[str, Tensor]:
        s, b, l, k, d, n = self.s, self.b, self.l, self.k, self.d, self.n
        launch = _plan.backward_launch(n, d, self.programs, self.width)
        blocks = -(-d // launch.channels)
        sums = 2 if blocks == 1 else 1 if torch.are_deterministic_algorithms_enabled() else 0
        dtype, exact = s.u.dtype, torch.float32
        out: dict[str, Tensor | None] = {"saved": saved}
        out["du"] = self.zeros_unless_complete((b, l, k, d), dtype)
        out["ddt"] = self.zeros_unless_complete((b, l, k, d), dtype)
        out["dz"] = None if s.z is None else self.zeros_unless_complete((b, l, k, d), dtype)
        if sums == 0:
            out["dB"], out["dC"] = s.u.new_zeros((2, 1, b, l, k, n), dtype=exact)
        else:
            shape, kind = (blocks, b, l, k, n), exact if sums == 1 else dtype
            out["dB"], out["dC"] = (self.zeros_unless_complete(shape, kind) for _ in range(2))
        runs = self.rows * self.chunks
        sizes = (runs * k * d * n, runs * k * d, runs * k * d)
        partial = s.u.new_empty(sum(sizes), dtype=exact)
        out["dA"], out["dD"], out["dbias"] = partial.split(sizes)
        out["dinitial"] = None if s.initial_state is None else s.new_state()
        variant = self.variant.with_(sums=sums)
        if self.chunks > 1:
            out |= self.chunk_states()
            walk = _plan.forward_launch(n, d, self.programs, self.width)
            self.launch("forward", walk, self.variant.with_(part=3), out, chunks=self.chunks - 1)
            self.carry(out, self.dfinal, reverse=True)
            variant = variant.with_(part=2)
        self.launch("backward", launch, variant, out)
        return self.gather(out, sums)

    def gather(self, out: dict, sums: int) -> dict[str, Tensor]:
        """The gradients, from what the backward kernel wrote per direction, row, chunk and block."""
        s, k, d, n = self.s, self.k, self.d, self.n
        grads: dict[str, Tensor] = {"dt": out["ddt"]}
        jobs = []

        def add(name: str, part: Tensor, like: Tensor, count: int, inner: int) -> None:
            grads[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
            jobs.append((part, grads[name], count, inner, 1.0))

        for name, part in (("u", out["du"]), ("z", out["dz"])):
            given = getattr(s, name)
            if given is not None and (given.dim() == 4 or k == 1):
                grads[name] = part.view(given.shape)
            elif given is not None:
                add(name, part, given, k, d)
        for name, part in (("B", out["dB"]), ("C", out["dC"])):
            if sums == 2:
                grads[name] = part[0]
            else:
                add(name, part, getattr(s, name), len(part), part[0].numel())
        runs = self.rows * self.chunks
        add("A", out["dA"], s.A, runs, k * d * n)
        for name, part in (("D", out["dD"]), ("dt_bias", out["dbias"])):
            if getattr(s, name) is not None:
                add(name, part, getattr(s, name), runs, k * d)
        if s.initial_state is not None:
            grads["initial_state"] = out["dinitial"]
        _finish(self.device, s.u.dtype, jobs)
        return grads

    def chunk_states(self) -> dict[str, Tensor]:
        """Room for the state of every chunk and its summed step size."""
        shape = (self.rows, self.k, self.chunks, self.n, self.d)
        new = self.s.u.new_empty
        return {"carry": new(shape, dtype=torch.float32), "carry_dt": new((*shape[:3], self.d), dtype=torch.float32)}

    def carry(self, out: dict, start: Tensor | None, reverse: bool) -> None:
        packed = _CARRY.pack(
            out["carry"].data_ptr(), out["carry_dt"].data_ptr(), _pointer(self.A), _pointer(start),
            _pointer(self.offsets), self.d, self.n, self.k, self.rows, self.m, self.chunk, self.chunks, reverse,
        )  # fmt: skip
        kernel = nvrtc.load(_plan.finish_source(self.s.u.dtype), "scan_carry", self.device)
        kernel.launch(-(-self.rows * self.k * self.n * self.d // 128), 128, packed)

    def launch(self, kernel: str, launch: Launch, variant: Variant, out: dict, chunks: int | None = None) -> None:
        s, chunks = self.s, self.chunks if chunks is None else chunks
        blocks = -(-self.d // launch.channels)
        pointer = _pointer
        packed = _ARGS.pack(
            pointer(self.u), pointer(self.dt), pointer(self.B), pointer(self.C), pointer(self.z), pointer(self.dy),
            pointer(self.A), pointer(self.D), pointer(self.bias), pointer(self.order), pointer(self.offsets),
            pointer(self.initial), pointer(self.dfinal),
            *(pointer(out.get(name)) for name in _OUTPUTS),
            *(stride for strides in self.strides for stride in strides),
            0 if self.order.shape[0] == 1 else self.order.stride(0), self.order.stride(1),
            self.b * self.l * self.k * self.n,
            self.l, self.k, self.d, self.n, self.m, self.rows, self.chunk, self.chunks, chunks, blocks, self.kept[1],
            1 / self.k if s.reduce == "mean" else 1.0,
        )  # fmt: skip
        shared = 0
        if kernel == "backward" and variant.spacing > launch.tile:
            shared = variant.spacing // launch.tile * launch.states * launch.channels * 4
        loaded = _load(kernel, launch, variant, self.device, shared)
        loaded.launch(self.rows * chunks * self.k * blocks, launch.threads, packed)


_OUTPUTS = (
    "y", "du", "ddt", "dz", "dB", "dC", "final", "saved", "dA", "dD", "dbias", "dinitial", "carry", "carry_dt",
)  # fmt: skip


@lru_cache(maxsize=4096)
def _load(kernel: str, launch: Launch, variant: Variant, device: int, shared: int) -> nvrtc.Kernel:
    return nvrtc.load(_plan.source(kernel, launch, variant), f"scan_{kernel}", device, shared)


def _finish(device: int, dtype: torch.dtype, jobs: list[tuple[Tensor, Tensor, int, int, float]]) -> None:
    """Sums of parts `(outer, count, inner)` over count, `(parts, result, count, inner, scale)` each, in one launch."""
    packed, first = [], 0
    for part, result, count, inner, scale in jobs:
        total = result.numel()
        split = 8 if count >= 16 else 1
        wide = 4 if split == 1 and inner % 4 == 0 else 1
        packed.append(
            _JOB.pack(
                part.data_ptr(), result.data_ptr(), total, inner, count, first, part.dtype != torch.float32,
                result.dtype != torch.float32, split, wide, scale,
            )
        )  # fmt: skip
        first += -(-total // (256 // split * wide))
    packed.append(bytes(_JOB.size * (_MOST_JOBS - len(jobs))))
    nvrtc.load(_plan.finish_source(dtype), "scan_finish", device).launch(first, 256, b"".join(packed))


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


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()

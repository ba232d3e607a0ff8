"""What a selective scan was given while a model ran, and the implicit attention it amounts to (arXiv:2403.01590)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ARGUMENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "order", "offsets", "initial_state", "dt_softplus")


@dataclass(frozen=True, eq=False)
class RecordedScan:
    """The inputs of one selective scan, and what follows from them.

    A scan is linear in its tokens `u`: in direction k, `y = M u` for every channel, with
    `M[t, s] = sum over states of C_t * exp(A * (steps s+1 to t)) * step_s * B_s` where s is visited before t or is t,
    zero elsewhere. A row of M is what attention would call the weights of a query. Gates, norms and the sum over
    directions come after it. All results are float64, in token order, not in visiting order.

    Attributes:
        name: Of the module that ran the scan, such as "stages.0.blocks.1.mixer.ssm".
        u: Tokens `(b, l, d)` or `(b, l, k, d)`.
        dt: Steps before bias and softplus, `(b, l, k, d)`.
        A: Decay rates `(k, d, n)`.
        B: `(b, l, k, n)`.
        C: `(b, l, k, n)`.
        D: Skip weights `(k, d)` or None.
        dt_bias: `(k, d)` or None.
        dt_softplus: Whether steps passed through softplus.
        order: `(1 | b, k, m)`: which entry of the inputs a direction read at each step; -1 is an empty step.
        places: `(1 | b, k, m)`: the token that this entry belongs to. Another table than `order` only where a model
            moves its tokens before the scan, as PlainMamba does.
        grid: Height and width of the tokens if they are known to lie on a grid.
        extra: Index of a class token among the tokens, if there is one.
    """

    name: str
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    order: Tensor
    places: Tensor
    grid: tuple[int, int] | None = None
    extra: int | None = None

    @property
    def k(self) -> int:
        """Directions."""
        return self.A.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens l, a class token and padding included."""
        return self.dt.shape[1]

    def weights(self, query: int, sample: int = 0, absolute: bool = True) -> Tensor:
        """Row `query` of the implicit attention of every direction, averaged over channels, without the skip `D`.

        Args:
            query: The token whose output is looked at.
            sample: Of the batch.
            absolute: Average magnitudes; channels of opposite signs cancel otherwise.

        Returns:
            `(k, l)`: what each token adds to the query's output, per unit of its own value. Zero for tokens that a
            direction visits later or never; a direction that never visits the query is zero throughout.

        Raises:
            ValueError: no such token or sample.
        """
        if not 0 <= query < self.tokens:
            raise ValueError(f"query={query} is no token; there are {self.tokens}")
        rows = torch.zeros(self.k, self.tokens, dtype=torch.float64)
        for direction in range(self.k):
            path = self._path(direction, sample)
            steps = (path.places == query).nonzero()
            if len(steps):
                row = path.row(int(steps[0]))
                rows[direction] = path.put((row.abs() if absolute else row).mean(1, keepdim=True), self.tokens)[:, 0]
        return rows

    def matrix(self, direction: int, channels: Sequence[int], sample: int = 0, skip: bool = True) -> Tensor:
        """The whole matrix of one direction, for some channels; times `u` it gives the scan's output.

        Args:
            direction: From 0 to k - 1.
            channels: Which.
            sample: Of the batch.
            skip: Whether `D` is added to the diagonal.

        Returns:
            `(len(channels), l, l)`: query, then key.
        """
        path = self._path(direction, sample, channels)
        whole = torch.zeros(self.tokens, self.tokens, len(channels), dtype=torch.float64)
        for step, place in enumerate(path.places.tolist()):
            if place >= 0:
                row = path.row(step)
                if skip and path.D is not None:
                    row[step] += path.D
                whole[place] = path.put(row, self.tokens)
        return whole.permute(2, 0, 1)

    def states(self, sample: int = 0) -> Tensor:
        """Norm of the state, over channels and states, after each token of each direction: `(k, l)`; 0 if unvisited."""
        norms = torch.zeros(self.k, self.tokens, dtype=torch.float64)
        for direction in range(self.k):
            path = self._path(direction, sample)
            u = (self.u if self.u.dim() == 3 else self.u[:, :, direction])[sample].double().cpu()
            drive = (path.delta * path.read(u))[:, :, None] * path.B[:, None]
            h, found = torch.zeros_like(path.A), []
            for step in range(len(path.places)):
                h = torch.exp(path.delta[step, :, None] * path.A) * h + drive[step]
                found.append(h.norm())
            norms[direction] = path.put(torch.stack(found)[:, None], self.tokens)[:, 0]
        return norms

    def steps(self, sample: int = 0) -> Tensor:
        """Step size at each token of each direction, averaged over channels: `(k, l)`; zero if unvisited."""
        paths = [self._path(direction, sample) for direction in range(self.k)]
        return torch.stack([path.put(path.delta.mean(1, keepdim=True), self.tokens)[:, 0] for path in paths])

    def as_maps(self, values: Tensor) -> Tensor:
        """Values of tokens `(k, l)` on the grid, `(k, height, width)`; a class token and padding are left out.

        Raises:
            ValueError: the grid is not known.
        """
        if self.grid is None:
            raise ValueError(f"the {self.tokens} tokens of {self.name} are not known to lie on a grid of an image")
        kept = [i for i in range(self.tokens) if i != self.extra][: math.prod(self.grid)]
        return values[:, kept].unflatten(1, self.grid)

    def token_at(self, row: int, column: int) -> int:
        """Index of the token at a place of the grid."""
        if self.grid is None or not (0 <= row < self.grid[0] and 0 <= column < self.grid[1]):
            raise ValueError(f"({row}, {column}) is no place of the grid {self.grid} of {self.name}")
        index = row * self.grid[1] + column
        return index if self.extra is None or index < self.extra else index + 1

    def _path(self, direction: int, sample: int, channels: Sequence[int] | None = None) -> _Path:
        if not 0 <= sample < len(self.dt) or not 0 <= direction < self.k:
            raise ValueError(f"direction={direction}, sample={sample}: there are {self.k} and {len(self.dt)}")
        return _Path(self, direction, sample, channels)


class _Path:
    """One direction through one sample: steps, B and C in visiting order, `(m, ...)`, float64 on the CPU."""

    def __init__(self, scan: RecordedScan, direction: int, sample: int, channels: Sequence[int] | None):
        pick = slice(None) if channels is None else torch.as_tensor(list(channels))
        self.order = scan.order[sample if len(scan.order) > 1 else 0, direction].long().cpu()
        self.places = scan.places[sample if len(scan.places) > 1 else 0, direction].long().cpu()
        raw = self.read(scan.dt[sample, :, direction].double().cpu())[:, pick]
        if scan.dt_bias is not None:
            raw = raw + scan.dt_bias[direction].double().cpu()[pick]
        self.delta = F.softplus(raw) if scan.dt_softplus else raw
        self.time = self.delta.cumsum(0)
        self.A = scan.A[direction].double().cpu()[pick]
        self.B, self.C = (self.read(x[sample, :, direction].double().cpu()) for x in (scan.B, scan.C))
        self.D = None if scan.D is None else scan.D[direction].double().cpu()[pick]

    def read(self, x: Tensor) -> Tensor:
        """Entries `(l, c)` in visiting order `(m, c)`; zeros at empty steps."""
        return F.pad(x, (0, 0, 0, 1))[self.order]

    def put(self, x: Tensor, tokens: int) -> Tensor:
        """Steps `(m, c)` at their tokens `(l, c)`."""
        whole = x.new_zeros(tokens + 1, x.shape[1])  # the last place takes the empty steps
        whole[self.places] = x
        return whole[:-1]

    def row(self, step: int) -> Tensor:
        """Weights `(m, d)` with which the inputs of all steps enter the output of `step`, without the skip."""
        passed = self.time[step] - self.time[: step + 1]
        decay = torch.exp(self.A * passed[:, :, None])
        weights = torch.einsum("sdn,sn,n->sd", decay, self.B[: step + 1], self.C[step]) * self.delta[: step + 1]
        return F.pad(weights, (0, 0, 0, len(self.places) - step - 1))


@dataclass
class _Recorder(TorchDispatchMode):
    """Sees every call of the scan, and knows which module makes it."""

    model: nn.Module
    scans: list[RecordedScan] = field(default_factory=list)
    stack: list[tuple[str, nn.Module, tuple[Any, ...]]] = field(default_factory=list)
    patches: tuple[int, int] | None = None  # grid of a model of one token sequence

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mamba_zoo.selective_scan.default:
            self.add(dict(zip(_ARGUMENTS, args, strict=False)))
        return func(*args, **(kwargs or {}))

    def add(self, given: dict[str, Any]) -> None:
        if given["offsets"] is not None or given["initial_state"] is not None:
            raise ValueError("record_scans takes no packed sequences or initial states; run the samples one by one")
        name, module, inputs = self.stack[-1]
        kept: dict[str, Any] = {key: x.detach() if isinstance(x, Tensor) else x for key, x in given.items()}
        order = places = kept.pop("order")
        if getattr(module, "aligned", True) is False:  # moved its tokens along the order that it was given
            places = inputs[1][None]
        for key in ("z", "offsets", "initial_state"):
            kept.pop(key)
        tokens = kept["dt"].shape[1]
        grid, extra = self.place(tokens)
        self.scans.append(RecordedScan(name, **kept, order=order, places=places, grid=grid, extra=extra))

    def place(self, tokens: int) -> tuple[tuple[int, int] | None, int | None]:
        """The grid of the tokens and the index of a class token, each None if there is none or it is not known."""
        model: Any = self.model
        if self.patches is not None and hasattr(model, "class_index"):
            if getattr(model, "num_frames", None) is not None:
                return None, None
            extra = model.class_index(math.prod(self.patches) + 1)
            # What is more than these is padding of windows.
            return (self.patches, extra) if math.prod(self.patches) + (extra is not None) <= tokens else (None, None)
        for _, module, inputs in reversed(self.stack[:-1]):  # what runs the scan itself may take (b, l, k, d)
            side = getattr(module, "side", None)
            if isinstance(side, int) and side * side == tokens:
                return (side, side), None
            # Maps of this package are channels-last throughout.
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4:
                grid = (inputs[0].shape[1], inputs[0].shape[2])
                if math.prod(grid) == tokens:
                    return grid, None
        return None, None

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.stack.append((name, module, inputs))

    def leave(self, name: str, output: Any) -> None:
        self.stack.pop()
        if name == "patch_embed" and isinstance(output, Tensor) and output.dim() == 4:
            self.patches = (output.shape[1], output.shape[2])


@contextmanager
def record_scans(model: nn.Module) -> Iterator[list[RecordedScan]]:
    """Within the block, keep what every selective scan of `model` is given.

    Works with any backend and any scan; not inside `torch.compile`. Everything is kept in memory until the list is
    dropped: pass one image at a time.

    Args:
        model: Any that uses the scan of this package.

    Yields:
        The scans in the order in which they ran.

    Example:
        >>> import torch, mamba_zoo
        >>> model = mamba_zoo.create_model("vmamba_mini", depths=(1, 1)).eval()
        >>> with torch.no_grad(), record_scans(model) as scans:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> scans[0].name, scans[0].grid, scans[0].as_maps(scans[0].weights(query=100)).shape
        ('stages.0.blocks.0.mixer.ssm', (16, 16), torch.Size([4, 16, 16]))
    """
    recorder = _Recorder(model)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: recorder.enter(name, m, x)))
        hooks.append(module.register_forward_hook(lambda m, x, y, name=name: recorder.leave(name, y)))
    try:
        with recorder:
            yield recorder.scans
    finally:
        for hook in hooks:
            hook.remove()

"""The selective scan on the CPU: float32 loops compiled by numba, several threads.

Half-precision tensors are converted by torch before and after. Deterministic: every work item owns what it writes, and
how sums are cut depends on the shapes alone, so any number of threads gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._scan_args import ScanArgs
from . import _scan_forward
from ._scan_forward import TILE
from ._simd import W
from ._tensors import address, new, plain, rows, token_rows, visits, zero_row


def saved_shape(s: ScanArgs) -> tuple[int, ...]:
    """The state before every tile of steps: `(b, k, tiles, blocks of channels, n, lanes)`."""
    return s.b, s.k, _tiles(s), _blocks(s), s.n, W


def forward(s: ScanArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final state if wanted, states at tile starts if `save`)`; see `ScanArgs` for the shapes."""
    u, dt, B, C, z = _tokens(s)
    _, _, k, d = s.dt.shape
    n, rows_of_state, blocks = s.n, s.states, _blocks(s)
    y = new(s.y_shape, s.complete)
    final = s.new_state() if want_final else None
    saved = torch.empty(saved_shape(s)) if save else None
    reduced = s.reduce != "none"
    split = not reduced or k == 1
    A, D, bias, initial = (plain(x) for x in (s.A, s.D, s.dt_bias, s.initial_state))
    chains = rows_of_state * (k if split else 1)  # that run side by side, for each block of channels
    arguments = {
        "rows": rows_of_state, "blocks": blocks, "split": split, "k": k, "d": d, "n": n, "m": s.m,
        "softplus": s.dt_softplus, "mean": s.reduce == "mean", "add": reduced, "complete": s.complete,
        "tiles": _tiles(s), "A": address(A), "D": address(D), "bias": address(bias), "initial": address(initial),
        "final": address(final), "saved": address(saved), "zeros": address(zero_row(n)), "offsets": address(s.offsets),
        **visits(s.order),
        **rows("u", u), **rows("dt", dt), **rows("z", z), **rows("B", B), **rows("C", C), **rows("y", y),
    }  # fmt: skip
    if n == 1:
        from . import _scan_single

        # Two vectors an item are a fifth faster, if enough items are left to share out evenly.
        width = 2 if chains * -(-blocks // 2) >= 4 * torch.get_num_threads() else 1
        _scan_single.kernel(items=chains * -(-blocks // width), scratch_floats=0, width=width, **arguments)
    else:
        _scan_forward.kernel(items=chains * blocks, scratch_floats=_scan_forward.scratch_floats(n), **arguments)
    return y if s.out_dtype == torch.float32 else y.to(s.out_dtype), final, saved


def backward(s: ScanArgs, dy: Tensor, dfinal: Tensor | None, saved: Tensor) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    from . import _scan_backward

    u, dt, B, C, z = _tokens(s)
    dy = token_rows(dy)
    A, D, bias, dfinal = (plain(x) for x in (s.A, s.D, s.dt_bias, dfinal))
    du, ddt = new(tuple(s.u.shape), s.complete), new(tuple(s.dt.shape), s.complete)
    dz = None if s.z is None else new(tuple(s.z.shape), s.complete)
    dinitial = None if s.initial_state is None else torch.empty(s.initial_state.shape)
    share_u, share_z = s.u.dim() == 3, s.z is not None and s.z.dim() == 3
    split = s.k == 1 or not (share_u or share_z)
    row_groups, width = _cut(s, split)
    groups = -(-_blocks(s) // width)
    dB, dC = (new((groups, *s.B.shape), s.complete) for _ in range(2))
    dA = torch.empty(row_groups, *s.A.shape)
    dD, dbias = (torch.empty(row_groups, s.k, s.d) for _ in range(2))
    _scan_backward.kernel(
        items=row_groups * groups * (s.k if split else 1), scratch_floats=_scan_backward.scratch_floats(s.n, width),
        rows=s.states, row_groups=row_groups, blocks=_blocks(s), groups=groups, width=width, split=split,
        b=s.b, l=s.l, k=s.k, d=s.d, n=s.n, m=s.m, softplus=s.dt_softplus, mean=s.reduce == "mean",
        complete=s.complete, tiles=_tiles(s), zeros=address(zero_row(s.n)), share_u=share_u, share_z=share_z,
        A=address(A), D=address(D), bias=address(bias), offsets=address(s.offsets), saved=address(saved),
        dfinal=address(dfinal), dinitial=address(dinitial), dA=address(dA), dD=address(dD), dbias=address(dbias),
        dB=address(dB), dC=address(dC), **visits(s.order),
        **rows("u", u), **rows("dt", dt), **rows("z", z), **rows("B", B), **rows("C", C), **rows("dy", dy),
        **rows("du", du), **rows("ddt", ddt), **rows("dz", dz),
    )  # fmt: skip
    grads = {"u": du, "dt": ddt, "z": dz, "initial_state": dinitial}
    grads |= {"A": dA.sum(0), "B": dB.sum(0), "C": dC.sum(0), "D": dD.sum(0), "dt_bias": dbias.sum(0)}
    return {name: grads[name].to(x.dtype) for name, x in s.differentiable().items()}


def _cut(s: ScanArgs, split: bool) -> tuple[int, int]:
    """Groups of rows, and channel blocks per work item, of the backward: by shape alone, so that results are too."""
    row_groups = min(s.states, 32)  # 0 of a batch without samples, which has no items
    wanted = -(-16 // max(row_groups * (s.k if split else 1), 1))  # enough items for a laptop's cores
    return row_groups, -(-_blocks(s) // wanted)


def _tokens(s: ScanArgs) -> list[Tensor | None]:
    """u, dt, B, C, z in float32, each token's channels next to each other."""
    return [None if x is None else token_rows(x) for x in (s.u, s.dt, s.B, s.C, s.z)]


def _blocks(s: ScanArgs) -> int:
    return -(-s.d // W)


def _tiles(s: ScanArgs) -> int:
    """Enough for every row: sequence i of a packed batch starts at tile `first step // TILE + i`."""
    return s.m // TILE + (1 if s.offsets is None else s.states)

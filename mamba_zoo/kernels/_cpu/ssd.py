"""The state-space dual on the CPU: the loops of the selective scan where they fit, else products of matrices in torch.

One core of a server, 197 tokens in 2 directions, 6 heads of 64 channels: forward, the loops take 0.9, 1.8 and 3.2 ms
with 16, 64 and 128 states, the products 4.6, 4.5 and 5.3; forward and backward 3.8, 10.3 and 19.0 against 14.6, 17.9
and 18.8 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ssd_chunked
from .._scan_args import ScanArgs
from .._ssd_args import SsdArgs
from . import selective_scan

_FORWARD, _BACKWARD = 128, 64  # states up to which the loops are taken


def saved_shape(s: SsdArgs) -> tuple[int, ...]:
    """The shape of what `forward` saves: nothing."""
    return (0,)


def forward(s: SsdArgs, save: bool, want_final: bool) -> tuple[Tensor, Tensor | None, None]:
    """`(y, final state if wanted, nothing saved)`; see `SsdArgs` for the shapes."""
    scan = _as_scan(s, _FORWARD)
    if scan is None:
        return *_ssd_chunked.forward(s, want_final), None
    y, final, _ = selective_scan.forward(scan, False, want_final)
    return y.view(s.y_shape), None if final is None else final.view(s.rows, s.k, s.h, s.p, s.n), None


def backward(s: SsdArgs, dy: Tensor, dfinal: Tensor | None, saved: None) -> dict[str, Tensor]:
    """Gradients of all inputs that are given, by their names."""
    scan = _as_scan(s, _BACKWARD)
    if scan is None:
        return _ssd_chunked.backward(s, dy, dfinal)
    _, _, kept = selective_scan.forward(scan, True, False)
    dfinal = None if dfinal is None else dfinal.flatten(2, 3)
    grads = selective_scan.backward(scan, dy.flatten(-2), dfinal, kept)  # type: ignore[arg-type]
    by_head = {name: grads[name].unflatten(-1, (s.h, s.p)).sum(-1) for name in ("dt", "dt_bias") if name in grads}
    found = {"x": grads["u"].view(s.x.shape), "A": grads["A"].unflatten(1, (s.h, s.p)).sum((2, 3)), **by_head}
    found |= {name: grads[name][:, :, :, None] for name in ("B", "C")}
    if "D" in grads:
        found["D"] = grads["D"].unflatten(-1, (s.h, s.p))
    if "initial_state" in grads:
        found["initial_state"] = grads["initial_state"].unflatten(2, (s.h, s.p))
    return {name: found[name].to(t.dtype) for name, t in s.differentiable().items()}


def _as_scan(s: SsdArgs, largest: int) -> ScanArgs | None:
    """The same as a selective scan whose channels share their head's steps and decay, if states are few enough."""
    if s.A is None or s.g > 1 or s.chunk or s.n > largest:
        return None
    k, d = s.k, s.h * s.p
    return ScanArgs(
        u=s.x.flatten(-2),
        dt=s.dt.to(torch.float32).repeat_interleave(s.p, -1),
        A=s.A.repeat_interleave(s.p, -1)[:, :, None].expand(k, d, s.n),
        B=s.B[:, :, :, 0],
        C=s.C[:, :, :, 0],
        D=None if s.D is None else s.D.reshape(k, d),
        z=None,
        dt_bias=None if s.dt_bias is None else s.dt_bias.repeat_interleave(s.p, -1),
        order=s.order,
        offsets=s.offsets,
        initial_state=None if s.initial_state is None else s.initial_state.flatten(2, 3),
        dt_softplus=s.dt_softplus,
        reduce="none",
        complete=s.complete,
        out_dtype=s.out_dtype,
    )

"""The selective scan of Mamba (arXiv:2312.00752), visiting tokens through an index table.

dt, B and C are per-token projections, so they commute with any reordering: they are computed once in token order, and
the kernel reads rows by index and writes each output back at its own token. Directions, curves and windows are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import as_exact, autocast, check_floating, check_tensors
from ._backend import choose, implementation
from ._op import Op
from ._order import pack_order, prepare_order
from ._scan_args import ScanArgs

REDUCTIONS = (None, "sum", "mean")
_GRADIENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    order: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    reduce: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Any:  # Tensor, or (Tensor, Tensor) with return_final_state
    """Run one recurrence per direction over the tokens, in the order given, and return outputs at their own tokens.

    With `i = order[k, t]` the token that direction `k` reads at step `t`, and `delta = softplus(dt[i] + dt_bias)`:

        h = exp(delta * A) * h + delta * u[i] * B[i]
        y[i] = (C[i] * h).sum(states) + D * u[i], times silu(z[i]) if a gate is given

    State, accumulation and the path of dt are float32 (float64 for float64 tokens). Under autocast u, dt, B, C and z
    are cast to the autocast dtype; A, D, dt_bias and the state never are. Differentiable once, in every tensor.

    Args:
        u: Tokens `(b, l, d)` shared by all directions, or `(b, l, k, d)`; in token order, nothing gathered beforehand.
        dt: Step sizes `(b, l, k, d)` in units of one token, before `dt_bias` and softplus.
        A: Decay rates `(k, d, n)`, negative for a stable state.
        B: Input maps `(b, l, k, n)`.
        C: Output maps `(b, l, k, n)`.
        D: Skip weights `(k, d)`.
        z: Gate `(b, l, d)` or `(b, l, k, d)`, before its SiLU.
        order: `(k, m)` or per sample `(b, k, m)` token indices. -1 is an empty step: the state decays as for a zero
            token and nothing is written. Tokens that a direction never visits are zero in its output. None visits
            tokens 0..l-1 in every direction.
            The values are read at the first use: later writes that autograd does not count (in inference mode, through
            NumPy) are not seen, so give a new table instead.
        dt_bias: `(k, d)`, added to `dt` before softplus.
        dt_softplus: Whether step sizes pass through softplus.
        reduce: None returns every direction; "sum" or "mean" reduces over them, in float32.
        initial_state: `(b, k, d, n)`, or `(s, k, d, n)` for `s` packed sequences. None is zero.
        return_final_state: Return the state after the last step as well.
        cu_seqlens: `(s + 1,)` integer token boundaries of `s` sequences packed into one sample (`b = 1`), from 0 to l.
            Each is scanned as if it were alone, in every direction, whatever `order` does in between.
        out_dtype: Of the result; None is the dtype of `u`. float32 is safer for float16 tokens, whose sums overflow.
        backend: "auto", or one of `kernels.BACKENDS`.

    Returns:
        `(b, l, k, d)`, or `(b, l, d)` with `reduce`; with `return_final_state` also the state
        `(b | s, k, d, n)`, float32.

    Raises:
        ValueError: shapes that disagree, a bad `order`, `cu_seqlens`, `reduce` or `backend`.
            Tensors on several devices.
        TypeError: tokens of different dtypes or of integers, or an `order` that is no integer tensor.

    Source:
        arXiv:2312.00752, equation 2; exact step on A, Euler step on B, as in its published code.
    """
    tensors, flags = _prepared(
        u, dt, A, B, C, D, z, order, dt_bias, dt_softplus, reduce, initial_state, cu_seqlens, out_dtype, backend
    )
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    softplus, reduction, complete, *rest = flags
    y, final, _ = _forward(*tensors, softplus, reduction, complete, save, return_final_state, *rest)
    return (y, final) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan` for streaming: the next token of every sample.

    Args:
        state: `(b, k, d, n)` float32, from `return_final_state` or an earlier step.
        u: The token `(b, d)` or `(b, k, d)`.
        dt: `(b, k, d)`, before bias and softplus.
        A: `(k, d, n)`.
        B: `(b, k, n)`.
        C: `(b, k, n)`.
        D: `(k, d)`.
        z: `(b, d)` or `(b, k, d)`.
        dt_bias: `(k, d)`.
        dt_softplus: Whether the step size passes through softplus.

    Returns:
        The output `(b, k, d)` in the dtype of `u`, and the new state.

    Raises:
        ValueError: shapes that disagree.
    """
    _check_shapes(u, dt, A, B, C, D, z, dt_bias, axes="b")
    if state.shape != (*dt.shape, A.shape[2]):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(*dt.shape, A.shape[2])}")
    exact = state.dtype
    token = (u if u.dim() == 3 else u[:, None]).to(exact)
    delta = dt.to(exact) if dt_bias is None else dt.to(exact) + dt_bias.to(exact)
    if dt_softplus:
        delta = F.softplus(delta)
    state = torch.exp(delta[..., None] * A.to(exact)) * state + (delta * token)[..., None] * B.to(exact)[:, :, None]
    y = (state * C.to(exact)[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.to(exact) * token
    if z is not None:
        y = y * F.silu((z if z.dim() == 3 else z[:, None]).to(exact))
    return y.to(u.dtype), state


def scan_keeping(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    order: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    reduce: str | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    keep: bool = True,
) -> tuple[Tensor, list[Tensor | None], tuple]:
    """`selective_scan` that records no gradient, for a larger function with a gradient of its own.

    Returns:
        The result; and, if it is to `keep` the states, what `scan_gradients` takes: tensors, u, dt, A, B, C, D, z and
        dt_bias first, and settings.
    """
    tensors, flags = _prepared(
        u, dt, A, B, C, D, z, order, dt_bias, dt_softplus, reduce, None, cu_seqlens, out_dtype, "auto"
    )
    softplus, reduction, complete, *rest = flags
    y, _, saved = _forward(*tensors, softplus, reduction, complete, keep, False, *rest)
    return y, [*tensors, saved], flags


def scan_gradients(dy: Tensor, tensors: Sequence[Tensor | None], flags: tuple) -> list[Any]:
    """Gradients of u, dt, A, B, C, D, z and dt_bias, None for those that are None, from what `scan_keeping` returned.

    Each is a tensor of its own, which the caller may overwrite.
    """
    *inputs, saved = tensors
    values = iter(_backward(dy, None, saved, *inputs, *flags))
    return [None if x is None else next(values) for x in inputs[:8]]


def _prepared(
    u, dt, A, B, C, D, z, order, dt_bias, dt_softplus, reduce, initial_state, cu_seqlens, out_dtype, backend
) -> tuple[list[Tensor | None], tuple]:
    """The arguments of `selective_scan`, checked: tensors as the op takes them, and what else its gradient needs."""
    check_tensors(
        ("u", u, False), ("dt", dt, False), ("A", A, False), ("B", B, False), ("C", C, False), ("D", D, True),
        ("z", z, True), ("dt_bias", dt_bias, True), ("initial_state", initial_state, True),
    )  # fmt: skip
    _check_shapes(u, dt, A, B, C, D, z, dt_bias)
    b, l, k, d = dt.shape
    u, dt, B, C, z = autocast(u, dt, B, C, z)
    if len(dtypes := {x.dtype for x in (u, dt, B, C, z) if x is not None}) > 1:
        raise TypeError(f"u, dt, B, C and z must share a dtype, not {sorted(map(str, dtypes))}; cast them, or autocast")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is unknown; choose one of {REDUCTIONS}")
    if not u.dtype.is_floating_point or out_dtype is not None:
        check_floating(u=u.dtype, out_dtype=out_dtype or u.dtype)
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    A = as_exact("A", A, exact)
    D, dt_bias, initial_state = (
        x if x is None else as_exact(name, x, exact)
        for name, x in (("D", D), ("dt_bias", dt_bias), ("initial_state", initial_state))
    )
    table, complete = prepare_order(order, b, l, k, u.device)
    offsets = None
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, b, l, order)
        table, offsets = pack_order(table, cu_seqlens, l)
    rows = b if offsets is None else offsets.shape[1] - 1
    if initial_state is not None and initial_state.shape != (rows, k, d, A.shape[2]):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k, d, A.shape[2])}")
    tensors = [u, dt, A, B, C, D, z, dt_bias, table, offsets, initial_state]
    name = choose(backend, u.device, u.dtype)
    return tensors, (dt_softplus, reduce or "none", complete, out_dtype or u.dtype, name)


def _run_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reduce: str,
    complete: bool,
    save: bool,
    want_final: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    s = ScanArgs(u, dt, A, B, C, D, z, dt_bias, order, offsets, initial_state, dt_softplus, reduce, complete, out_dtype)
    return implementation(backend, "selective_scan").forward(s, save, want_final)


def _fake_forward(
    u, dt, A, B, C, D, z, dt_bias, order, offsets, initial_state,
    dt_softplus, reduce, complete, save, want_final, out_dtype, backend,
):  # fmt: skip
    s = ScanArgs(u, dt, A, B, C, D, z, dt_bias, order, offsets, initial_state, dt_softplus, reduce, complete, out_dtype)
    saved = implementation(backend, "selective_scan").saved_shape(s) if save else (0,)
    return (
        u.new_empty(s.y_shape, dtype=out_dtype),
        s.new_state() if want_final else A.new_empty(0, dtype=torch.float32),
        u.new_empty(saved, dtype=torch.float32),
    )


def _run_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    saved: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reduce: str,
    complete: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    s = ScanArgs(u, dt, A, B, C, D, z, dt_bias, order, offsets, initial_state, dt_softplus, reduce, complete, out_dtype)
    grads = implementation(backend, "selective_scan").backward(s, dy, dfinal, saved)
    return [grads[name] for name in _GRADIENTS if name in grads]


def _fake_backward(
    dy, dfinal, saved, u, dt, A, B, C, D, z, dt_bias, order, offsets, initial_state,
    dt_softplus, reduce, complete, out_dtype, backend,
):  # fmt: skip
    given = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given if x is not None]


def _save(ctx, inputs, output):
    *tensors, dt_softplus, reduce, complete, _, want_final, out_dtype, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = (dt_softplus, reduce, complete, out_dtype, backend)
    ctx.want_final = want_final
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, dfinal, _):
    *tensors, saved = ctx.saved_tensors
    if dy is None:  # only the final state was used
        s = ScanArgs(*tensors, *ctx.flags[:-1])
        dy = s.u.new_zeros(s.y_shape, dtype=s.out_dtype)
    values = iter(_backward(dy, dfinal if ctx.want_final else None, saved, *tensors, *ctx.flags))
    g = [None if x is None else next(values) for x in (*tensors[:8], tensors[-1])]
    return *g[:8], None, None, g[8], *[None] * 7


_forward = Op("selective_scan", _run_forward, _fake_forward)
_backward = Op("selective_scan_backward", _run_backward, _fake_backward)
_forward.set_gradient(_save, _gradient)


def _check_shapes(u, dt, A, B, C, D, z, dt_bias, axes: str = "b, l") -> None:
    """Raise ValueError naming the first argument whose shape does not follow from those of `dt` and `A`.

    `axes` are the first ones of all tokens; "b" is for a single step.
    """
    if dt.dim() != (4 if axes == "b, l" else 3) or A.dim() != 3:
        raise ValueError(f"dt must be ({axes}, k, d) and A (k, d, n), not {tuple(dt.shape)} and {tuple(A.shape)}")
    *rows, k, d = dt.shape
    n = A.shape[2]
    if 0 in (*rows[1:], k, d, n):
        raise ValueError(f"dt {tuple(dt.shape)} and A {tuple(A.shape)} leave nothing to scan; every size must be >= 1")
    tokens, maps, channels = ((*rows, d), (*rows, k, d)), ((*rows, k, n),), ((k, d),)
    expected = (
        ("u", u, tokens), ("A", A, ((k, d, n),)), ("B", B, maps), ("C", C, maps),
        ("D", D, channels), ("z", z, tokens), ("dt_bias", dt_bias, channels),
    )  # fmt: skip
    for name, value, shapes in expected:
        if value is not None and value.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {wanted} to go with dt {tuple(dt.shape)} "
                f"({axes}, k, d) and n={n} states"
            )


def _check_cu_seqlens(cu_seqlens: Tensor, b: int, l: int, order: Tensor | None) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, not {found}")
    if b != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens needs one packed sample (b=1) and shape (s + 1,), not b={b} and {tuple(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling() or cu_seqlens.is_meta:
        return
    cuts = cu_seqlens.tolist()
    if cuts[0] != 0 or cuts[-1] != l or any(low > high for low, high in pairwise(cuts)):
        raise ValueError(f"cu_seqlens must rise from 0 to l={l}, not {cuts[:6]}{'...' if len(cuts) > 6 else ''}")
    if order is not None and bool((order < 0).any()):
        raise ValueError("order has empty steps (-1), which belong to no packed sequence; drop them or cu_seqlens")

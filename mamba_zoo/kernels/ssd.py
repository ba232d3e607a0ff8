"""The state-space dual of Mamba-2 (arXiv:2405.21060), visiting tokens through an index table.

A selective scan whose decay is one number per head and step. A run of steps is then a product of matrices, which is
what tensor cores compute. Tokens are read by index and outputs written back at their own token, as in `selective_scan`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import as_exact, autocast, check_floating, check_tensors
from ._backend import choose, implementation
from ._op import Op
from ._order import pack_order, prepare_order
from ._ssd_args import NAMES, SsdArgs
from .selective_scan import REDUCTIONS, _check_cu_seqlens

CHUNKS = (None, 16, 32, 64, 128, 256)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    order: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    reduce: str | None = None,
    decay: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Any:  # Tensor, or (Tensor, Tensor) with return_final_state
    """Run one recurrence per direction and head over the tokens, and return outputs at their own tokens.

    With `i = order[k, t]` the token that direction `k` reads at step `t`, and `delta = softplus(dt[i] + dt_bias)`, each
    head keeps a state `(p, n)`:

        state = exp(delta * A) * state + outer(delta * x[i], B[i])
        y[i] = state @ C[i] + D * x[i], times silu(z[i]) if a gate is given

    State and accumulation are float32 (float64 for float64 tokens), and so is the path of dt. What tensor cores
    multiply is rounded to the tokens' dtype first: bfloat16 gradients are good to about 5e-3, float16 ones to 1e-3.
    Under autocast x, B, C and z are cast to the autocast dtype; dt, decay, A, D, dt_bias and the state never are.
    Differentiable once, in every tensor.

    Args:
        x: Tokens `(b, l, h, p)`, h heads of p channels, shared by all directions, or `(b, l, k, h, p)`.
        dt: Step sizes `(b, l, k, h)` in units of one token, before `dt_bias` and softplus; the dtype of `x` or float32.
        A: Decay rates `(k, h)`, negative for a stable state; None if `decay` is given.
        B: Input maps `(b, l, k, g, n)`: g groups of `h / g` neighbouring heads share one.
        C: Output maps `(b, l, k, g, n)`.
        D: Skip weights `(k, h)` or `(k, h, p)`.
        z: Gate `(b, l, h, p)` or `(b, l, k, h, p)`, before its SiLU. It is applied after the kernel.
        order: `(k, m)` or per sample `(b, k, m)` token indices. -1 is an empty step: the state decays as for a zero
            token and nothing is written. Tokens that a direction never visits are zero in its output. None visits
            tokens 0..l-1 in every direction.
            The values are read at the first use: later writes that autograd does not count (in inference mode, through
            NumPy) are not seen, so give a new table instead.
        dt_bias: `(k, h)`, added to `dt` before softplus.
        dt_softplus: Whether step sizes pass through softplus.
        initial_state: `(b, k, h, p, n)`, or `(s, k, h, p, n)` for `s` packed sequences. None is zero.
        return_final_state: Return the state after the last step as well.
        cu_seqlens: `(s + 1,)` integer token boundaries of `s` sequences packed into one sample (`b = 1`), from 0 to l.
            Each is scanned as if it were alone, in every direction, whatever `order` does in between.
        chunk_size: Steps that are multiplied at once, 16 to 256; None is what suits the backend. Changes the time, and
            the result by rounding only.
        reduce: None returns every direction; "sum" or "mean" reduces over them.
        decay: `(b, l, k, h)`, the logarithm of what each step multiplies the state by, in place of `delta * A`:
            for rates that differ from token to token, as in Mamba-3. The dtype of `x` or float32.
        out_dtype: Of the result; None is the dtype of `x`. float32 is safer for float16 tokens, whose sums overflow.
        backend: "auto", or one of `kernels.BACKENDS`.

    Returns:
        `(b, l, k, h, p)`, or `(b, l, h, p)` with `reduce`; with `return_final_state` also the state
        `(b | s, k, h, p, n)`, float32.

    Raises:
        ValueError: shapes that disagree, both or neither of `A` and `decay`, a bad `order`, `cu_seqlens`, `chunk_size`,
            `reduce` or `backend`; tensors on several devices.
        TypeError: tokens of different dtypes or of integers, or an `order` that is no integer tensor.

    Source:
        arXiv:2405.21060, sections 3 and 6.
    """
    check_tensors(
        ("x", x, False), ("dt", dt, False), ("A", A, True), ("B", B, False), ("C", C, False), ("D", D, True),
        ("z", z, True), ("dt_bias", dt_bias, True), ("decay", decay, True), ("initial_state", initial_state, True),
    )  # fmt: skip
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, decay)
    b, l, k, h = dt.shape
    p, n = x.shape[-1], B.shape[-1]
    x, B, C, z = autocast(x, B, C, z)
    if len(dtypes := {t.dtype for t in (x, B, C, z) if t is not None}) > 1:
        raise TypeError(f"x, B, C and z must share a dtype, not {sorted(map(str, dtypes))}; cast them, or autocast")
    if not x.dtype.is_floating_point or out_dtype is not None:
        check_floating(x=x.dtype, out_dtype=out_dtype or x.dtype)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("dt", dt), ("decay", decay)):
        if value is not None and value.dtype not in (x.dtype, exact):
            raise TypeError(f"{name} is {value.dtype}; it must be {x.dtype} like x, or {exact}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is unknown; choose one of {REDUCTIONS}")
    if chunk_size not in CHUNKS:
        raise ValueError(f"chunk_size={chunk_size!r} must be one of {CHUNKS}")
    A, D, dt_bias, initial_state = (
        t if t is None else as_exact(name, t, exact)
        for name, t in (("A", A), ("D", D), ("dt_bias", dt_bias), ("initial_state", initial_state))
    )
    if D is not None and D.dim() == 2:
        D = D[:, :, None].expand(-1, -1, p)
    table, complete = prepare_order(order, b, l, k, x.device)
    offsets = None
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, b, l, order)
        table, offsets = pack_order(table, cu_seqlens, l)
    rows = b if offsets is None else offsets.shape[1] - 1
    if initial_state is not None and initial_state.shape != (rows, k, h, p, n):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k, h, p, n)}")
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dt, A, B, C, D, decay, dt_bias, initial_state)
    )
    y, final, _ = _forward(
        x, dt, A, B, C, D, decay, dt_bias, table, offsets, initial_state,
        dt_softplus, complete, chunk_size or 0, out_dtype or x.dtype, save, return_final_state,
        choose(backend, x.device, x.dtype, "ssd"),
    )  # fmt: skip
    if z is not None:
        gate = F.silu(z.to(exact))
        y = (y.to(exact) * (gate if z.dim() == 5 else gate[:, :, None])).to(y.dtype)
    if reduce is not None:
        y = y[:, :, 0] if k == 1 else y.sum(2) if reduce == "sum" else y.mean(2)
    return (y, final) if return_final_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `ssd` for streaming: the next token of every sample.

    Args:
        state: `(b, k, h, p, n)` float32, from `return_final_state` or an earlier step.
        x: The token `(b, h, p)` or `(b, k, h, p)`.
        dt: `(b, k, h)`, before bias and softplus.
        A: `(k, h)`; None if `decay` is given.
        B: `(b, k, g, n)`.
        C: `(b, k, g, n)`.
        D: `(k, h)` or `(k, h, p)`.
        z: `(b, h, p)` or `(b, k, h, p)`.
        dt_bias: `(k, h)`.
        dt_softplus: Whether the step size passes through softplus.
        decay: `(b, k, h)`, in place of the step size times `A`.

    Returns:
        The output `(b, k, h, p)` in the dtype of `x`, and the new state.

    Raises:
        ValueError: shapes that disagree, or both or neither of `A` and `decay`.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, decay, axes="b")
    if state.shape != (*dt.shape, x.shape[-1], B.shape[-1]):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(*dt.shape, x.shape[-1], B.shape[-1])}")
    exact = state.dtype
    token = (x if x.dim() == 4 else x[:, None]).to(exact)
    delta = dt.to(exact) if dt_bias is None else dt.to(exact) + dt_bias.to(exact)
    if dt_softplus:
        delta = F.softplus(delta)
    log = delta * A.to(exact) if A is not None else decay.to(exact)  # type: ignore[union-attr]
    heads = token.shape[2] // B.shape[2]
    maps_in, maps_out = (t.to(exact).repeat_interleave(heads, 2)[:, :, :, None] for t in (B, C))
    state = torch.exp(log)[..., None, None] * state + (delta[..., None] * token)[..., None] * maps_in
    y = (state * maps_out).sum(-1)
    if D is not None:
        y = y + (D if D.dim() == 3 else D[:, :, None]).to(exact) * token
    if z is not None:
        y = y * F.silu((z if z.dim() == 4 else z[:, None]).to(exact))
    return y.to(x.dtype), state


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decay: Tensor | None,
    dt_bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    complete: bool,
    chunk: int,
    out_dtype: torch.dtype,
    save: bool,
    want_final: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    s = SsdArgs(
        x, dt, A, B, C, D, decay, dt_bias, order, offsets, initial_state, dt_softplus, complete, chunk, out_dtype
    )
    return implementation(backend, "ssd").forward(s, save, want_final)


def _fake_forward(
    x, dt, A, B, C, D, decay, dt_bias, order, offsets, initial_state,
    dt_softplus, complete, chunk, out_dtype, save, want_final, backend,
):  # fmt: skip
    s = SsdArgs(
        x, dt, A, B, C, D, decay, dt_bias, order, offsets, initial_state, dt_softplus, complete, chunk, out_dtype
    )
    saved = implementation(backend, "ssd").saved_shape(s) if save else (0,)
    return (
        x.new_empty(s.y_shape, dtype=out_dtype),
        s.new_state() if want_final else x.new_empty(0, dtype=torch.float32),
        x.new_empty(saved, dtype=torch.float32),
    )


def _run_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    saved: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decay: Tensor | None,
    dt_bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    complete: bool,
    chunk: int,
    out_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    s = SsdArgs(
        x, dt, A, B, C, D, decay, dt_bias, order, offsets, initial_state, dt_softplus, complete, chunk, out_dtype
    )
    grads = implementation(backend, "ssd").backward(s, dy, dfinal, saved)
    return [grads[name] for name in s.differentiable()]


def _fake_backward(
    dy, dfinal, saved, x, dt, A, B, C, D, decay, dt_bias, order, offsets, initial_state,
    dt_softplus, complete, chunk, out_dtype, backend,
):  # fmt: skip
    given = (x, dt, A, B, C, D, decay, dt_bias, initial_state)
    return [t.new_empty(t.shape) for t in given if t is not None]


def _save(ctx, inputs, output):
    *tensors, dt_softplus, complete, chunk, out_dtype, _, want_final, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.flags = (dt_softplus, complete, chunk, out_dtype)
    ctx.backend, ctx.want_final = backend, want_final
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, dfinal, _):
    *tensors, saved = ctx.saved_tensors
    s = SsdArgs(*tensors, *ctx.flags)
    if dy is None:  # only the final state was used
        dy = s.x.new_zeros(s.y_shape, dtype=s.out_dtype)
    values = _backward(dy, dfinal if ctx.want_final else None, saved, *tensors, *ctx.flags, ctx.backend)
    by_name = dict(zip(s.differentiable(), values, strict=True))
    g = [by_name.get(name) for name in NAMES]
    return *g[:8], None, None, g[8], *[None] * 7


_forward = Op("ssd", _run_forward, _fake_forward)
_backward = Op("ssd_backward", _run_backward, _fake_backward)
_forward.set_gradient(_save, _gradient)


def _check_shapes(x, dt, A, B, C, D, z, dt_bias, decay, axes: str = "b, l") -> None:
    """Raise ValueError naming the first argument whose shape does not follow from those of `dt`, `x` and `B`.

    `axes` are the first ones of all tokens; "b" is for a single step.
    """
    if (A is None) == (decay is None):
        raise ValueError("give either A, the decay rates of the heads, or decay, one for each token")
    wanted = 4 if axes == "b, l" else 3
    if dt.dim() != wanted or B.dim() != wanted + 1 or x.dim() not in (wanted, wanted + 1):
        raise ValueError(
            f"dt must be ({axes}, k, h), B ({axes}, k, g, n) and x ({axes}, h, p) or ({axes}, k, h, p), "
            f"not {tuple(dt.shape)}, {tuple(B.shape)} and {tuple(x.shape)}"
        )
    *rows, k, h = dt.shape
    p, (g, n) = x.shape[-1], B.shape[-2:]
    if 0 in (*rows[1:], k, h, p, g, n):
        raise ValueError(f"dt {tuple(dt.shape)}, x {tuple(x.shape)} and B {tuple(B.shape)} leave nothing to scan")
    if h % g:
        raise ValueError(f"B has {g} groups, which do not divide the {h} heads of dt")
    tokens, maps, steps = ((*rows, h, p), (*rows, k, h, p)), ((*rows, k, g, n),), ((*rows, k, h),)
    expected = {
        "x": (x, tokens), "A": (A, ((k, h),)), "B": (B, maps), "C": (C, maps), "D": (D, ((k, h), (k, h, p))),
        "z": (z, tokens), "dt_bias": (dt_bias, ((k, h),)), "decay": (decay, steps),
    }  # fmt: skip
    for name, (value, shapes) in expected.items():
        if value is not None and tuple(value.shape) not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected {' or '.join(map(str, shapes))} to go with dt "
                f"{tuple(dt.shape)} ({axes}, k, h), p={p} channels a head and n={n} states"
            )

"""The short depthwise convolution that precedes the scan in a Mamba block, visiting tokens in the same order."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import as_exact, autocast, check_floating, check_tensors
from ._backend import choose, implementation
from ._conv_args import ConvArgs
from ._op import Op
from ._order import pack_order, prepare_order
from .selective_scan import _check_cu_seqlens

ACTIVATIONS = (None, "silu")
_GRADIENTS = ("x", "weight", "bias", "initial_state")


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    order: Tensor | None = ...,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    return_final_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    order: Tensor | None = ...,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    *,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own w taps along the visiting order; outputs stay at their own tokens.

    With `w` taps and `order[k, t]` the token that direction `k` reads at step `t`:

        y[order[k, t], k] = act(bias[k] + (weight[k, :, j] * x[order[k, t - (w - 1) + j]]).sum(j))

    where steps before the first are zero, or `initial_state`. Weights and sums are float32 (float64 for float64
    tokens). Under autocast x is cast to the autocast dtype; weight, bias and the state never are. Differentiable once,
    in every tensor.

    Args:
        x: Tokens `(b, l, d)` shared by all directions, or `(b, l, k, d)`; in token order, nothing gathered beforehand.
        weight: Taps `(k, d, w)`, any w >= 1; tap w - 1 multiplies the present token.
        bias: `(k, d)`.
        order: `(k, m)` or per sample `(b, k, m)` token indices. -1 is an empty step: it passes through the taps as a
            zero token, and nothing is written. Tokens that a direction never visits are zero in its output. None
            visits tokens 0..l-1 in every direction.
            The values are read at the first use: later writes that autograd does not count (in inference mode, through
            NumPy) are not seen, so give a new table instead.
        activation: None or "silu".
        initial_state: The w - 1 tokens before the first step, oldest first: `(b, k, d, w - 1)`, or
            `(s, k, d, w - 1)` for `s` packed sequences. None is zero.
        return_final_state: Return the last w - 1 tokens in visiting order as well, as `initial_state` takes them.
        cu_seqlens: `(s + 1,)` integer token boundaries of `s` sequences packed into one sample (`b = 1`), from 0 to l.
            Each is convolved as if it were alone, in every direction, whatever `order` does in between.
        backend: "auto", or one of `kernels.BACKENDS`.

    Returns:
        `(b, l, k, d)` in the dtype of `x`; with `return_final_state` also the state `(b | s, k, d, w - 1)`, float32.

    Raises:
        ValueError: shapes that disagree, a bad `order`, `cu_seqlens`, `activation` or `backend`; tensors on several
            devices.
        TypeError: tokens of integers, or an `order` that is no integer tensor.

    Source:
        arXiv:2312.00752, section 3.4: the convolution of the block is causal in the direction of its scan.
    """
    check_tensors(
        ("x", x, False), ("weight", weight, False), ("bias", bias, True), ("initial_state", initial_state, True)
    )  # fmt: skip
    _check_shapes(x, weight, bias)
    b, l = x.shape[:2]
    k, d, w = weight.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {ACTIVATIONS}")
    (x,) = autocast(x)
    if not x.dtype.is_floating_point:
        check_floating(x=x.dtype)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = as_exact("weight", weight, exact)
    bias, initial_state = (
        t if t is None else as_exact(name, t, exact) for name, t in (("bias", bias), ("initial_state", initial_state))
    )
    table, complete = prepare_order(order, b, l, k, x.device)
    offsets = None
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, b, l, order)
        table, offsets = pack_order(table, cu_seqlens, l)
    rows = b if offsets is None else offsets.shape[1] - 1
    if initial_state is not None and initial_state.shape != (rows, k, d, w - 1):
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k, d, w - 1)}")
    y, final = _forward(
        x, weight, bias, table, offsets, initial_state,
        activation == "silu", complete, return_final_state, choose(backend, x.device, x.dtype),
    )  # fmt: skip
    return (y, final) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d` for streaming: the next token of every sample.

    Args:
        state: `(b, k, d, w - 1)` float32, from `return_final_state` or an earlier step.
        x: The token `(b, d)` or `(b, k, d)`.
        weight: `(k, d, w)`.
        bias: `(k, d)`.
        activation: None or "silu".

    Returns:
        The output `(b, k, d)` in the dtype of `x`, and the new state.

    Raises:
        ValueError: shapes that disagree, or an unknown `activation`.
    """
    _check_shapes(x, weight, bias, axes="b")
    k, d, w = weight.shape
    if state.shape != (x.shape[0], k, d, w - 1):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(x.shape[0], k, d, w - 1)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {ACTIVATIONS}")
    token = (x if x.dim() == 3 else x[:, None]).to(state.dtype)
    window = torch.cat([state, token.expand(state.shape[:3])[..., None]], dim=-1)
    y = (window * weight.to(state.dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(state.dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), window[..., 1:]


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    complete: bool,
    want_final: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    s = ConvArgs(x, weight, bias, order, offsets, initial_state, silu, complete)
    return implementation(backend, "causal_conv1d").forward(s, want_final)


def _fake_forward(x, weight, bias, order, offsets, initial_state, silu, complete, want_final, backend):
    s = ConvArgs(x, weight, bias, order, offsets, initial_state, silu, complete)
    return s.new_y(), s.new_state() if want_final else weight.new_empty(0, dtype=torch.float32)


def _run_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    offsets: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    complete: bool,
    backend: str,
) -> list[Tensor]:
    s = ConvArgs(x, weight, bias, order, offsets, initial_state, silu, complete)
    grads = implementation(backend, "causal_conv1d").backward(s, dy, dfinal)
    return [grads[name] for name in _GRADIENTS if name in grads]


def _fake_backward(dy, dfinal, x, weight, bias, order, offsets, initial_state, silu, complete, backend):
    given = (x, weight, bias, initial_state)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given if t is not None]


def _save(ctx, inputs, output):
    *tensors, silu, complete, want_final, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.flags = (silu, complete, backend)
    ctx.want_final = want_final
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, dfinal):
    # Read once: under activation checkpointing a second read fails.
    x, weight, bias, _, _, initial_state = tensors = ctx.saved_tensors
    if dy is None:  # only the final state was used
        dy = x.new_zeros(*x.shape[:2], *weight.shape[:2])
    values = iter(_backward(dy, dfinal if ctx.want_final else None, *tensors, *ctx.flags))
    g = [None if t is None else next(values) for t in (x, weight, bias, initial_state)]
    return *g[:3], None, None, g[3], *[None] * 4


_forward = Op("causal_conv1d", _run_forward, _fake_forward)
_backward = Op("causal_conv1d_backward", _run_backward, _fake_backward)
_forward.set_gradient(_save, _gradient)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, axes: str = "b, l") -> None:
    """Raise ValueError naming the first argument whose shape does not follow from that of `weight`.

    `axes` are the first ones of `x`; "b" is for a single step.
    """
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"weight must be (k, d, w) with every size >= 1, not {tuple(weight.shape)}")
    k, d, _ = weight.shape
    rows = 2 if axes == "b, l" else 1
    if x.dim() <= rows or x.shape[rows:] not in ((d,), (k, d)) or 0 in x.shape[1:rows]:
        longest = " with l >= 1" if rows == 2 else ""
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected ({axes}, {d}) or ({axes}, {k}, {d}){longest} to go with weight "
            f"{tuple(weight.shape)} (k, d, w)"
        )
    if bias is not None and bias.shape != (k, d):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(k, d)} to go with weight (k, d, w)")

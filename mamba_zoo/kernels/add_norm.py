"""Add a branch to the residual stream and normalise the sum, as one pass over memory on a GPU.

In plain torch under autocast this is an addition, a float32 norm and a cast, forward and backward: more than twice the
bytes, counted by hand; norms and casts were 21 of the 56 ms of a training step of VMamba-T, profiled on an H200.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import asked_for, check_floating, check_tensors, contiguous
from ._backend import choose, gpu_backend, implementation
from ._op import applied, differentiable_once, watched

KINDS = ("layer", "rms")


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`x + scale * branch`, and its norm over the last axis.

    Sums and statistics are float32 (float64 for float64 tokens). Differentiable once, in every tensor but `scale`.

    Args:
        x: The stream `(b, ..., d)`.
        weight: `(d,)`.
        bias: `(d,)`, for `kind="layer"` only.
        branch: What is added, the shape of `x`; None adds nothing.
        scale: `(b,)` factor of each sample's branch, as stochastic depth draws it; None is 1.
        eps: Added to the variance, or to the mean square.
        kind: "layer" (arXiv:1607.06450) or "rms" (arXiv:1910.07467).
        out_dtype: Of the normed tokens; None is that of the stream.
        backend: "auto", "cuda", "triton" or "reference"; "auto" takes the first that serves a GPU.

    Returns:
        The stream, in the wider dtype of `x` and `branch` (`x` itself without a branch); and the normed tokens.

    Raises:
        ValueError: shapes that disagree, an unknown `kind`, a `backend` that is unknown or cannot run here, a `bias`
            with "rms", `scale` without `branch`, tensors on several devices.
        TypeError: tokens of integers.
    """
    check_tensors(
        ("x", x, False), ("weight", weight, False), ("bias", bias, True), ("branch", branch, True),
        ("scale", scale, True),
    )  # fmt: skip
    if not x.dtype.is_floating_point:
        check_floating(x=x.dtype)
    _check(x, weight, bias, branch, scale, kind, backend)
    stream_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    out_dtype = out_dtype or stream_dtype
    inputs = (x, branch, scale, weight, bias)
    if backend != "reference":
        dtype = asked_for(stream_dtype, out_dtype, weight, bias, scale)
        seen = watched(inputs)
        if backend != "auto":
            backend = choose(backend, x.device, dtype, "add_norm")
        elif x.is_cuda and not seen:
            backend = gpu_backend(dtype, "add_norm")
        if backend in ("cuda", "triton"):
            run = AddNorm.apply if seen else partial(applied, AddNorm)
            found = run(implementation(backend, "add_norm"), *inputs, eps, kind == "rms", out_dtype)
            return (x, found) if branch is None else found
    stream = x
    if branch is not None:
        stream = x + (branch if scale is None else branch * scale.to(branch.dtype).view(-1, *[1] * (x.dim() - 1)))
    widest = torch.promote_types(stream.dtype, torch.float32)
    tokens = stream.to(widest)
    weight, bias = weight.to(widest), bias if bias is None else bias.to(widest)
    if kind == "rms":
        y = F.rms_norm(tokens, weight.shape, weight, eps)
    else:
        y = F.layer_norm(tokens, weight.shape, weight, bias, eps)
    return stream, y.to(out_dtype)


class AddNorm(torch.autograd.Function):
    """`add_norm` by kernels; without a branch the normed tokens alone."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x, branch, scale, weight, bias, eps, rms, out_dtype):
        """Called by autograd."""
        x, branch, scale, weight, bias = (contiguous(t) for t in (x, branch, scale, weight, bias))
        stream, y, statistics = kernels.forward(x, branch, scale, weight, bias, eps, rms, out_dtype)
        ctx.save_for_backward(stream, scale, weight, statistics)
        ctx.kernels, ctx.eps, ctx.rms, ctx.out_dtype = kernels, eps, rms, out_dtype
        ctx.dtypes = (x.dtype, None if branch is None else branch.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return y if branch is None else (stream, y)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by autograd."""
        stream, scale, weight, statistics = ctx.saved_tensors
        _, branch_dtype, _ = ctx.dtypes
        # Without a branch the stream is no output, but a larger function may have a gradient of it.
        dstream, dy = grads if len(grads) == 2 else (None, grads[0])
        if dy is None:  # the normed tokens were not used
            dy = torch.zeros_like(stream, dtype=ctx.out_dtype)
        dx, dbranch, dweight, dbias = ctx.kernels.backward(
            contiguous(dy), contiguous(dstream), stream, scale, weight, statistics, ctx.rms, *ctx.dtypes
        )
        if branch_dtype is not None and dbranch is None:
            dbranch = dx
        return None, dx, dbranch, None, dweight, dbias, None, None, None

    @staticmethod
    def normed(ctx: Any, bias: Tensor | None) -> Tensor:
        """The normed tokens again."""
        stream, _, weight, _ = ctx.saved_tensors
        return ctx.kernels.forward(stream, None, None, weight, contiguous(bias), ctx.eps, ctx.rms, ctx.out_dtype)[1]


def _check(x, weight, bias, branch, scale, kind, backend) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if backend not in ("auto", "cuda", "triton", "reference"):
        raise ValueError(f"backend={backend!r} is unknown; choose 'auto', 'cuda', 'triton' or 'reference'")
    if x.dim() < 2 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected the last axis of x {tuple(x.shape)}")
    if bias is not None and (kind == "rms" or bias.shape != weight.shape):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; a layer norm takes {tuple(weight.shape)}, an RMS norm none"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of x {tuple(x.shape)}")
    if scale is not None and (branch is None or scale.shape != x.shape[:1]):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; it goes with a branch and holds one factor a sample")

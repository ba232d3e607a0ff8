"""Two linear layers with a GELU between them: on a GPU, one node of autograd that keeps no activations.

In plain torch the backward pass is a kernel for the GELU's gradient, one for the sum of its columns, one for another
GELU if activations are not kept, and as many nodes. The hidden tokens, a map's widest tensor, are read in each of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import DTYPES, as_dtype, check_floating, check_tensors, contiguous
from ._backend import choose, gpu_backend, implementation, serves
from ._op import differentiable_once, watched

_Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """`W2 gelu(W1 x + b1) + b2`, with the exact GELU (arXiv:1606.08415, by the error function).

    Under autocast everything is cast as linear layers do. Differentiable once with kernels, otherwise at will.

    Args:
        x: Tokens `(..., d)`.
        weight1: `(hidden, d)`.
        bias1: `(hidden,)`, or None.
        weight2: `(out, hidden)`.
        bias2: `(out,)`, or None.
        backend: "auto", "cuda", "triton" or "reference"; "auto" takes what `in_one_node` says.

    Returns:
        `(..., out)`.

    Raises:
        TypeError: no tensors, or not of floating point.
        ValueError: shapes or devices that disagree, an unknown `backend`, or one that cannot run here.
    """
    weights = (weight1, bias1, weight2, bias2)
    _check(x, weights, backend)
    if backend == "auto":
        backend = in_one_node(x, *weights) or "reference"
    if backend == "reference":
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    dtype = _computed(x, weights)
    if dtype is None:
        found = ", ".join(str(t.dtype) for t in (x, *weights) if t is not None)
        raise ValueError(f"x, weights and biases must have one dtype, not {found}")
    if not serves(backend, x.device.type, dtype, "mlp"):
        choose(backend, x.device, dtype, "mlp")  # raises, with the reason
    # Casts are nodes of their own, as autocast's are: with them gradients have the dtype of their tensors.
    cast = (t if t is None else as_dtype(t, dtype) for t in (x, *weights))
    return Mlp.apply(implementation(backend, "mlp"), *cast)


def in_one_node(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> str | None:
    """Whose kernels `mlp` takes for these: on a GPU, with a gradient to compute and nobody who looks on."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return None
    weights = (weight1, bias1, weight2, bias2)
    if watched((x, *weights)) or not any(t is not None and t.requires_grad for t in (x, *weights)):
        return None
    dtype = _computed(x, weights)
    found = "reference" if dtype is None else gpu_backend(dtype, "mlp")
    return None if found == "reference" else found


def _computed(x: Tensor, weights: _Weights) -> torch.dtype | None:
    """The dtype of the products; None if torch would refuse to multiply."""
    kind = x.device.type
    tensors = [t for t in (x, *weights) if t is not None]
    if torch.is_autocast_enabled(kind) and all(t.dtype in DTYPES for t in tensors):
        return torch.get_autocast_dtype(kind)
    return x.dtype if all(t.dtype == x.dtype for t in tensors) else None


class Mlp(torch.autograd.Function):
    """`mlp` by kernels: torch multiplies; `kernels` do what lies between the products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x, weight1, bias1, weight2, bias2):
        """Called by autograd."""
        h = F.linear(x, weight1, bias1)
        ctx.kernels = kernels
        _, x_wanted, weight1_wanted, bias1_wanted, weight2_wanted, _ = ctx.needs_input_grad
        below = x_wanted or weight1_wanted or bias1_wanted
        ctx.save_for_backward(
            x if weight1_wanted else None, h if below or weight2_wanted else None,
            weight1 if x_wanted else None, weight2 if below else None,
        )  # fmt: skip
        return F.linear(F.gelu(h), weight2, bias2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by autograd."""
        # Autocast may be on here or not, whatever it was in the forward pass.
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            return None, *_gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, the weights and biases, those that are wanted."""
    x, h, weight1, weight2 = ctx.saved_tensors
    _, x_wanted, weight1_wanted, bias1_wanted, weight2_wanted, bias2_wanted = ctx.needs_input_grad
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    dh: Any = None
    y: Any = None
    leading = dout.shape[:-1]
    dout = _matrix(dout)
    if weight2 is not None:
        dh, y, dbias1 = ctx.kernels.gelu_gradient(_matrix(h), dout @ weight2, weight2_wanted, bias1_wanted)
    elif weight2_wanted:
        y = F.gelu(_matrix(h))
    if weight2_wanted:
        dweight2 = dout.t() @ y
        del y
    if bias2_wanted:
        dbias2 = ctx.kernels.sum_columns(dout)
    if weight1_wanted:
        dweight1 = dh.t() @ _matrix(x)
    if x_wanted:
        dx = (dh @ weight1).view(*leading, weight1.shape[1])
    return dx, dweight1, dbias1, dweight2, dbias2


def _matrix(x: Tensor) -> Tensor:
    return contiguous(x).view(-1, x.shape[-1])


def _check(x: Tensor, weights: _Weights, backend: str) -> None:
    weight1, bias1, weight2, bias2 = weights
    check_tensors(
        ("x", x, False), ("weight1", weight1, False), ("bias1", bias1, True), ("weight2", weight2, False),
        ("bias2", bias2, True),
    )  # fmt: skip
    if not x.dtype.is_floating_point:
        check_floating(x=x.dtype)
    if backend not in ("auto", "cuda", "triton", "reference"):
        raise ValueError(f"backend={backend!r} is unknown; choose 'auto', 'cuda', 'triton' or 'reference'")
    if weight1.dim() != 2 or x.dim() < 1 or weight1.shape[1] != x.shape[-1]:
        raise ValueError(f"weight1 has shape {tuple(weight1.shape)}, expected (hidden, d) for x {tuple(x.shape)}")
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(f"weight2 has shape {tuple(weight2.shape)}, expected (out, {weight1.shape[0]})")
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected ({len(weight)},)")

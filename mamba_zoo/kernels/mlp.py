"""Two linear layers with a GELU between them: where Triton runs, one node of autograd that keeps no activations.

In plain torch the backward pass is a kernel for the GELU's gradient, one for the sum of its columns, one for another
GELU if activations are not kept, and as many nodes. The hidden tokens, a map's widest tensor, are read in each of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_floating, check_tensors
from ._backend import choose, implementation, serves
from ._op import watched

_Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """`W2 gelu(W1 x + b1) + b2`, with the exact GELU (arXiv:1606.08415, by the error function).

    Under autocast everything is cast as linear layers do. With Triton differentiable once, otherwise at will.

    Args:
        x: Tokens `(..., d)`.
        weight1: `(hidden, d)`.
        bias1: `(hidden,)`, or None.
        weight2: `(out, hidden)`.
        bias2: `(out,)`, or None.
        backend: "auto", "triton" or "reference"; "auto" takes Triton where `in_one_node` says so.

    Returns:
        `(..., out)`.

    Raises:
        TypeError: no tensors, or not of floating point.
        ValueError: shapes or devices that disagree, an unknown `backend`, or "triton" where it cannot run.
    """
    weights = (weight1, bias1, weight2, bias2)
    _check(x, weights, backend)
    if backend == "triton":
        dtype = _computed(x, weights)
        if dtype is None:
            found = ", ".join(str(t.dtype) for t in (x, *weights) if t is not None)
            raise ValueError(f"x, weights and biases must have one dtype, not {found}")
        if not serves("triton", x.device.type, dtype, "mlp"):
            choose("triton", x.device, dtype, "mlp")  # raises, with the reason
    if backend == "triton" or (backend == "auto" and in_one_node(x, *weights)):
        return implementation("triton", "mlp").mlp(x, *weights, _computed(x, weights))
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def in_one_node(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> bool:
    """Whether `mlp` takes Triton for these: on a GPU, with a gradient to compute and nobody who looks on."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return False
    weights = (weight1, bias1, weight2, bias2)
    if watched((x, *weights)) or not any(t is not None and t.requires_grad for t in (x, *weights)):
        return False
    dtype = _computed(x, weights)
    return dtype is not None and serves("triton", "cuda", dtype, "mlp")


def _computed(x: Tensor, weights: _Weights) -> torch.dtype | None:
    """The dtype of the products; None if torch would refuse to multiply."""
    kind = x.device.type
    tensors = [t for t in (x, *weights) if t is not None]
    if torch.is_autocast_enabled(kind) and all(t.dtype in _CAST for t in tensors):
        return torch.get_autocast_dtype(kind)
    return x.dtype if all(t.dtype == x.dtype for t in tensors) else None


def _check(x: Tensor, weights: _Weights, backend: str) -> None:
    weight1, bias1, weight2, bias2 = weights
    check_tensors(
        ("x", x, False), ("weight1", weight1, False), ("bias1", bias1, True), ("weight2", weight2, False),
        ("bias2", bias2, True),
    )  # fmt: skip
    if not x.dtype.is_floating_point:
        check_floating(x=x.dtype)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend={backend!r} is unknown; choose 'auto', 'triton' or 'reference'")
    if weight1.dim() != 2 or x.dim() < 1 or weight1.shape[1] != x.shape[-1]:
        raise ValueError(f"weight1 has shape {tuple(weight1.shape)}, expected (hidden, d) for x {tuple(x.shape)}")
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(f"weight2 has shape {tuple(weight2.shape)}, expected (out, {weight1.shape[0]})")
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected ({len(weight)},)")

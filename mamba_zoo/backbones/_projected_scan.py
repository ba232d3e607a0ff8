"""The projections of a state-space layer and its scan as one function; of autograd's graph one node.

As separate operations they are 23 to 29 nodes, and the gradient of the tokens is added up from two tensors of their
size. Training with 128 images on an H100, as operations and as the node: vim_small 59.2 and 58.3 ms as a graph, 76 and
69 called from Python; vmamba_tiny 35.1 and 34.6, 70 and 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels._op import Alone, applied, differentiable_once, watched
from ..kernels.selective_scan import scan_gradients, scan_keeping
from ._block import are_hooked, linear_dtype
from ._recompute import worth_making_again

DEVICES = ("cuda",)  # where the function is taken; () takes it nowhere
_ZEROS = 32  # columns; so many zeros cost a product less than a copy of what stands between them


def is_one_function(layers: tuple[nn.Module, ...], u: Tensor, z: Tensor | None, *weights: Tensor) -> bool:
    """Whether the function stands for the operations: on its devices, and where nobody looks on.

    Args:
        layers: The two projections, which the function does not call.
        u: As for `projected_scan`.
        z: As for `projected_scan`.
        weights: As for `projected_scan`, from `x_weight` to `D`.
    """
    if u.device.type not in DEVICES or watched((u, z, *weights)) or are_hooked(*layers):
        return False
    # Without autocast torch names the dtypes.
    return weights[0].dtype == weights[1].dtype == u.dtype or torch.is_autocast_enabled(u.device.type)


def projected_scan(
    u: Tensor,
    z: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    order: Tensor | None = None,
    reduce: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What `SelectiveSSM.forward` computes; differentiable once, in the first seven.

    Args:
        u: Tokens `(b, l, d)` or `(b, l, k, d)`.
        z: Gate `(b, l, d)` or `(b, l, k, d)`.
        x_weight: `(k, r + 2n, d)`.
        dt_weight: `(k, d, r)`.
        dt_bias: `(k, d)`.
        A_log: `(k, d, n)`.
        D: `(k, d)`.
        order: `(k, m)` or `(b, k, m)`.
        reduce: None, "sum" or "mean".
        cu_seqlens: `(s + 1,)`.

    Returns:
        `(b, l, k, d)`, or `(b, l, d)` with `reduce`.
    """
    return applied(ProjectedScan, (order, reduce, cu_seqlens), u, z, x_weight, dt_weight, dt_bias, A_log, D)


class ProjectedScan(torch.autograd.Function):
    """`projected_scan`, its last three arguments first."""

    @staticmethod
    def forward(ctx: Any, visits: tuple, u, z, x_weight, dt_weight, dt_bias, A_log, D):
        """Called by autograd."""
        order, reduce, cu_seqlens = visits
        ctx.dtypes = [None if x is None else x.dtype for x in (u, z, x_weight, dt_weight, dt_bias, A_log, D)]
        dtype = linear_dtype(u)
        u = u.to(dtype)
        (k, d, rank), n = dt_weight.shape, A_log.shape[2]
        ctx.sizes = k, d, rank
        to_maps = _blocks(x_weight, d, dtype) if u.dim() == 4 and k > 1 else x_weight.flatten(0, 1).to(dtype)
        maps = (_rows(u) @ to_maps.t()).view(*u.shape[:2], k, rank + 2 * n)  # low-rank steps, B and C
        columns = rank + 2 * n if k > 1 and 2 * n * k <= _ZEROS else rank
        to_dt = _blocks(dt_weight, columns, dtype) if k > 1 else dt_weight[0].to(dtype)
        dt = (_rows(maps[..., :rank] if columns == rank else maps) @ to_dt.t()).view(*u.shape[:2], k, d)
        decay = torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32))).neg_()
        y, (*tensors,), ctx.flags = scan_keeping(
            u, dt, decay, maps[..., rank:-n], maps[..., -n:], D, z, order, dt_bias,
            dt_softplus=True, reduce=reduce, cu_seqlens=cu_seqlens,
            out_dtype=torch.float32 if dtype == torch.float16 else None, keep=type(ctx) is not Alone,
        )  # fmt: skip
        if worth_making_again(dt):  # the widest of all tensors here, made of a few channels
            tensors[1] = None
        ctx.save_for_backward(*tensors, maps, to_maps, to_dt)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by autograd."""
        # Autocast may be on here or not, whatever it was in the forward pass.
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            grads = _gradients(ctx, dy)
        dtypes = zip(grads, ctx.dtypes, strict=True)
        return None, *[x if x is None or x.dtype == dtype else x.to(dtype) for x, dtype in dtypes]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of u, z, the two weights, dt_bias, A_log and D, those of the weights and of u only if they are wanted."""
    *tensors, maps, to_maps, to_dt = ctx.saved_tensors
    _, for_u, _, for_x_weight, for_dt_weight, *_ = ctx.needs_input_grad
    k, d, rank = ctx.sizes
    u, dt, decay, B, *_ = tensors
    columns = to_dt.shape[1] // k
    low = _rows(maps[..., :rank] if columns == rank else maps)
    if dt is None:
        tensors[1] = (low @ to_dt.t()).view(*u.shape[:2], k, d)
    del dt
    du, ddt, ddecay, dB, dC, dD, dz, dbias = scan_gradients(dy, tensors, ctx.flags)
    tensors.clear()
    ddt = _rows(ddt)
    dt_weight = x_weight = None
    if for_dt_weight:
        dt_weight = _of_blocks(ddt.t() @ low, k)[..., :rank]
    if for_u or for_x_weight:
        dlow = (ddt @ to_dt).view(*maps.shape[:3], columns)
        del ddt
        if columns == rank:
            dmaps = torch.cat([dlow, dB, dC], dim=-1)
        else:  # the zeros between the steps' columns left room
            dmaps, n = dlow, B.shape[-1]
            dmaps[..., rank:-n] = dB
            dmaps[..., -n:] = dC
        dmaps = _rows(dmaps)
        if for_x_weight:
            product = dmaps.t() @ _rows(u)
            x_weight = _of_blocks(product, k) if to_maps.shape[1] > d else product.view(k, -1, d)
        if for_u:
            du = du.contiguous()
            _rows(du).addmm_(dmaps, to_maps)
    return du if for_u else None, dz, x_weight, dt_weight, dbias, ddecay * decay, dD


def _rows(x: Tensor) -> Tensor:
    """Tokens `(b, l, d)` or `(b, l, k, d)` as the rows of a matrix, where strides allow it the same memory."""
    return x.reshape(-1, x.shape[2:].numel())


def _blocks(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix `(k * out, k * columns)` with the maps `(k, out, in)` on its diagonal, zeros elsewhere.

    One product with it does what k thin ones would; DirectionLinear says why.
    """
    k, out, features = weight.shape
    blocks = weight.new_zeros(k, out, k, columns, dtype=dtype)
    blocks[..., :features].diagonal(dim1=0, dim2=2).copy_(weight.permute(1, 2, 0))
    return blocks.view(k * out, k * columns)


def _of_blocks(matrix: Tensor, k: int) -> Tensor:
    """The diagonal blocks `(k, out, columns)` of a matrix `(k * out, k * columns)`."""
    return matrix.view(k, matrix.shape[0] // k, k, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

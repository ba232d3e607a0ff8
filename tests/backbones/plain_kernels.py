"""Plain torch in the place of the kernels that a map block's functions call, so that they can be tested on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from mamba_zoo.backbones._map_nodes import _Kernels
from mamba_zoo.kernels.add_norm import add_norm
from mamba_zoo.kernels.depthwise_conv2d import depthwise_conv2d


def norm_forward(x, branch, scale, weight, bias, eps, rms, out_dtype) -> tuple:
    stream, y = add_norm(x, weight, bias, branch, scale, eps, "layer", out_dtype, "reference")
    return stream, y, x.new_tensor(eps, dtype=torch.float32)


def norm_backward(dy, dstream, stream, scale, weight, statistics, rms, x_dtype, branch_dtype, bias_dtype) -> tuple:
    inputs = [t.detach().float().requires_grad_() for t in (stream, weight, torch.zeros_like(weight))]
    with torch.enable_grad():
        y = F.layer_norm(inputs[0], weight.shape, inputs[1], inputs[2], float(statistics))
    dx, dweight, dbias = torch.autograd.grad(y, inputs, dy.float())
    if dstream is not None:
        assert dstream.dtype == stream.dtype  # kernels read it as such
        dx = dx + dstream.float()
    wide = 1 if scale is None else scale.view(-1, *[1] * (dx.dim() - 1))
    dbranch = None if branch_dtype is None else (dx * wide).to(branch_dtype)
    return dx.to(x_dtype), dbranch, dweight.to(weight.dtype), None if bias_dtype is None else dbias.to(bias_dtype)


def conv_forward(x, weight, bias, silu) -> torch.Tensor:
    return depthwise_conv2d(x, weight, bias, "silu" if silu else None, "reference")


def conv_backward(dy, x, weight, bias, silu, x_wanted, weights_wanted) -> tuple:
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.enable_grad():
        y = conv_forward(inputs[0], inputs[1], None if bias is None else inputs[2], silu)
    grads = torch.autograd.grad(y, inputs, dy)
    return *grads, *[None] * (3 - len(grads))


def gelu_gradient(h, g, again, bias) -> tuple:
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        y = F.gelu(h)
    (dh,) = torch.autograd.grad(y, h, g)
    return dh, y.detach() if again else None, dh.sum(0) if bias else None


PLAIN = _Kernels(
    *(
        SimpleNamespace(**functions)  # pyright: ignore[reportArgumentType]
        for functions in (
            {"forward": norm_forward, "backward": norm_backward},
            {"forward": conv_forward, "backward": conv_backward},
            {"gelu_gradient": gelu_gradient, "sum_columns": lambda x: x.sum(0)},
        )
    )
)

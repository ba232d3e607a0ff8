"""The two halves of a map block as one function each; of autograd's graph one node each.

As operations a block of VMamba is 17 nodes, most of them views and products, and the gradient of the stream is added up
by a kernel of its own. These functions call those of which the operations are made, forwards and backwards. vmamba_tiny
with 128 images on an H100, as operations and so: training 72.9 and 63.1 ms called from Python on a slow host (medians
of 12 turns), 33.1 and 32.9 as a graph; inference 22.2 and 20.6, 11.8 and 11.7 (`benchmarks/results/blocks_h100.csv`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from ..kernels._arguments import DTYPES, as_dtype, contiguous
from ..kernels._backend import gpu_backend, implementation
from ..kernels._op import Alone, Part, applied, differentiable_once, differentiated, watched
from ..kernels.add_norm import AddNorm
from ..kernels.depthwise_conv2d import DepthwiseConv2d
from ..kernels.mlp import Mlp
from ..scans import scan_order
from ._block import LayerNorm, LeanMlp, are_as_built, branch_scale, linear_dtype, skip_rate
from ._depthwise import DepthwiseConv
from ._findings import findings
from ._mixer import SS2D
from ._projected_scan import ProjectedScan
from ._recompute import worth_making_again
from ._ssm import DirectionLinear, SelectiveSSM

DEVICES = ("cuda",)  # where the functions are taken; () takes them nowhere
_Types = dict[str, type | tuple[type, ...]]
_MIXER_LAYERS: _Types = {
    "norm1": LayerNorm, "mixer": SS2D, "mixer.in_proj": nn.Linear, "mixer.conv": DepthwiseConv,
    "mixer.ssm": SelectiveSSM, "mixer.ssm.x_proj": DirectionLinear, "mixer.ssm.dt_proj": DirectionLinear,
    "mixer.out_norm": LayerNorm, "mixer.out_proj": nn.Linear,
}  # fmt: skip
_MIXER_WEIGHTS = (
    "norm1.weight", "norm1.bias", "mixer.in_proj.weight", "mixer.conv.weight", "mixer.conv.bias",
    "mixer.ssm.x_proj.weight", "mixer.ssm.dt_proj.weight", "mixer.ssm.dt_bias", "mixer.ssm.A_log", "mixer.ssm.D",
    "mixer.out_norm.weight", "mixer.out_norm.bias", "mixer.out_proj.weight",
)  # fmt: skip
_MLP_LAYERS: _Types = {
    "norm2": LayerNorm, "mlp": LeanMlp, "mlp.fc1": nn.Linear, "mlp.fc2": nn.Linear,
    "drop_path2": (nn.Identity, DropPath),
}  # fmt: skip
_MLP_WEIGHTS = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def mixed(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """`x` and `mixer(norm1(x))` of a `MapBlock` with an `SS2D` without a gate.

    Args:
        block: A `MapBlock`.
        x: A map `(b, h, w, dim)`; what comes later has to take the one that is returned.

    Returns:
        None where the layers have to be called themselves: on other devices, if they are others or anybody looks on, or
        if only some of them learn.
    """
    if x.device.type not in DEVICES or torch.compiler.is_compiling():
        return None
    layers = _layers(block, _MIXER_LAYERS, _MIXER_WEIGHTS)
    if layers is None:
        return None
    norm, mixer, to_inner, conv, *_, out_norm, from_inner = layers.found
    tokens = x.shape[1:3]
    if mixer.gate or conv.activation != "silu" or tokens.numel() == 1:  # a single token goes a shorter way
        return None
    if to_inner._parameters.get("bias", x) is not None or from_inner._parameters.get("bias", x) is not None:
        return None
    weights = layers.weights()
    if weights is None or not conv.has_kernels():
        return None
    norm_weight, norm_bias, to, taps, tap_bias, to_maps, to_steps, *_, out_weight, out_bias, back = weights
    if norm_weight is None or out_weight is None:
        return None
    inner = len(to)
    # Kernels look at addresses alone. A single channel goes a shorter way.
    if inner == 1 or not (_are((x.shape[-1],), norm_weight, norm_bias) and len(back) == x.shape[-1]):
        return None
    if not (_are((inner,), out_weight, out_bias, tap_bias) and taps.shape[:2] == (inner, 1)):
        return None
    kernels = _kernels((x, *weights), (to, to_maps, to_steps, back), x)
    if kernels is None:
        return None
    order = scan_order(mixer.scan, tuple(tokens), x.device)
    return applied(_Mixed, _How(kernels, linear_dtype(x), norm.eps, out_norm.eps, order), x, *weights)


def with_mlp(block: nn.Module, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor | None:
    """`s + drop_path2(mlp(norm2(s)))` of `s = x + scale * branch`, and of a `MapBlock`.

    Args:
        block: A `MapBlock`.
        x: A map `(b, h, w, dim)`.
        branch: Likewise.
        scale: `(b,)`, or None for ones.

    Returns:
        None as for `mixed`.
    """
    if x.device.type not in DEVICES or torch.compiler.is_compiling():
        return None
    layers = _layers(block, _MLP_LAYERS, _MLP_WEIGHTS)
    if layers is None:
        return None
    norm, mlp, *_, drop_path = layers.found
    weights = layers.weights()
    if weights is None or not mlp.is_ordinary() or getattr(drop_path, "scale_by_keep", True) is False:
        return None
    if branch.shape != x.shape or weights[0] is None or not _are((x.shape[-1],), weights[0], weights[1]):
        return None
    kernels = _kernels((x, branch, *weights), weights[2:], branch)
    if kernels is None:
        return None
    dropped = branch_scale(branch, skip_rate(drop_path))
    return applied(_WithMlp, _How(kernels, linear_dtype(branch), norm.eps), x, branch, scale, dropped, *weights)


class _Layers:
    """Layers that a function stands for, looked up once: `nn.Module.__getattr__` is slow."""

    def __init__(self, block: nn.Module, types: _Types, weights: tuple[str, ...]):
        self._places, self._weights = [], []
        self.found: list[Any] = []
        for path, kind in types.items():
            parent, _, name = path.rpartition(".")
            modules = block.get_submodule(parent)._modules
            layer = modules.get(name)
            self.found.append(layer)
            self._places.append((modules, name, layer, type(layer)))
            if (type(layer) not in kind) if isinstance(kind, tuple) else type(layer) is not kind:
                self.fit = False
                return
        self.fit = True
        for path in weights:
            parent, _, name = path.rpartition(".")
            self._weights.append((block.get_submodule(parent)._parameters, name))

    def are_there(self) -> bool:
        """Whether they still are what the block calls."""
        for modules, name, layer, kind in self._places:
            if modules.get(name) is not layer or type(layer) is not kind:  # parametrizing changes the class
                return False
        return True

    def weights(self) -> list[Any] | None:
        """As they are now; None if one is no parameter, but was put in the place of one."""
        found = []
        for parameters, name in self._weights:
            if name not in parameters:
                return None
            found.append(parameters[name])
        return found


def _layers(block: nn.Module, types: _Types, weights: tuple[str, ...]) -> _Layers | None:
    """The layers if they are of these types and nobody would see them called."""
    known = findings(block)
    layers = known.get(weights)
    if layers is None or not layers.are_there():
        layers = known[weights] = _Layers(block, types, weights)
    return layers if layers.fit and are_as_built(*layers.found) else None


def _are(shape: tuple[int, ...], *weights: Tensor | None) -> bool:
    for weight in weights:  # noqa: SIM110 (all() over a generator takes twice as long)
        if weight is not None and weight.shape != shape:
            return False
    return True


class _Kernels(NamedTuple):
    norm: ModuleType
    conv: ModuleType
    mlp: ModuleType


def _kernels(given: tuple[Tensor | None, ...], products: Sequence[Tensor | None], x: Tensor) -> _Kernels | None:
    """What computes on `given` if nobody looks on, all are where `x` is, all learn or none, and torch would multiply
    `x` by `products`.
    """
    dtype = linear_dtype(x)
    if watched(given) or not 0 < x.numel() < 2**31:
        return None
    if not torch.is_autocast_enabled(x.device.type):
        for weight in products:
            if weight is not None and weight.dtype != dtype:
                return None
    learned = differentiated(given)
    for tensor in given:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES or tensor.device != x.device or (learned and not tensor.requires_grad):
            return None
    return _serving(dtype)


def _serving(dtype: torch.dtype) -> _Kernels | None:
    names = ("add_norm", "depthwise_conv2d", "mlp")
    found = [gpu_backend(dtype, name) for name in names]
    return None if "reference" in found else _Kernels(*map(implementation, found, names))


class _How(NamedTuple):
    """What the functions are told beside tensors with gradients."""

    kernels: _Kernels
    dtype: torch.dtype
    eps: float
    out_eps: float = 0.0
    order: Tensor | None = None


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, x, weight, bias, to_inner, taps, tap_bias, *rest):
        *of_scan, out_weight, out_bias, from_inner = rest
        part = Alone if type(ctx) is Alone else Part
        norm, conv, scan, out_norm = parts = part(AddNorm), part(DepthwiseConv2d), part(ProjectedScan), part(AddNorm)
        to_inner, from_inner = as_dtype(to_inner, how.dtype), as_dtype(from_inner, how.dtype)
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            y = norm.forward(how.kernels.norm, x, None, None, weight, bias, how.eps, False, how.dtype)
            maps = (*x.shape[:3], len(to_inner))
            u = conv.forward(how.kernels.conv, (_rows(y) @ to_inner.t()).view(maps), taps, tap_bias, True)
            u = u.flatten(1, 2)
            s = scan.forward((how.order, "sum", None), u, None, *of_scan)
            normed = out_norm.forward(
                how.kernels.norm, s, None, None, out_weight, out_bias, how.out_eps, False, how.dtype
            )
            found = x, (_rows(normed) @ from_inner.t()).view(x.shape)
        if part is Part:
            if worth_making_again(u):
                scan.saved_tensors = (None, *scan.saved_tensors[1:])
            y, normed = (None if worth_making_again(t) else t for t in (y, normed))
            _keep(ctx, parts, y, normed, bias, out_bias, to_inner, from_inner)
        return found

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dx: Tensor, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (y, normed, bias, out_bias, to_inner, from_inner), (norm, conv, scan, out_norm) = _kept(ctx)
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            dy = _rows(dy)
            dfrom_inner = dy.t() @ _rows(AddNorm.normed(out_norm, out_bias) if normed is None else normed)
            dnormed = (dy @ from_inner).view(out_norm.saved_tensors[0].shape)
            _, ds, _, _, dout_weight, dout_bias, *_ = out_norm.backward(dnormed)
            if scan.saved_tensors[0] is None:
                u = DepthwiseConv2d.convolved(conv).flatten(1, 2)
                scan.saved_tensors = (u, *scan.saved_tensors[1:])
            _, du, _, *dscan = scan.backward(ds)
            _, dinner, dtaps, dtap_bias, _ = conv.backward(du.view(conv.saved_tensors[0].shape))
            dinner = _rows(dinner)
            dto_inner = dinner.t() @ _rows(AddNorm.normed(norm, bias) if y is None else y)
            dy = (dinner @ to_inner).view(dx.shape)
            _, dx, _, _, dweight, dbias, *_ = norm.backward(dx, dy)
        return None, dx, dweight, dbias, dto_inner, dtaps, dtap_bias, *dscan, dout_weight, dout_bias, dfrom_inner


class _WithMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, x, branch, scale, dropped, weight, bias, *of_mlp):
        part = Alone if type(ctx) is Alone else Part
        norm, mlp = parts = part(AddNorm), part(Mlp)
        of_mlp = [t if t is None else as_dtype(t, how.dtype) for t in of_mlp]
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            stream, y = norm.forward(how.kernels.norm, x, branch, scale, weight, bias, how.eps, False, how.dtype)
            out = mlp.forward(how.kernels.mlp, y, *of_mlp)
            if dropped is not None:
                out = out * _per_sample(dropped, out)
        if part is Part:
            if worth_making_again(y):
                mlp.saved_tensors = (None, *mlp.saved_tensors[1:])
            _keep(ctx, parts, bias, dropped)
        return stream + out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (bias, dropped), (norm, mlp) = _kept(ctx)
        with torch._C._DisableAutocast():  # pyright: ignore[reportAttributeAccessIssue]
            dout = as_dtype(dy, norm.out_dtype)
            if dropped is not None:
                dout = dout * _per_sample(dropped, dout)
            if mlp.saved_tensors[0] is None:
                mlp.saved_tensors = (AddNorm.normed(norm, bias), *mlp.saved_tensors[1:])
            _, dnormed, *dmlp = mlp.backward(dout)
            dstream = as_dtype(dy, norm.saved_tensors[0].dtype)  # what the MLP adds may be wider
            _, dx, dbranch, _, dweight, dbias, *_ = norm.backward(dstream, dnormed)
        return None, dx, dbranch, None, None, dweight, dbias, *dmlp


def _rows(x: Tensor) -> Tensor:
    """A map `(b, h, w, d)` or tokens `(b, l, d)` as the rows of a matrix."""
    return contiguous(x).view(-1, x.shape[-1])


def _per_sample(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _keep(ctx: Any, parts: tuple[Any, ...], *tensors: Tensor | None) -> None:
    """Have torch keep what the parts have saved and other tensors."""
    saved = [*tensors]
    for part in parts:
        saved += part.saved_tensors
    ctx.counts = [len(part.saved_tensors) for part in parts]
    ctx.parts = [part.with_tensors(()) for part in parts]
    ctx.save_for_backward(*saved)


def _kept(ctx: Any) -> tuple[list[Any], list[Any]]:
    """What `_keep` was given."""
    saved = [*ctx.saved_tensors]
    parts = []
    start = len(saved) - sum(ctx.counts)
    tensors = saved[:start]
    for part, count in zip(ctx.parts, ctx.counts, strict=True):
        parts.append(part.with_tensors(saved[start : start + count]))
        start += count
    return tensors, parts

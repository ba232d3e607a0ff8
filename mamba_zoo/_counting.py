"""How many operations one pass takes, counted from shapes on the meta device, and how authors count theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .backbones._identify import published_cfg
from .backbones._ssm import CausalConv1d, SelectiveSSM


@dataclass(frozen=True)
class Operations:
    """Of one forward pass for one input.

    Attributes:
        products: Multiply-adds of matrix products and convolutions that are in none of the parts below.
        inner: Multiply-adds within state-space layers: their causal convolutions and the projections that give step
            sizes, B and C. A fused mixer hides them from counters that follow torch's own ops.
        attention: Multiply-adds of queries with keys and of weights with values.
        scan: Operations of the scans by their formula, `9 b m d n` and `b m d` for each of `D` and the gate; see
            `mamba_zoo.kernels.flops`. Not multiply-adds.
        norms: Operations of layer norms, 5 an element (4 without weights), and of batch norms, 2 (1). Root mean square
            norms, activations and sums are not counted, here as in published figures.
    """

    products: float
    inner: float
    attention: float
    scan: float
    norms: float

    @property
    def multiply_adds(self) -> float:
        """Products and convolutions, and half of the scans' operations: half of torch's `FlopCounterMode` total."""
        return self.products + self.inner + self.attention + self.scan / 2


@dataclass(frozen=True)
class Convention:
    """A way to count that authors used.

    Attributes:
        total: What they state, of what is counted here.
        text: The same in words.
    """

    total: Callable[[Operations], float]
    text: str


CONVENTIONS: dict[str, Convention] = {
    "whole scan": Convention(
        lambda n: n.products + n.inner + n.attention + n.scan + n.norms,
        "multiply-adds of products and convolutions, plus all 9 b m d n + b m d operations of the scan, plus those of "
        "norms (VMamba's use of fvcore)",
    ),
    "no scan": Convention(
        lambda n: n.products + n.inner + n.attention + n.norms,
        "multiply-adds of products and convolutions, plus the operations of norms; the scan is left out",
    ),
    "nothing fused": Convention(
        lambda n: n.products + n.inner + n.norms,
        "multiply-adds of products and convolutions, plus the operations of norms; the scan and the products of "
        "attention are left out",
    ),
    "outside mixers": Convention(
        lambda n: n.products + n.norms,
        "multiply-adds of the patches, of each mixer's two outer projections and of the classifier; all in between, "
        "which one fused op computes, is left out",
    ),
}


def count_operations(model: nn.Module, *inputs: Tensor) -> Operations:
    """Of one pass of `model`, in its present mode, over `inputs` of one sample, on whatever device they are."""
    counter = FlopCounterMode(display=False, custom_mapping=_NORMS)
    # torch has no formula for each of the fused kernels that attention may choose.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    everywhere = {str(op): n for op, n in counts["Global"].items()}
    scan = sum(n for op, n in everywhere.items() if _is_scan(op))
    norms = sum(n for op, n in everywhere.items() if op in _NORM_NAMES)
    attention = inner = 0
    for name, module in model.named_modules():
        here = {str(op): n for op, n in counts.get(f"{root}.{name}" if name else root, {}).items()}
        if isinstance(module, Attention):
            attention += sum(n for op, n in here.items() if op == "aten.bmm")
        elif isinstance(module, (CausalConv1d, SelectiveSSM)):
            inner += sum(n for op, n in here.items() if not _is_scan(op) and op not in _NORM_NAMES)
    products = sum(everywhere.values()) - scan - norms - attention - inner
    return Operations(products / 2, inner / 2, attention / 2, scan, norms)


def default_input(model: Any) -> Tensor | None:
    """Random input for one pass of `model` at its published size, `(1, ...)` on its device.

    The size is that of the published configuration, or what `model.input_shape()` gives by itself; None without either.
    """
    size = published_cfg(model).input_size
    if hasattr(model, "input_shape"):
        shape = model.input_shape(*(size or ())[-2:])
    elif size is not None:
        shape = tuple(size)
    else:
        return None
    parameter = next(model.parameters())
    return torch.randn(1, *shape, device=parameter.device, dtype=parameter.dtype)


def _is_scan(op: str) -> bool:
    return op.startswith("mamba_zoo.") and "conv" not in op


def _layer_norm(x: Any, normalized: Any, weight: Any = None, *_: Any, **__: Any) -> int:
    return math.prod(x) * (4 if weight is None else 5)


def _batch_norm(x: Any, weight: Any = None, *_: Any, **__: Any) -> int:
    return math.prod(x) * (1 if weight is None else 2)


_NORMS = {
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten.native_batch_norm: _batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training: _batch_norm,
    torch.ops.aten.cudnn_batch_norm: _batch_norm,
}
_NORM_NAMES = frozenset(map(str, _NORMS))

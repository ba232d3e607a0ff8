"""The ops that everything stands on: order-indexed scans and convolutions, each with several implementations."""

from . import flops  # registers the formulas
from ._backend import BACKENDS, refusals, use
from .add_norm import add_norm
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .depthwise_conv2d import depthwise_conv2d
from .selective_scan import selective_scan, selective_scan_step
from .ssd import ssd, ssd_step

__all__ = [
    "BACKENDS",
    "add_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "depthwise_conv2d",
    "flops",
    "refusals",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "use",
]

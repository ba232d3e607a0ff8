"""The ops that everything stands on: order-indexed scans and convolutions, each with several implementations."""

from ._backend import BACKENDS, refusals, use
from .selective_scan import selective_scan, selective_scan_step

__all__ = ["BACKENDS", "refusals", "selective_scan", "selective_scan_step", "use"]

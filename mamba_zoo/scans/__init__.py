"""The orders in which tokens are visited: named, composed, or a user's own; the same tables for every model."""

from . import curve, grid, volume  # noqa: F401 - registers their scans
from ._registry import (
    SCANS,
    ScanEntry,
    ScanLike,
    as_spec,
    build_scan,
    list_scans,
    register_scan,
    scan_order,
    unregister_scan,
)
from .compose import both_ways, filled, first, join, reverse, transpose, with_token
from .core import Scan

__all__ = [
    "SCANS",
    "Scan",
    "ScanEntry",
    "ScanLike",
    "as_spec",
    "both_ways",
    "build_scan",
    "filled",
    "first",
    "join",
    "list_scans",
    "register_scan",
    "reverse",
    "scan_order",
    "transpose",
    "unregister_scan",
    "with_token",
]

"""The orders in which tokens are visited: named, composed, or a user's own; the same tables for every model."""

from . import curve, graph, grid, series, spectrogram, volume  # noqa: F401 - registers their scans
from ._names import ScanEntry
from ._registry import (
    SCANS,
    ScanLike,
    as_spec,
    build_scan,
    list_scans,
    register_sample_order,
    register_scan,
    scan_order,
    unregister_scan,
)
from .compose import both_ways, filled, first, join, reverse, transpose, with_token
from .core import Scan
from .graph import Graphs, graph_order, graph_scan, register_graph_order
from .points import point_order, register_point_order
from .series import correlation_scan, permuted_spec, with_correlation

__all__ = [
    "SCANS",
    "Graphs",
    "Scan",
    "ScanEntry",
    "ScanLike",
    "as_spec",
    "both_ways",
    "build_scan",
    "correlation_scan",
    "filled",
    "first",
    "graph_order",
    "graph_scan",
    "join",
    "list_scans",
    "permuted_spec",
    "point_order",
    "register_graph_order",
    "register_point_order",
    "register_sample_order",
    "register_scan",
    "reverse",
    "scan_order",
    "transpose",
    "unregister_scan",
    "with_correlation",
    "with_token",
]

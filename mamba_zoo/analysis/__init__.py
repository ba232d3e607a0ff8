"""Looking inside: which pixels a feature depends on, and what each direction of a scan brings to a token."""

from .pictures import plot_receptive_fields, plot_scan_maps
from .receptive import contribution_area, receptive_field
from .record import RecordedScan, record_scans

__all__ = [
    "RecordedScan",
    "contribution_area",
    "plot_receptive_fields",
    "plot_scan_maps",
    "receptive_field",
    "record_scans",
]

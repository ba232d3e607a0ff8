"""Compare scan orders on your own data: equal budget, several seeds, controls, and statistics that admit noise.

from mamba_zoo import compare

result = compare.orders(model="vmamba_mini", data="digits", scans=("cross", "hilbert"), seeds=5, out="runs/compare")
print("\\n".join(result.verdict))
"""

from __future__ import annotations

from .tasks._comparison import Comparison, Metric, Order, Run
from .tasks.compare import load, orders

__all__ = ["Comparison", "Metric", "Order", "Run", "load", "orders"]

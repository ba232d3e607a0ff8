"""Compare scan orders on your own data: equal budget, several seeds, controls, and statistics that admit noise.

`orders` trains and compares, `load` reads a comparison back; both return a `Comparison`, whose `verdict` says in plain
sentences what was found. `mamba-zoo compare` is the same from the command line.
"""

from __future__ import annotations

from .tasks._comparison import Comparison, Metric, Order, Run
from .tasks.compare import load, orders

__all__ = ["Comparison", "Metric", "Order", "Run", "load", "orders"]

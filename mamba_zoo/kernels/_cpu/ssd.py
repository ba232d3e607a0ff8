"""The state-space dual on the CPU: products of matrices, which torch's own library computes best."""

from .._ssd_chunked import backward, forward

__all__ = ["backward", "forward"]

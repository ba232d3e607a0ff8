"""The causal convolution on the CPU."""

from .._reference.causal_conv1d import backward, forward

__all__ = ["backward", "forward"]

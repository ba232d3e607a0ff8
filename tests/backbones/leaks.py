"""Whether a call leaves tensors behind."""

import gc
from collections.abc import Callable

import torch


def assert_nothing_stays(call: Callable[[], object]) -> None:
    """Tensors are as many after the third call as after the second."""
    counts = []
    for _ in range(3):
        call()
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] == counts[2]

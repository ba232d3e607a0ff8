"""Published checkpoint keys to ours, through a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Key:
    """One row of a key table.

    Args:
        pattern: Regular expression, searched in the published key.
        name: What replaces the match: a template as for `re.sub`, or a function of the match.
        slot: The direction this tensor becomes in a stacked parameter; None is a whole parameter.
        convert: Applied to the tensor, e.g. to drop an axis of size 1.
    """

    pattern: str
    name: str | Callable[[re.Match[str]], str]
    slot: int | None = None
    convert: Callable[[Tensor], Tensor] | None = None


def rename(state_dict: dict[str, Tensor], keys: Sequence[Key]) -> dict[str, Tensor]:
    """Apply a key table.

    The rows are tried in order on every key, and each that matches rewrites it. Keys that no row matches stay, so that
    a state dict in our own names passes through. Tensors with a slot are stacked along a new first axis.

    Raises:
        ValueError: two keys end in the same name, or a stacked parameter lacks a direction.
    """
    parts: dict[str, dict[int | None, Tensor]] = {}
    for old, value in state_dict.items():
        name, slot = old, None
        for key in keys:
            new, found = re.subn(key.pattern, key.name, name)
            if found:
                name = new
                slot = slot if key.slot is None else key.slot
                value = value if key.convert is None else key.convert(value)
        if slot in parts.setdefault(name, {}):
            raise ValueError(f"checkpoint key {old!r} and another both mean {name!r}")
        parts[name][slot] = value
    return {name: _stack(name, slots) for name, slots in parts.items()}


def _stack(name: str, slots: dict[int | None, Tensor]) -> Tensor:
    if None in slots and len(slots) == 1:
        return slots[None]
    if set(slots) != set(range(len(slots))):
        raise ValueError(f"checkpoint has directions {list(slots)} of {name!r}, not 0 to {len(slots) - 1}")
    return torch.stack([slots[i] for i in range(len(slots))])

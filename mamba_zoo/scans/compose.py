"""Scans made from scans: both ways, reversed, transposed, some directions only, joined, with more tokens.

Each takes and returns a `Scan`, and is usable inside a spec: `"both_ways(transpose(hilbert))"`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import Scan


class Composition(NamedTuple):
    """A function of scans, and the grid its scans must have for the result to have the grid `size`."""

    function: Callable[..., Scan]
    inner_size: Callable[..., tuple[int, ...]]


def both_ways(scan: Scan) -> Scan:
    """`k` directions to `2k`: the given ones, then each of them reversed.

    Example:
        >>> both_ways(Scan(torch.tensor([[0, 1, 2]]), 3)).order.tolist()
        [[0, 1, 2], [2, 1, 0]]
    """
    return _with(scan, torch.cat([scan.order, scan.order.flip(-1)]), f"both_ways({scan.name})")


def reverse(scan: Scan) -> Scan:
    """Every direction from its last step to its first, empty steps included."""
    return _with(scan, scan.order.flip(-1), f"reverse({scan.name})")


def first(scan: Scan, k: int = 1) -> Scan:
    """The first `k` directions only.

    Raises:
        ValueError: the scan has fewer.
    """
    if not 1 <= k <= scan.k:
        raise ValueError(f"first(scan, k={k}) is impossible: {scan.name!r} has {scan.k} directions")
    return _with(scan, scan.order[:k], f"first({scan.name}, {k})")


def join(*scans: Scan) -> Scan:
    """The directions of several scans over the same tokens; shorter ones get empty steps at their end.

    The first scan decides how directions are reduced.

    Raises:
        ValueError: the scans are of different grids.
    """
    if not scans:
        raise ValueError("join() needs at least one scan")
    lead = scans[0]
    if other := [s for s in scans if (s.length, s.size, s.extra) != (lead.length, lead.size, lead.extra)]:
        raise ValueError(f"join needs scans over the same tokens, but got {lead!r} and {other[0]!r}")
    m = max(scan.m for scan in scans)
    order = torch.cat([F.pad(scan.order, (0, m - scan.m), value=-1) for scan in scans])
    return _with(lead, order, f"join({', '.join(scan.name for scan in scans)})")


def transpose(scan: Scan, axes: Sequence[int] | None = None) -> Scan:
    """The same walk on the grid with its axes exchanged.

    In Python, a scan of a grid `(a, b)` becomes one of `(b, a)`. In a spec, `"transpose(x)"` for a grid `(h, w)` builds
    `x` for `(w, h)` first, so that the result fits the grid.

    Args:
        scan: Of the grid before; without extra tokens.
        axes: Axis `i` of its grid is axis `axes[i]` of the result; None reverses the axes.

    Example:
        >>> rows = Scan(torch.arange(6)[None], 6, size=(2, 3))
        >>> transpose(rows).order.tolist(), transpose(rows).size
        ([[0, 2, 4, 1, 3, 5]], (3, 2))
    """
    if not scan.size or scan.extra:
        raise ValueError(
            f"transpose needs a scan of a plain grid, not {scan!r}; add a token afterwards: with_token(transpose(...))"
        )
    axes = _axes(len(scan.size), axes)
    size = [0] * len(axes)
    for i, axis in enumerate(axes):
        size[axis] = scan.size[i]
    token = torch.arange(scan.length).view(size).permute(axes).reshape(-1).to(scan.order.device)
    order = torch.where(scan.order < 0, -1, token[scan.order])  # -1 reads the last token, and is masked
    return _with(scan, order, f"transpose({scan.name})", size=tuple(size))


def with_token(scan: Scan, position: int | str = "middle", unpaired: str = "there") -> Scan:
    """Insert one more token, such as a class token, at index `position` of the sequence.

    Tokens at `position` and after move up by one. Each direction visits the new token at step `position` (at its end,
    if it is shorter); a direction that is the reverse of an earlier one stays its reverse. Vim (arXiv:2401.09417) with
    its class token in the middle of 196 patches is `"with_token(bidirectional, 98)"`: the second direction is the flip
    of the whole sequence, class token included.

    Args:
        scan: Over the other tokens.
        position: From 0 to `l`, or "middle" for `l // 2`.
        unpaired: When directions that no other direction reverses visit the new token: "there", at step `position`, or
            "last". What such a direction visits after the token never reaches it.

    Example:
        >>> with_token(both_ways(Scan(torch.tensor([[0, 1, 2]]), 3)), 1).order.tolist()
        [[0, 1, 2, 3], [3, 2, 1, 0]]
    """
    l = scan.length
    p = l // 2 if position == "middle" else position
    if not isinstance(p, int) or not 0 <= p <= l:
        raise ValueError(f"with_token: position={position!r} must be 'middle' or an index from 0 to {l}")
    if unpaired not in ("there", "last"):
        raise ValueError(f"with_token: unpaired={unpaired!r} must be 'there' or 'last'")
    moved = torch.where(scan.order >= p, scan.order + 1, scan.order)
    token = moved.new_tensor([p])
    rows: list[Tensor] = []
    for i, row in enumerate(scan.order):
        mirrors = [j for j in range(scan.k) if j != i and torch.equal(scan.order[j].flip(0), row)]
        if mirrors and mirrors[0] < i:
            rows.append(rows[mirrors[0]].flip(0))
            continue
        step = min(p, scan.m) if mirrors or unpaired == "there" else scan.m
        rows.append(torch.cat([moved[i, :step], token, moved[i, step:]]))
    extra = tuple(sorted((*(t + (t >= p) for t in scan.extra), p)))
    options = repr(position) if unpaired == "there" else f"{position!r}, {unpaired!r}"
    return _with(scan, torch.stack(rows), f"with_token({scan.name}, {options})", length=l + 1, extra=extra)


def filled(scan: Scan) -> Scan:
    """Give the empty steps tokens of their own, appended after the others; for padding that takes part in a model.

    There are `max(m - l, 0)` of them, as many as a direction that visits all `l` tokens has empty steps; further empty
    steps stay empty.

    Example:
        >>> filled(Scan(torch.tensor([[0, -1, 1, -1], [-1, -1, 1, 0]]), 2)).order.tolist()
        [[0, 2, 1, 3], [2, 3, 1, 0]]
    """
    more = max(scan.m - scan.length, 0)
    number = (scan.order < 0).cumsum(-1) - 1
    order = torch.where((scan.order < 0) & (number < more), scan.length + number, scan.order)
    length = scan.length + more
    extra = (*scan.extra, *range(scan.length, length))
    return _with(scan, order, f"filled({scan.name})", length=length, extra=extra)


def _same(size: tuple[int, ...], *_: Any, **__: Any) -> tuple[int, ...]:
    return size


def _before_transpose(size: tuple[int, ...], axes: Sequence[int] | None = None) -> tuple[int, ...]:
    return tuple(size[axis] for axis in _axes(len(size), axes))


def _axes(dimensions: int, axes: Sequence[int] | None) -> tuple[int, ...]:
    found = tuple(range(dimensions))[::-1] if axes is None else tuple(axes)
    if sorted(found) != list(range(dimensions)):
        raise ValueError(f"transpose: axes={axes!r} must hold each of 0..{dimensions - 1} once")
    return found


def _with(scan: Scan, order: Tensor, name: str, **changes: Any) -> Scan:
    return dataclasses.replace(scan, order=order, name=name, **changes)


COMPOSITIONS = {
    "both_ways": Composition(both_ways, _same),
    "reverse": Composition(reverse, _same),
    "first": Composition(first, _same),
    "join": Composition(join, _same),
    "transpose": Composition(transpose, _before_transpose),
    "with_token": Composition(with_token, _same),
    "filled": Composition(filled, _same),
}

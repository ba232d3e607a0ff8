"""Specs of the orders of points, which follow from where the points of each cloud are.

Scans of grids are one table for all samples; here every cloud has its own, made on the device of its points. The names
are the modality's own ("hilbert" is an order of pixels there and one of points here); specs are written alike:
`"join(hilbert, hilbert_trans)"`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels._order import trust_order
from ._names import Book, ScanEntry, parse, sample_entry
from .core import uncompiled

PointScanLike: TypeAlias = "str | Callable[..., Tensor]"


def _both_ways(order: Tensor) -> Tensor:
    """The directions, then each of them reversed."""
    return torch.cat([order, order.flip(-1)], dim=1)


def _reverse(order: Tensor) -> Tensor:
    """Every direction from its last step to its first."""
    return order.flip(-1)


def _first(order: Tensor, k: int = 1) -> Tensor:
    """The first `k` directions only."""
    if not 1 <= k <= order.shape[1]:
        raise ValueError(f"first(scan, k={k}) is impossible: the scan has {order.shape[1]} directions")
    return order[:, :k]


def _join(*orders: Tensor) -> Tensor:
    """The directions of several scans."""
    return torch.cat(orders, dim=1)


POINTS = Book(
    "scan of points", "hilbert", "the points",
    {"both_ways": _both_ways, "reverse": _reverse, "first": _first, "join": _join},
)  # fmt: skip


def cloud_spec(scan: PointScanLike) -> str:
    """A string that stands for `scan`, so that modules and configurations only ever hold a string.

    Args:
        scan: A spec such as "hilbert", "cts('xzy')" or "both_ways(hilbert)", or a function like those of
            `register_point_order`, which gets a name like those of `as_spec`.

    Raises:
        ValueError: a spec that does not parse, or names an unknown scan or option.
        TypeError: neither a string nor a function.
    """
    if isinstance(scan, str):
        tree = parse(scan)
        _resolve(tree, scan)
        return ast.unparse(tree)
    if not callable(scan):
        raise TypeError(f"a scan of points must be a name, a spec or a function, not {type(scan).__name__}")
    return POINTS.name_of(scan, lambda: sample_entry(scan, "points"))


@uncompiled
def cloud_order(spec: str, xyz: Tensor) -> Tensor:
    """The table `(b, k, n)` of a spec from `cloud_spec`, for points `(b, n, 3)`."""
    return _resolve(parse(spec), spec)(xyz)


def trusted(order: Tensor, l: int) -> Tensor:
    """`order` itself, noted as sound: a sort makes permutations, so that no kernel needs to read the table back.

    Args:
        order: `(b, k, l)` or `(k, l)`, every row a permutation of the `l` tokens.
        l: Tokens.
    """
    if not torch.compiler.is_compiling():
        trust_order(order, l)
    return order


def _resolve(tree: ast.expr, spec: str) -> Callable[[Tensor], Tensor]:
    """Check names and arguments; return the function from points to their table."""

    def order(name: str, entry: ScanEntry, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        return lambda xyz: _table(name, entry.function(xyz, **options), xyz)

    def compose(name: str, inner: list[Any], values: list[Any], options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        return lambda xyz: POINTS.compositions[name](*(build(xyz) for build in inner), *values, **options)

    return POINTS.resolve(tree, spec, order, compose)


def _table(name: str, order: Any, xyz: Tensor) -> Tensor:
    if (
        not isinstance(order, Tensor)
        or order.dtype != torch.int64
        or (
            order.shape not in (xyz.shape[:2],)
            and (order.dim() != 3 or (order.shape[0], order.shape[2]) != xyz.shape[:2])
        )
    ):
        found = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        b, n, _ = xyz.shape
        raise TypeError(f"scan {name!r} must return int64 indices ({b}, {n}) or ({b}, k, {n}), not {found}")
    return order if order.dim() == 3 else order[:, None]


def rows_of(spec: str) -> list[tuple[str, int]]:
    """The directions of a spec from `cloud_spec`, each as a spec and a row of its table, so that one can be made alone.

    Example:
        >>> from mamba_zoo.scans import points
        >>> rows_of("join(hilbert, both_ways(sort_x))")
        [('hilbert', 0), ('both_ways(sort_x)', 0), ('both_ways(sort_x)', 1)]
    """
    tree = parse(spec)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "join":
        return [row for inner in tree.args for row in rows_of(ast.unparse(inner))]
    return [(spec, row) for row in range(directions(spec))]


def with_option(spec: str, option: str) -> str:
    """A spec of one order with an option more.

    Example:
        >>> with_option("hilbert", "cell=0.1"), with_option("cts('xzy')", "cell=0.1")
        ('hilbert(cell=0.1)', "cts('xzy', cell=0.1)")
    """
    name, _, options = spec.removesuffix(")").partition("(")
    return f"{name}({options}{', ' if options else ''}{option})"


def directions(spec: str) -> int:
    """Directions of a spec from `cloud_spec`."""
    with torch.device("cpu"):  # whatever default device a model is built under: some orders read values
        return cloud_order(spec, torch.linspace(0, 1, 48).view(1, 16, 3)).shape[1]

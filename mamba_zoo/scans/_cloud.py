"""Names and specs of the orders of points, which follow from where the points of each cloud are.

Scans of grids are one table for all samples; here every cloud has its own, made on the device of its points. The names
are the modality's own ("hilbert" is an order of pixels there and one of points here); specs are written alike:
`"join(hilbert, hilbert_trans)"`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels._order import trust_order
from ._registry import _identifier, _literal, _parse

PointScanLike: TypeAlias = "str | Callable[..., Tensor]"


@dataclass(frozen=True)
class PointScan:
    """A registered order of points: its function, and its options in order."""

    function: Callable[..., Tensor]
    options: tuple[str, ...]


POINT_SCANS: dict[str, PointScan] = {}
_anonymous: dict[str, PointScan] = {}
_numbers = itertools.count(1)


def register_point_scan(name: str, replace: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: give an order of points a name, usable wherever a scan of points is expected.

    The function takes coordinates `(b, n, 3)`, and options with defaults. It returns point indices `(b, n)`, or
    `(b, k, n)` for k directions; every row must be a permutation.

    Args:
        name: A Python identifier that does not start with an underscore.
        replace: Take over a name that is taken.

    Raises:
        ValueError: the name is taken or is no identifier.

    Example:
        >>> @register_point_scan("top_down", replace=True)
        ... def top_down(xyz):
        ...     return xyz[..., 2].argsort(dim=-1, descending=True, stable=True)
        >>> cloud_spec("both_ways(top_down)")
        'both_ways(top_down)'
        >>> unregister_point_scan("top_down")
    """
    if not name.isidentifier() or name.startswith("_") or name in _COMPOSITIONS:
        raise ValueError(f"scan name {name!r} must be a Python identifier without leading '_', and no composition")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in POINT_SCANS and not replace:
            raise ValueError(f"the scan name {name!r} is taken; choose another, or pass replace=True to take it over")
        POINT_SCANS[name] = _entry(function)
        return function

    return register


def unregister_point_scan(name: str) -> None:
    """Remove a registered order of points."""
    if name not in POINT_SCANS:
        raise ValueError(_unknown(name, name))
    del POINT_SCANS[name]


def cloud_spec(scan: PointScanLike) -> str:
    """A string that stands for `scan`, so that modules and configurations only ever hold a string.

    Args:
        scan: A spec such as "hilbert", "cts('xzy')" or "both_ways(hilbert)", or a function like those of
            `register_point_scan`, which gets a name of its own that only this process knows.

    Raises:
        ValueError: a spec that does not parse, or names an unknown scan or option.
        TypeError: neither a string nor a function.
    """
    if isinstance(scan, str):
        tree = _parse(scan)
        _resolve(tree, scan)
        return ast.unparse(tree)
    if not callable(scan):
        raise TypeError(f"a scan of points must be a name, a spec or a function, not {type(scan).__name__}")
    for key, entry in {**POINT_SCANS, **_anonymous}.items():
        if entry.function == scan:
            return key
    key = f"_{_identifier(getattr(scan, '__name__', type(scan).__name__))}_{next(_numbers)}"
    _anonymous[key] = _entry(scan)
    return key


def cloud_order(spec: str, xyz: Tensor) -> Tensor:
    """The table `(b, k, n)` of a spec from `cloud_spec`, for points `(b, n, 3)`."""
    return _resolve(_parse(spec), spec)(xyz)


def trusted(order: Tensor, l: int) -> Tensor:
    """`order` itself, noted as sound: a sort makes permutations, so that no kernel needs to read the table back.

    Args:
        order: `(b, k, l)` or `(k, l)`, every row a permutation of the `l` tokens.
        l: Tokens.
    """
    if not torch.compiler.is_compiling():
        trust_order(order, l)
    return order


def _resolve(node: ast.expr, spec: str) -> Callable[[Tensor], Tensor]:
    """Check names and arguments; return the function from points to their table."""
    if isinstance(node, ast.Name):
        name, arguments, keywords = node.id, [], []
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, arguments, keywords = node.func.id, node.args, node.keywords
    else:
        raise ValueError(
            f"scan={spec!r}: {ast.unparse(node)!r} is no scan; use names, calls and literals, as in \"cts('xzy')\""
        )
    options = {keyword.arg or "**": _literal(keyword.value, spec) for keyword in keywords}
    if name in _COMPOSITIONS:
        inner = [_resolve(a, spec) for a in arguments if isinstance(a, ast.Name | ast.Call)]
        values = [_literal(a, spec) for a in arguments[len(inner) :]]
        if not inner or (name != "join" and len(inner) > 1):
            raise ValueError(f"scan={spec!r}: {name} is made of other scans; write for example '{name}(hilbert)'")
        compose = _COMPOSITIONS[name]
        try:
            inspect.signature(compose).bind([], *values, **options)
        except TypeError as error:
            raise ValueError(f"scan={spec!r}: {name} does not take these arguments: {error}") from None
        return lambda xyz: compose([build(xyz) for build in inner], *values, **options)
    entry = POINT_SCANS.get(name) or _anonymous.get(name)
    if entry is None:
        raise ValueError(_unknown(name, spec))
    values = [_literal(a, spec) for a in arguments]
    named = dict(zip(entry.options, values, strict=False))
    if len(values) > len(entry.options) or set(options) - set(entry.options) or set(named) & set(options):
        takes = f"takes ({', '.join(entry.options)})" if entry.options else "takes no options"
        raise ValueError(f"scan={spec!r}: {name} {takes}")
    settings = {**named, **options}
    return lambda xyz: _table(name, entry.function(xyz, **settings), xyz)


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


def _both_ways(orders: Sequence[Tensor]) -> Tensor:
    """The directions, then each of them reversed."""
    return torch.cat([orders[0], orders[0].flip(-1)], dim=1)


def _reverse(orders: Sequence[Tensor]) -> Tensor:
    """Every direction from its last step to its first."""
    return orders[0].flip(-1)


def _first(orders: Sequence[Tensor], k: int = 1) -> Tensor:
    """The first `k` directions only."""
    if not 1 <= k <= orders[0].shape[1]:
        raise ValueError(f"first(scan, k={k}) is impossible: the scan has {orders[0].shape[1]} directions")
    return orders[0][:, :k]


def _join(orders: Sequence[Tensor]) -> Tensor:
    """The directions of several scans."""
    return torch.cat(list(orders), dim=1)


_COMPOSITIONS: dict[str, Callable[..., Tensor]] = {
    "both_ways": _both_ways,
    "reverse": _reverse,
    "first": _first,
    "join": _join,
}


def _entry(function: Callable[..., Tensor]) -> PointScan:
    parameters = inspect.signature(function).parameters.values()
    return PointScan(function, tuple(p.name for p in parameters if p.default is not p.empty))


def _unknown(name: str, spec: str) -> str:
    near = difflib.get_close_matches(name, [*POINT_SCANS, *_COMPOSITIONS], n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from {', '.join(sorted(POINT_SCANS))}"
    return f"no scan of points named {name!r}{f' in {spec!r}' if name != spec else ''}; {hint}"


def rows_of(spec: str) -> list[tuple[str, int]]:
    """The directions of a spec from `cloud_spec`, each as a spec and a row of its table, so that one can be made alone.

    Example:
        >>> from mamba_zoo.scans import points
        >>> rows_of("join(hilbert, both_ways(sort_x))")
        [('hilbert', 0), ('both_ways(sort_x)', 0), ('both_ways(sort_x)', 1)]
    """
    tree = _parse(spec)
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
    return cloud_order(spec, torch.linspace(0, 1, 48).view(1, 16, 3)).shape[1]

"""Names of scans, specs written with them, and the tables they stand for."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import hashlib
import inspect
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from ._sample import GRID_SAMPLES, SAMPLE_ORDERS, SampleOrder, Samples, sample_entry
from .compose import COMPOSITIONS
from .core import Scan, check_coverage

ScanLike: TypeAlias = "str | Scan | Callable[..., Any]"


@dataclass(frozen=True)
class ScanEntry:
    """A registered scan: its function, where it is at home, and how its arguments are called."""

    function: Callable[..., Any]
    modality: tuple[str, ...]
    axes: tuple[str, ...] | None  # names of the grid sizes; None takes any number
    options: tuple[str, ...]  # further arguments, in order


SCANS: dict[str, ScanEntry] = {}
_anonymous: dict[str, ScanEntry] = {}  # functions and Scan objects given without a name, under names of our own
_numbers = itertools.count(1)


def register_scan(
    name: str, modality: str | Sequence[str] = "image", replace: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: give a scan a name, usable wherever a scan is expected.

    The function takes the size of the grid, one argument a dimension (`*size` if it takes any), and options with
    defaults. It returns token indices `(k, m)` or `(m,)` as an array, tensor or list, -1 for an empty step; or a
    `Scan`. Tables are cached: the function must return the same for the same arguments.

    Args:
        name: A Python identifier that does not start with an underscore.
        modality: "image", "video", "series", ...; for `list_scans`.
        replace: Take over a name that is taken. A function defined again in the same place may always do so.

    Raises:
        ValueError: the name is taken or is no identifier.

    Example:
        >>> @register_scan("backwards_rows", replace=True)
        ... def backwards_rows(height, width):
        ...     return torch.arange(height * width).flip(0)
        >>> build_scan("both_ways(backwards_rows)", 1, 3).order.tolist()
        [[2, 1, 0], [0, 1, 2]]
        >>> unregister_scan("backwards_rows")
    """
    _check_identifier(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_name(name, function, SCANS, replace)
        SCANS[name] = _entry(function, (modality,) if isinstance(modality, str) else tuple(modality))
        _forget_tables()
        return function

    return register


def register_sample_order(
    name: str, modality: str, replace: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: give an order that follows from the data of samples a name, usable in specs like a scan of a grid.

    The function takes the data of several samples packed into one list of tokens (for graphs: `scans.Graphs`), and
    options with defaults. It returns token indices `(k, l)` or `(l,)` over that list, each sample's tokens among those
    of the others in any way: the kernels keep samples apart.

    Args:
        name: A Python identifier that does not start with an underscore.
        modality: Whose samples it takes, such as "graph".
        replace: Take over a name that is taken. A function defined again in the same place may always do so.

    Raises:
        ValueError: the name is taken or is no identifier.
        TypeError: the function takes something else.
    """
    _check_identifier(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_name(name, function, SAMPLE_ORDERS, replace)
        SAMPLE_ORDERS[name] = sample_entry(function, modality)
        _forget_tables()
        return function

    return register


def unregister_scan(name: str) -> None:
    """Remove a registered scan, or an order of samples, and forget its tables."""
    if name not in SCANS and name not in SAMPLE_ORDERS:
        raise ValueError(_unknown(name, name))
    SCANS.pop(name, None)
    SAMPLE_ORDERS.pop(name, None)
    _forget_tables()


def list_scans(filter: str = "*", modality: str | None = None) -> list[str]:
    """Names of the registered scans, sorted.

    Args:
        filter: With `*` and `?` as wildcards.
        modality: Only scans made for it, orders of its samples included; None lists all scans of grids.
    """
    scans = [name for name, entry in SCANS.items() if modality is None or modality in entry.modality]
    orders = [name for name, entry in SAMPLE_ORDERS.items() if modality == entry.modality]
    if modality == "points":
        from ._cloud import POINT_SCANS  # which builds on this file

        orders += POINT_SCANS
    return sorted(name for name in (*scans, *orders) if fnmatch.fnmatch(name, filter))


def as_spec(scan: ScanLike) -> str:
    """A string that stands for `scan`, so that modules and configurations only ever hold a string.

    Args:
        scan: A spec such as "hilbert", "window(2)" or "both_ways(transpose(hilbert))"; a `Scan`; or a function of the
            grid size like those of `register_scan`. An object gets a name of its own, which another process knows
            only after it has called `as_spec` with the same object: register scans that checkpoints shall mention.

    Raises:
        ValueError: a spec that does not parse, or names an unknown scan or option.
        TypeError: anything else.
    """
    if isinstance(scan, str):
        tree = _parse(scan)
        _resolve(tree, scan)
        return ast.unparse(tree)
    if isinstance(scan, Scan):
        digest = hashlib.sha1(repr((scan.size, scan.reduce, scan.length, scan.extra)).encode())
        digest.update(scan.order.cpu().numpy().tobytes())
        key = f"_{_identifier(scan.name)}_{digest.hexdigest()[:10]}"
        _anonymous.setdefault(key, ScanEntry(_fixed(scan.to("cpu")), (), None, ()))
        return key
    if callable(scan):
        for key, entry in (*SCANS.items(), *_anonymous.items()):
            if entry.function == scan:
                return key
        key = f"_{_identifier(getattr(scan, '__name__', type(scan).__name__))}_{next(_numbers)}"
        _anonymous[key] = _entry(scan, ())
        return key
    raise TypeError(f"scan must be a name or spec, a Scan, or a function of the grid size, not {type(scan).__name__}")


def build_scan(spec: ScanLike, *size: int, device: torch.device | str = "cpu") -> Scan:
    """The scan that `spec` stands for, on a grid.

    Args:
        spec: Whatever `as_spec` takes.
        *size: Of the grid, such as `14, 14`.
        device: Of the table.

    Raises:
        ValueError: an unknown name, options or a grid that do not fit, or a table that is not sound.

    Example:
        >>> build_scan("cross", 2, 2).order.tolist()
        [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]
        >>> build_scan("window(2)", 14, 14)
        Scan(window(2), size=(14, 14), k=4, m=196, l=196, sum)
    """
    scan = _build(as_spec(spec), tuple(map(operator.index, size)))
    with _plain():
        return replace(scan, order=scan.order.clone()).to(device)


def sample_scan(spec: str, samples: Samples) -> Scan:
    """The scan that `spec` stands for, over samples packed into one list of tokens.

    Orders of samples are computed from their data; scans of grids take each sample as a line of tokens as they are
    stored. Nothing is cached.

    Args:
        spec: From `as_spec`.
        samples: All samples at once.

    Raises:
        ValueError: a spec that needs a grid or samples of another modality, or an order that is not sound.
    """
    tree = _parse(spec)
    with _plain():
        scan = replace(_resolve(tree, spec)(samples), name=ast.unparse(tree))
        if scan.length != samples[0]:
            raise ValueError(
                f"scan={spec!r} makes {scan.length} tokens of {samples[0]}; packed samples keep theirs, so that "
                "with_token and filled cannot be used"
            )
        check_coverage(scan)
    return scan


def scan_order(spec: str, size: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The table `(k, m)` int32 for the kernels: `build_scan(spec, *size).order`, made once per grid and device.

    For use in `forward`: works under `torch.compile(fullgraph=True)`, `torch.export`, `FakeTensorMode` and on "meta". A
    compiled graph is specialised to the grid, not to the batch. The tensor is shared: do not write to it.

    Args:
        spec: From `as_spec`.
        size: Of the grid.
        device: Of the table.
    """
    # index() turns the symbolic sizes of a dynamic graph into numbers, with a guard; int() would not.
    size = tuple(operator.index(s) for s in size)
    if torch.compiler.is_compiling():
        return _order_op(spec, list(size), torch.device(device))
    if _get_current_dispatch_mode() is not None:  # fake tensors or tracing: nothing made here may outlive the mode
        return torch.from_numpy(_int32(spec, size).copy()).to(device)
    return _table(spec, size, torch.device(device))


# An op, because dynamo's constants (assume_constant_result) go wrong with a second table of another size in a graph:
# it knows them by the name of the function, and takes the new size for a dynamic one.
@torch.library.custom_op("mamba_zoo::scan_order", mutates_args=())
def _order_op(spec: str, size: list[int], device: torch.device) -> Tensor:
    return _table(spec, tuple(size), device).clone()  # a graph may reuse the memory of what an op returns


@_order_op.register_fake
def _(spec, size, device):
    return torch.empty(_int32(spec, tuple(size)).shape, dtype=torch.int32, device=device)


@lru_cache(maxsize=128)
def _table(spec: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.from_numpy(_int32(spec, size).copy()).to(device)


@lru_cache(maxsize=64)
def _int32(spec: str, size: tuple[int, ...]) -> np.ndarray:
    with _plain():
        return _build(spec, size).order.to(torch.int32).numpy()


@lru_cache(maxsize=64)
def _build(spec: str, size: tuple[int, ...]) -> Scan:
    if not size or min(size) < 1:
        raise ValueError(f"a scan needs the size of its grid, every side >= 1, not {size}; for example 14, 14")
    tree = _parse(spec)
    with _plain():
        scan = _resolve(tree, spec)(size)
        if not spec.startswith("_"):
            scan = replace(scan, name=ast.unparse(tree))
        check_coverage(scan)
    return scan


@contextmanager
def _plain() -> Iterator[None]:
    """Ordinary CPU tensors within, whatever mode or default device the caller is in."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield


def _forget_tables() -> None:
    for cached in (_build, _int32, _table):
        cached.cache_clear()


def _parse(spec: str) -> ast.expr:
    try:
        return ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as e:
        raise ValueError(
            f"scan={spec!r} does not parse ({e.msg}); write a name such as 'hilbert' or a call such as 'window(2)'"
        ) from None


def _resolve(node: ast.expr, spec: str) -> Callable[[tuple[int, ...]], Scan]:
    """Check names and arguments; return the function from grid size to scan."""
    if isinstance(node, ast.Name):
        name, arguments, keywords = node.id, [], []
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, arguments, keywords = node.func.id, node.args, node.keywords
    else:
        raise ValueError(
            f"scan={spec!r}: {ast.unparse(node)!r} is no scan; use names, calls and literals, as in 'window(size=2)'"
        )
    options = {keyword.arg or "**": _literal(keyword.value, spec) for keyword in keywords}
    if name in COMPOSITIONS:
        composition = COMPOSITIONS[name]
        inner = [_resolve(a, spec) for a in arguments if isinstance(a, ast.Name | ast.Call)]
        values = [_literal(a, spec) for a in arguments[len(inner) :]]
        if not inner:
            raise ValueError(f"scan={spec!r}: {name} is made of other scans; write for example '{name}(raster)'")
        _bind(composition.function, (*inner, *values), options, name, spec)

        def compose(size: tuple[int, ...]) -> Scan:
            inside = composition.inner_size(size, *values, **options)
            if isinstance(size, Samples) and inside is not size:
                raise ValueError(f"scan={spec!r}: {name} needs a grid, and samples have none")
            return composition.function(*(build(inside) for build in inner), *values, **options)

        return compose
    entry = SCANS.get(name) or SAMPLE_ORDERS.get(name) or _anonymous.get(name)
    if entry is None:
        raise ValueError(_unknown(name, spec))
    values = [_literal(a, spec) for a in arguments]
    named = dict(zip(entry.options, values, strict=False))
    if len(values) > len(entry.options) or set(options) - set(entry.options) or set(named) & set(options):
        takes = f"takes ({', '.join(entry.options)})" if entry.options else "takes no options"
        raise ValueError(f"scan={spec!r}: {name} {takes} after the grid size")
    settings = {**named, **options}
    if isinstance(entry, SampleOrder):
        return lambda size: _order_samples(name, entry, size, settings)
    return lambda size: _call(name, entry, size, settings)


def _order_samples(name: str, entry: SampleOrder, size: tuple[int, ...], options: dict[str, Any]) -> Scan:
    if isinstance(size, Samples):
        if size.modality != entry.modality:
            raise ValueError(f"scan {name!r} orders samples of {entry.modality}, not of {size.modality}")
        return _scan_of(name, entry.function(size.data, **options), size)
    return _scan_of(name, entry.function(GRID_SAMPLES[entry.modality](size), **options), size)


def _call(name: str, entry: ScanEntry, size: tuple[int, ...], options: dict[str, Any]) -> Scan:
    if isinstance(size, Samples):
        return _pack([_call(name, entry, (length,), options) for length in size.lengths if length], size)
    if entry.axes is not None and len(entry.axes) != len(size):
        raise ValueError(f"scan {name!r} orders a grid of ({', '.join(entry.axes)}), but the size is {size}")
    result = entry.function(*size, **options)
    if isinstance(result, Scan):
        scan = result.to("cpu")
        if (scan.size or (scan.length - len(scan.extra),)) != (size if scan.size else (math.prod(size),)):
            raise ValueError(
                f"scan {scan.name or name!r} is for {f'size {scan.size}' if scan.size else f'{scan.length} tokens'}, "
                f"but the grid is {size}; give a function of the size, or a name, to use it on any grid"
            )
        scan = replace(scan, size=size, name=scan.name or name)
    else:
        scan = _scan_of(name, result, size)
    check_coverage(scan)
    return scan


def _scan_of(name: str, result: Any, size: tuple[int, ...]) -> Scan:
    """The table that a user's function returned, as a scan."""
    table = np.asarray(result.cpu() if isinstance(result, Tensor) else result)
    if table.dtype.kind not in "iu" or table.ndim not in (1, 2):
        raise TypeError(
            f"scan {name!r} must return integer token indices (k, m) or (m,), not {table.dtype} of shape {table.shape}"
        )
    order = torch.from_numpy(np.array(np.atleast_2d(table), dtype=np.int64))
    return Scan(order, math.prod(size), size=tuple(size), name=name)


def _pack(scans: list[Scan], samples: Samples) -> Scan:
    """Scans of samples one after another, as one scan of their packed tokens."""
    starts = np.cumsum([0, *(scan.length for scan in scans[:-1])])
    orders = [scan.order + torch.where(scan.order < 0, 0, int(at)) for at, scan in zip(starts, scans, strict=True)]
    return replace(scans[0], order=torch.cat(orders, dim=1), length=samples[0], size=tuple(samples), extra=())


def _check_identifier(name: str) -> None:
    if not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"scan name {name!r} must be a Python identifier without a leading underscore")


def _check_name(name: str, function: Callable[..., Any], register: dict[str, Any], replace: bool) -> None:
    """Raise if `name` stands for something else already."""
    known = SCANS.get(name) or SAMPLE_ORDERS.get(name)
    other_kind = known is not None and name not in register
    if name in COMPOSITIONS or other_kind or (known and not replace and _origin(known.function) != _origin(function)):
        raise ValueError(f"the scan name {name!r} is taken; choose another, or pass replace=True to take it over")


def _fixed(scan: Scan) -> Callable[..., Scan]:
    return lambda *size: scan


def _entry(function: Callable[..., Any], modality: tuple[str, ...]) -> ScanEntry:
    parameters = inspect.signature(function).parameters.values()
    axes = tuple(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    options = tuple(p.name for p in parameters if p.default is not p.empty)
    any_size = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return ScanEntry(function, modality, None if any_size else axes, options)


def _bind(function: Callable[..., Any], values: tuple[Any, ...], options: dict[str, Any], name: str, spec: str) -> None:
    try:
        inspect.signature(function).bind(*values, **options)
    except TypeError as e:
        raise ValueError(f"scan={spec!r}: {name}{inspect.signature(function)} does not fit: {e}") from None


def _literal(node: ast.expr, spec: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"scan={spec!r}: {ast.unparse(node)!r} must be a literal, such as 2 or 'middle'") from None


def _unknown(name: str, spec: str) -> str:
    near = difflib.get_close_matches(name, [*SCANS, *SAMPLE_ORDERS, *COMPOSITIONS], n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from {', '.join(list_scans())}"
    if name.startswith("_"):
        hint = "it stands for an object that this process never saw; call as_spec with the object, or register it"
    return f"no scan named {name!r}{f' in {spec!r}' if name != spec else ''}; {hint}"


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_") or "scan"


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))

"""Names of scans, specs written with them, and the tables they stand for."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from ._cloud import POINTS
from ._names import Book, ScanEntry, check_name, grid_entry, identifier, parse, sample_entry
from ._sample import GRID_SAMPLES, Samples
from .compose import COMPOSITIONS
from .core import Scan, check_coverage

ScanLike: TypeAlias = "str | Scan | Callable[..., Any]"


GRIDS = Book("scan", "raster", "the grid size", {name: c.function for name, c in COMPOSITIONS.items()})
SCANS = GRIDS.named


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
    check_name(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        homes = (modality,) if isinstance(modality, str) else tuple(modality)
        GRIDS.add(name, grid_entry(function, homes), replace)
        _forget_tables()
        return function

    return register


def register_sample_order(
    name: str, modality: str, replace: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: give an order that follows from the data of samples a name, usable in specs like a scan of a grid.

    The function takes the data of several samples at once, and options with defaults. Graphs (`scans.Graphs`) and their
    like are packed into one list of tokens: it returns token indices `(k, l)` or `(l,)` over that list, each sample's
    tokens among those of the others in any way, since the kernels keep samples apart. For points see
    `register_point_order`.

    Args:
        name: A Python identifier that does not start with an underscore.
        modality: Whose samples it takes, such as "graph" or "points".
        replace: Take over a name that is taken. A function defined again in the same place may always do so.

    Raises:
        ValueError: the name is taken or is no identifier.
        TypeError: the function takes something else.
    """
    check_name(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _book(modality).add(name, sample_entry(function, modality), replace)
        _forget_tables()
        return function

    return register


def unregister_scan(name: str, modality: str | None = None) -> None:
    """Remove a registered scan, or an order of samples, and forget its tables.

    Args:
        name: Of the scan.
        modality: "points" for an order of points, whose names are their own.

    Raises:
        ValueError: nothing has that name.
    """
    _book(modality).remove(name)
    _forget_tables()


def list_scans(filter: str = "*", modality: str | None = None) -> list[str]:
    """Names of the registered scans, sorted.

    Args:
        filter: With `*` and `?` as wildcards.
        modality: Only scans made for it, orders of its samples included; None lists all scans of grids.
    """
    found = [
        name
        for name, entry in _book(modality).named.items()
        if (not entry.of_samples if modality is None else modality in entry.modality)
    ]
    return sorted(name for name in found if fnmatch.fnmatch(name, filter))


def _book(modality: str | None) -> Book:
    return POINTS if modality == "points" else GRIDS


def as_spec(scan: ScanLike) -> str:
    """A string that stands for `scan`, so that modules and configurations only ever hold a string.

    Args:
        scan: A spec such as "hilbert", "window(2)" or "both_ways(transpose(hilbert))"; a `Scan`; or a function of the
            grid size like those of `register_scan`. An object gets a name that is a digest of what it computes: a
            table, or code, constants, defaults and the values and functions that it refers to, where installed packages
            count by name. Equal objects have one name. Another process knows it only after it has called `as_spec` with
            an equal object; a function that refers to what cannot be compared, such as an open file or an object of a
            class, has a random name that no other process knows. Register scans that checkpoints shall mention.

    Raises:
        ValueError: a spec that does not parse, or names an unknown scan or option.
        TypeError: anything else.
    """
    if isinstance(scan, str):
        tree = parse(scan)
        _resolve(tree, scan)
        return ast.unparse(tree)
    if isinstance(scan, Scan):
        digest = hashlib.sha1(repr((scan.size, scan.reduce, scan.length, scan.extra)).encode())
        digest.update(scan.order.cpu().numpy().tobytes())
        key = f"_{identifier(scan.name)}_{digest.hexdigest()[:10]}"
        GRIDS.unnamed.setdefault(key, ScanEntry(_fixed(scan.to("cpu")), (), None, ()))
        return key
    if callable(scan):
        return GRIDS.name_of(scan, lambda: grid_entry(scan, ()))
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
    tree = parse(spec)
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
    tree = parse(spec)
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


def _resolve(tree: ast.expr, spec: str) -> Callable[[tuple[int, ...]], Scan]:
    """Check names and arguments; return the function from grid size to scan."""

    def order(name: str, entry: ScanEntry, options: dict[str, Any]) -> Callable[[tuple[int, ...]], Scan]:
        build = _order_samples if entry.of_samples else _call
        return lambda size: build(name, entry, size, options)

    def compose(
        name: str, inner: list[Any], values: list[Any], options: dict[str, Any]
    ) -> Callable[[tuple[int, ...]], Scan]:
        composition = COMPOSITIONS[name]

        def built(size: tuple[int, ...]) -> Scan:
            inside = composition.inner_size(size, *values, **options)
            if isinstance(size, Samples) and inside is not size:
                raise ValueError(f"scan={spec!r}: {name} needs a grid, and samples have none")
            return composition.function(*(build(inside) for build in inner), *values, **options)

        return built

    return GRIDS.resolve(tree, spec, order, compose)


def _order_samples(name: str, entry: ScanEntry, size: tuple[int, ...], options: dict[str, Any]) -> Scan:
    home = entry.modality[0]
    if isinstance(size, Samples):
        if size.modality != home:
            raise ValueError(f"scan {name!r} orders samples of {home}, not of {size.modality}")
        return _scan_of(name, entry.function(size.data, **options), size)
    return _scan_of(name, entry.function(GRID_SAMPLES[home](size), **options), size)


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


def _fixed(scan: Scan) -> Callable[..., Scan]:
    return lambda *size: scan

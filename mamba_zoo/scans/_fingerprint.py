"""What a function computes, as a short text: the same in every process, and another for other code or values."""

from __future__ import annotations

import functools
import hashlib
import secrets
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LENGTH = 12  # hexadecimal digits
_STANDARD = sysconfig.get_path("stdlib")
_PLAIN = (
    type(None),
    type(...),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    torch.dtype,
    torch.device,
    np.dtype,
)


def fingerprint(function: Callable[..., Any]) -> str:
    """A digest of code, constants, defaults, and the values of the enclosing and global names that `function` reads.

    The functions that it calls are looked into. What belongs to Python, to this package or to another installed one
    counts by its name only; what a function finds out when it runs does not count.

    Args:
        function: Any callable.

    Returns:
        12 hexadecimal digits; random ones, new at every call, if it refers to something that cannot be compared.
    """
    digest = hashlib.sha256()
    try:
        for part in _Reader().parts(function):
            digest.update(len(part).to_bytes(8, "little") + part)
    except (_Incomparable, RecursionError):
        return secrets.token_hex(_LENGTH // 2)
    return digest.hexdigest()[:_LENGTH]


class _Incomparable(Exception):
    """A value of which nobody can tell in another process whether it is the same."""


class _Reader:
    def __init__(self):
        self.seen: dict[int, int] = {}  # id of a function or module -> its number, as they may refer to each other

    def parts(self, value: Any) -> Iterator[bytes]:
        """A value as bytes, one part after another."""
        if isinstance(value, _PLAIN):
            yield f"{type(value).__name__} {value!r}".encode()
        elif isinstance(value, tuple | list):
            yield f"{type(value).__name__} {len(value)}".encode()
            for item in value:
                yield from self.parts(item)
        elif isinstance(value, set | frozenset):
            yield f"{type(value).__name__} {len(value)}".encode()
            yield from sorted(b"".join(self.parts(item)) for item in value)
        elif isinstance(value, dict):
            yield f"dict {len(value)}".encode()
            for item in value.items():
                yield from self.parts(item)
        elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            yield f"array {value.dtype.str} {value.shape}".encode()
            yield value.tobytes()
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().resolve_conj().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, CodeType):
            yield from self._code(value)
        elif isinstance(value, FunctionType) and not _is_installed(value.__module__):
            yield from self._function(value)
        elif isinstance(value, functools.partial):
            yield b"partial"
            yield from self.parts((value.func, value.args, value.keywords))
        elif isinstance(value, functools._lru_cache_wrapper) and not _is_installed(value.__module__):
            yield b"cached"
            yield from self.parts(value.__wrapped__)
        else:
            yield _name(value)

    def _function(self, function: FunctionType) -> Iterator[bytes]:
        if id(function) in self.seen:
            yield f"function {self.seen[id(function)]}".encode()
            return
        self.seen[id(function)] = len(self.seen)
        yield f"{function.__module__} {function.__qualname__}".encode()
        yield from self._code(function.__code__)
        yield from self.parts((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # a name that has no value yet
                raise _Incomparable from None
            yield from self.parts(inside)
        names = sorted(_names(function.__code__))
        for name in names:
            if name in function.__globals__:
                value = function.__globals__[name]
                yield name.encode()
                yield from self.parts(value)
                if isinstance(value, ModuleType):
                    yield from self._attributes(value, names)

    def _code(self, code: CodeType) -> Iterator[bytes]:
        yield f"code {code.co_flags} {code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}".encode()
        yield code.co_code
        yield from self.parts((code.co_consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))

    def _attributes(self, module: ModuleType, names: list[str]) -> Iterator[bytes]:
        """What a function may read of a module: `settings.STEP`."""
        if id(module) in self.seen:
            return
        self.seen[id(module)] = len(self.seen)
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, ModuleType):
                yield from self._attributes(value, names)
            elif isinstance(value, (*_PLAIN, tuple, list, dict, np.ndarray, Tensor, FunctionType)):
                yield f"{module.__name__}.{name}".encode()
                yield from self.parts(value)


def _name(value: Any) -> bytes:
    """Of something installed."""
    if isinstance(value, ModuleType):
        return f"module {value.__name__}".encode()
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    owner = getattr(value, "__self__", None)
    found = callable(value) and isinstance(name, str) and "<" not in name
    if not found or not _is_installed(value.__module__) or not isinstance(owner, type(None) | type | ModuleType):
        raise _Incomparable
    return f"{value.__module__} {name}".encode()


def _names(code: CodeType) -> set[str]:
    """Global names and attributes that code mentions, those of inner functions included."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _is_installed(module: str | None) -> bool:
    """Whether a module is part of Python, of this package or of another that was installed."""
    if module is None or module == "__main__" or module not in sys.modules:
        return False
    if module.partition(".")[0] == __name__.partition(".")[0] or module in sys.builtin_module_names:
        return True
    file = Path(getattr(sys.modules[module], "__file__", None) or "")
    return file.is_relative_to(_STANDARD) or not {"site-packages", "dist-packages"}.isdisjoint(file.parts)

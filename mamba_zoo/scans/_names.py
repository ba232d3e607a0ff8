"""Named orders, and the specs that are written with their names."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._fingerprint import fingerprint


@dataclass(frozen=True)
class ScanEntry:
    """A registered order.

    Attributes:
        function: Of the grid size, or of the data of samples; then of options.
        modality: Where it is at home.
        axes: Names of the grid sizes; None takes any number.
        options: Names of its further arguments, in order.
        of_samples: Whether it takes the data of samples, such as graphs or clouds, in place of the grid size.
    """

    function: Callable[..., Any]
    modality: tuple[str, ...]
    axes: tuple[str, ...] | None
    options: tuple[str, ...]
    of_samples: bool = False


@dataclass(frozen=True)
class Book:
    """Names that can be used together in a spec: of orders, and of functions that make orders of orders.

    There is one for grids and graphs, whose orders can be joined, and one for points, where "hilbert" is a curve
    through space and not through a picture.

    Attributes:
        what: What the names stand for, for messages.
        example: One of the names, for messages.
        arguments: What a function takes before its options, for messages.
        compositions: Functions of orders by name; the signature says how many and which options.
        named: Registered orders.
        unnamed: Functions and objects that were given in place of a name, under names of our own.
    """

    what: str
    example: str
    arguments: str
    compositions: Mapping[str, Callable[..., Any]]
    named: dict[str, ScanEntry] = field(default_factory=dict)
    unnamed: dict[str, ScanEntry] = field(default_factory=dict)

    def add(self, name: str, entry: ScanEntry, replace: bool) -> None:
        """Give an order a name.

        Raises:
            ValueError: it is taken by something else.
        """
        known = self.named.get(name)
        other = known is not None and (
            known.of_samples != entry.of_samples or not (replace or _origin(known.function) == _origin(entry.function))
        )
        if name in self.compositions or other:
            raise ValueError(f"the scan name {name!r} is taken; choose another, or pass replace=True to take it over")
        self.named[name] = entry

    def remove(self, name: str) -> None:
        """Forget a name.

        Raises:
            ValueError: nobody has it.
        """
        if name not in self.named:
            raise ValueError(self.unknown(name, name))
        del self.named[name]

    def name_of(self, function: Callable[..., Any], entry: Callable[[], ScanEntry]) -> str:
        """The name of a function: its own if it is registered, else one that stands for all that it computes."""
        for name, known in (*self.named.items(), *self.unnamed.items()):
            if known.function == function:
                return name
        name = f"_{identifier(getattr(function, '__name__', type(function).__name__))}_{fingerprint(function)}"
        self.unnamed.setdefault(name, entry())
        return name

    def resolve(
        self,
        tree: ast.expr,
        spec: str,
        order: Callable[[str, ScanEntry, dict[str, Any]], Callable[..., Any]],
        compose: Callable[[str, list[Any], list[Any], dict[str, Any]], Callable[..., Any]],
    ) -> Callable[..., Any]:
        """Check all names and arguments of a spec, and make of it what builds its table.

        Args:
            tree: From `parse`.
            spec: As it was written, for messages.
            order: Makes the builder of a named order: its name, entry, and options.
            compose: Makes the builder of a composition: its name, the builders of its orders, values and options.

        Raises:
            ValueError: an unknown name, or arguments that do not fit.
        """
        name, arguments, options = self._called(tree, spec)
        if name in self.compositions:
            inner = [self.resolve(a, spec, order, compose) for a in arguments if isinstance(a, ast.Name | ast.Call)]
            values = [literal(a, spec) for a in arguments[len(inner) :]]
            if not inner:
                example = f"{name}({self.example})"
                raise ValueError(f"scan={spec!r}: {name} is made of other scans; write for example {example!r}")
            signature = inspect.signature(self.compositions[name])
            try:
                signature.bind(*inner, *values, **options)
            except TypeError as error:
                raise ValueError(f"scan={spec!r}: {name}{signature} does not fit: {error}") from None
            return compose(name, inner, values, options)
        entry = self.named.get(name) or self.unnamed.get(name)
        if entry is None:
            raise ValueError(self.unknown(name, spec))
        values = [literal(a, spec) for a in arguments]
        named = dict(zip(entry.options, values, strict=False))
        if len(values) > len(entry.options) or set(options) - set(entry.options) or set(named) & set(options):
            takes = f"takes ({', '.join(entry.options)})" if entry.options else "takes no options"
            raise ValueError(f"scan={spec!r}: {name} {takes} after {self.arguments}")
        return order(name, entry, {**named, **options})

    def unknown(self, name: str, spec: str) -> str:
        """What to say of a name that nobody has."""
        near = difflib.get_close_matches(name, [*self.named, *self.compositions], n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from {', '.join(sorted(self.named))}"
        )
        if name.startswith("_"):
            hint = (
                "it stands for an object that this process never saw, or saw with other code or values; "
                "give the same object before, or register it under a name"
            )
        return f"no {self.what} named {name!r}{f' in {spec!r}' if name != spec else ''}; {hint}"

    def _called(self, tree: ast.expr, spec: str) -> tuple[str, list[ast.expr], dict[str, Any]]:
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return tree.func.id, tree.args, {k.arg or "**": literal(k.value, spec) for k in tree.keywords}
        raise ValueError(
            f"scan={spec!r}: {ast.unparse(tree)!r} is no scan; use names, calls and literals, as in "
            f"{f'first({self.example}, k=1)'!r}"
        )


def parse(spec: str) -> ast.expr:
    """The expression that a spec is.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as e:
        raise ValueError(
            f"scan={spec!r} does not parse ({e.msg}); write a name such as 'hilbert' or a call such as 'random(seed=2)'"
        ) from None


def literal(node: ast.expr, spec: str) -> Any:
    """The value of an argument.

    Raises:
        ValueError: it is no literal.
    """
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"scan={spec!r}: {ast.unparse(node)!r} must be a literal, such as 2 or 'middle'") from None


def grid_entry(function: Callable[..., Any], modality: tuple[str, ...]) -> ScanEntry:
    """The entry of a function of the grid size."""
    parameters = inspect.signature(function).parameters.values()
    axes = tuple(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    options = tuple(p.name for p in parameters if p.default is not p.empty)
    any_size = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return ScanEntry(function, modality, None if any_size else axes, options)


def sample_entry(function: Callable[..., Any], modality: str) -> ScanEntry:
    """The entry of a function whose first argument is the data of samples.

    Raises:
        TypeError: another signature.
    """
    first, *rest = inspect.signature(function).parameters.values()
    if first.default is not first.empty or any(p.default is p.empty for p in rest):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{name} must take the data of samples, then options that all have defaults")
    return ScanEntry(function, (modality,), None, tuple(p.name for p in rest), of_samples=True)


def check_name(name: str) -> None:
    """Raise ValueError unless orders may have that name."""
    if not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"scan name {name!r} must be a Python identifier without a leading underscore")


def identifier(text: str) -> str:
    """`text` with everything replaced that an identifier cannot hold."""
    return re.sub(r"\W+", "_", text).strip("_") or "scan"


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))

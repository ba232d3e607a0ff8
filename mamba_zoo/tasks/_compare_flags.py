"""What `mamba-zoo compare` takes from recipes and from flags such as `--data.seq_len 48`, as `mamba-zoo fit` does."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .recipes import named_configs
from .registry import DEFAULT, find_task


@dataclass
class Given:
    """Settings of a comparison, by section of a recipe.

    Attributes:
        task: What the last recipe is for; None without one.
        model: Arguments of the task.
        data: Arguments of its data.
        trainer: Arguments of Lightning's `Trainer`.
    """

    task: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def check(self, task: str) -> None:
        """Raise ValueError for a setting that the task or its data do not take."""
        entry = find_task(task)
        if self.task is not None and self.task != task:
            raise ValueError(f"one comparison trains one task, but the recipe says {self.task}, --task {task}")
        kinds: tuple[tuple[str, Any], ...] = (("model", entry.model_class), ("data", entry.data_class))
        for section, kind in kinds:
            known = list(inspect.signature(kind).parameters)
            for key in getattr(self, section):
                if key not in known:
                    near = difflib.get_close_matches(key, known, n=1)
                    hint = f"did you mean --{section}.{near[0]}?" if near else f"it takes {', '.join(known)}"
                    raise ValueError(f"--{section}.{key} is no setting of {task}; {hint}")


def take_settings(argv: Sequence[str]) -> tuple[Given, list[str]]:
    """The settings among the arguments, later ones before earlier ones, and the other arguments.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: a flag without a value, or a value that is no YAML.
    """
    import yaml

    configs, args = named_configs(argv)
    given = Given()
    for path in configs:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        given.task = values.get("task", DEFAULT)
        for section in ("model", "data", "trainer"):
            getattr(given, section).update(values.get(section) or {})
    rest, i = [], 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        found = re.fullmatch(r"--(model|data|trainer)\.(\w+(?:\.\w+)*)", flag)
        if found is None:
            rest.append(args[i])
            i += 1
            continue
        if not equals and i + 1 == len(args):
            raise ValueError(f"{flag} needs a value")
        text = value if equals else args[i + 1]
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}: {text!r} cannot be read: {error}") from error
        _set(getattr(given, found[1]), found[2].split("."), value)
        i += 1 if equals else 2
    given.model.pop("scan", None)  # which is what is compared
    return given, rest


def _set(section: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set `section[first]`, or an entry inside of it where there are more keys, as of `--model.net.dim 64`."""
    for key in keys[:-1]:
        inside = section.get(key)
        section[key] = section = dict(inside) if isinstance(inside, dict) else {}
    section[keys[-1]] = value

"""What `mamba-zoo fit` trains with: the recipes that come before the user's flags, and the task they are for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import DEFAULT, find_task

RUNS = Path("runs")
# Arguments of tasks that hold further arguments of the one model that a recipe names.
_OF_ONE_MODEL = ("net", "options")
CONFIGS = Path(__file__).parent / "configs"


def plan(argv: Sequence[str]) -> tuple[str, list[str], Path | None]:
    """What the arguments of `mamba-zoo fit` ask for.

    Args:
        argv: Arguments after `fit`.

    Returns: The task's name, the arguments with the recipe in front and without `--task` and `--resume`, and the folder
        of the run to resume or None.

    Raises:
        ValueError: an unknown task, or recipes and flags that name different ones.
        FileNotFoundError: no such recipe, or no run to resume.
    """
    args, resume = _take_resume(list(argv))
    args, task = _take(args, "--task")
    configs, args = named_configs(args)
    if resume is not None:
        configs = [resume / "config.yaml", *configs]
    named = {str(config): name for config in configs if (name := _task_in(config)) is not None}
    if resume is not None:  # runs older than the tasks name none
        named.setdefault(str(configs[0]), DEFAULT)
    if task is not None:
        named["--task"] = task
    for name in named.values():
        find_task(name)
    if len(set(named.values())) > 1:
        raise ValueError(f"one run trains one task, but {'; '.join(f'{k} says {v}' for k, v in named.items())}")
    task = next(iter(named.values()), DEFAULT)
    if not configs:
        root = _take(args, "--data.root")[1]
        configs = [CONFIGS / f"{find_task(task).recipe(root)}.yaml"]
        args = _for_its_own_model(configs[0], args)
    return task, [*(f"--config={config}" for config in configs), *args], resume


def shipped() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    return {p.stem: p for p in sorted(CONFIGS.glob("*.yaml"))}


def shipped_for(task: str) -> list[str]:
    """Names of the recipes that come with the library for a task."""
    return [name for name, path in shipped().items() if (_task_in(path) or DEFAULT) == task]


def _task_in(path: Path) -> str | None:
    """What the recipe says of its task; a file that is no YAML is left to the parser, which says what is wrong."""
    import yaml

    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return values.get("task") if isinstance(values, dict) else None


def _for_its_own_model(recipe: Path, args: Sequence[str]) -> list[str]:
    """The arguments; where they name another model than a recipe that the user did not ask for, its options are off."""
    import yaml

    model = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("model", {})
    if _take(args, "--model.name")[1] in (None, model.get("name")):
        return list(args)
    return [*(f"--model.{key}=null" for key in _OF_ONE_MODEL if key in model), *args]


def _take(args: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The other arguments, and the value of `flag` if it is there."""
    kept: list[str] = []
    value, i = None, 0
    while i < len(args):
        name, equals, after = args[i].partition("=")
        if name != flag:
            kept.append(args[i])
        elif equals:
            value = after
        elif i + 1 < len(args):
            i += 1
            value = args[i]
        else:
            raise ValueError(f"{flag} needs a value")
        i += 1
    return kept, value


def _take_resume(args: list[str]) -> tuple[list[str], Path | None]:
    """Split `--resume [RUN]` from the other arguments; its folder may be left out."""
    kept: list[str] = []
    folder: Path | None = None
    i = 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        if flag != "--resume":
            kept.append(args[i])
        elif equals:
            folder = Path(value)
        elif i + 1 < len(args) and not args[i + 1].startswith("-"):
            i += 1
            folder = Path(args[i])
        else:
            folder = _latest_run()
        i += 1
    if folder is None:
        return kept, None
    if folder.suffix == ".ckpt":
        folder = folder.parent
    if not (folder / "last.ckpt").exists() or not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: last.ckpt or config.yaml is missing")
    return kept, folder


def _latest_run() -> Path:
    runs = sorted(RUNS.glob("*/last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"no run to resume in {RUNS.resolve()}; name its folder: --resume FOLDER")
    return runs[-1].parent


def named_configs(args: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The recipes of `--config`, each a file or the name of a shipped one, and the other arguments."""
    configs: list[Path] = []
    rest, i = [], 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        if flag not in ("-c", "--config"):
            rest.append(args[i])
            i += 1
            continue
        name = value if equals else (args[i + 1] if i + 1 < len(args) else "")
        known = shipped()
        if not Path(name).is_file() and name not in known:
            near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"give a YAML file, or one of {', '.join(known)}"
            raise FileNotFoundError(f"no recipe {name}; {hint}")
        configs.append(Path(name) if Path(name).is_file() else known[name])
        i += 1 if equals else 2
    return configs, rest

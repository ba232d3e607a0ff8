"""What the results of many files are called, so that none takes the place of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def name_results(paths: Sequence[Path], data: Path) -> list[Path]:
    """What the result of each file is called: its path below `data`, without its ending if no other is the same.

    Args:
        paths: The files.
        data: The folder that holds them, or the only file itself.

    Returns: Paths relative to the folder of results, all different, to which an ending is to be added.
    """
    root = data.parent if data.is_file() else data
    whole = [path.relative_to(root) for path in paths]
    short = [path.with_suffix("") for path in whole]
    taken = Counter([*whole, *short])
    return [name if taken[name] == 1 else path for name, path in zip(short, whole, strict=True)]

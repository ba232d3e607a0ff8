"""The folder of a comparison: its settings, and one folder for each run, written so that nothing is ever half there."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._comparison import Metric, Run

_SETTINGS, _PLAN, _RECORD, _ITEMS = "settings.json", "plan.json", "run.json", "items.npy"


class RunStore:
    """Finished runs of one comparison.

    Args:
        out: Folder; made if it does not exist.
        settings: Everything that must be equal for two runs to be comparable, except order and seed.

    Raises:
        ValueError: `out` holds runs with other settings, or files of something else.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]):
        self.out = Path(out)
        self.settings = json.loads(json.dumps(settings, default=str))
        path = self.out / _SETTINGS
        if path.exists():
            self._agree(_read(path))
        elif (self.out / "runs").exists():
            raise ValueError(f"out={str(out)!r} holds runs without their settings; choose another folder")
        else:
            _write(path, {"settings": self.settings})

    @classmethod
    def open(cls, out: str | Path) -> RunStore:
        """The store in a folder, with the settings it has.

        Raises:
            FileNotFoundError: there is none.
        """
        if not (Path(out) / _SETTINGS).exists():
            raise FileNotFoundError(f"{out} holds no comparison; it has no {_SETTINGS}")
        return cls(out, _read(Path(out) / _SETTINGS)["settings"])

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Keep what was asked for last: orders, seeds, reference."""
        _write(self.out / _PLAN, plan)

    def plan(self) -> dict[str, Any]:
        """What was asked for last."""
        return _read(self.out / _PLAN)

    @property
    def key(self) -> str:
        """Fingerprint of the settings, kept in every run."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, scan: str, seed: int) -> Path:
        """Where one run lives: `out/runs/<scan>/seed_<seed>`."""
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", scan).strip("_") or "scan"
        if slug != scan:  # specs that differ only in punctuation must not meet
            slug += "_" + hashlib.sha256(scan.encode()).hexdigest()[:6]
        return self.out / "runs" / slug / f"seed_{seed}"

    def load(self, scan: str, seed: int) -> Run | None:
        """A finished run, or None.

        Raises:
            ValueError: the file is damaged, or was made with other settings.
        """
        folder = self.folder(scan, seed)
        if not (folder / _RECORD).exists():
            return None
        found = _read(folder / _RECORD)
        if found.get("key") != self.key:
            raise ValueError(
                f"{folder / _RECORD} was made with other settings than {self.out / _SETTINGS}; remove {folder} to "
                "train that run again"
            )
        items = np.load(folder / _ITEMS, allow_pickle=False) if found["has_items"] else None
        values = found["run"]
        values["score"] = math.nan if values["score"] is None else values["score"]
        values["curve"] = tuple((float(a), float(b)) for a, b in values["curve"])
        return Run(**values, items=items)

    def save(self, run: Run) -> None:
        """Keep a finished run; its record is written last and all at once."""
        folder = self.folder(run.scan, run.seed)
        if run.items is not None:
            from .checkpoints import write_atomically

            write_atomically(folder / _ITEMS, lambda file: np.save(file, np.asarray(run.items)))
        values = {name: getattr(run, name) for name in Run.__dataclass_fields__ if name != "items"}
        values["score"] = run.score if math.isfinite(run.score) else None
        values["machine"] = dict(run.machine)
        _write(folder / _RECORD, {"key": self.key, "has_items": run.items is not None, "run": values})

    def _agree(self, found: Mapping[str, Any]) -> None:
        old, new = dict(flatten(found.get("settings", {}))), dict(flatten(self.settings))
        if old == new:
            return
        changed = [k for k in (*new, *(k for k in old if k not in new)) if old.get(k, _NONE) != new.get(k, _NONE)]
        listed = "; ".join(f"{k} was {old.get(k, _NONE)!r}, now {new.get(k, _NONE)!r}" for k in changed)
        raise ValueError(
            f"out={str(self.out)!r} holds runs with other settings: {listed}. Runs that differ in more than order and "
            "seed cannot be compared: choose another out (--out), or go back to the old settings"
        )


class _Unset:
    def __repr__(self) -> str:
        return "not set"


_NONE = _Unset()


def make_run(metrics: Mapping[str, Any], scan: str, seed: int, metric: Metric, machine: Mapping[str, Any]) -> Run:
    """A run from what a trainer returned; see `mamba_zoo.compare.orders` for the keys.

    Raises:
        ValueError: the metric is missing.
    """
    if metric.name not in metrics:
        numbers = [key for key, value in metrics.items() if isinstance(value, (int, float))]
        raise ValueError(
            f"the trainer returned no {metric.name!r}; choose a metric among {', '.join(numbers) or 'none'}"
        )
    score = metrics[metric.name]
    items = metrics.get("items")
    return Run(
        scan,
        seed,
        math.nan if score is None else float(score),
        tuple((float(epoch), float(value)) for epoch, value in metrics.get("curve") or ()),
        None if items is None else np.asarray(items, dtype=np.float64),
        params=metrics.get("parameters"),
        directions=metrics.get("directions"),
        seconds=metrics.get("seconds"),
        train_rate=metrics.get("images_per_second"),
        inference_rate=metrics.get("inference_images_per_second"),
        peak_memory=metrics.get("peak_memory_bytes"),
        machine=dict(machine),
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted names."""
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to make it again") from None


def _write(path: Path, value: Any) -> None:
    from .checkpoints import write_atomically

    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))

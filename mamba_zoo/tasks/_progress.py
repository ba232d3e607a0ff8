"""How far a comparison is: a bar in a terminal, one line a run elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class RunProgress:
    """Context manager that shows runs as they start and finish, with the time still needed.

    Args:
        total: Runs in all.
        done: Runs finished earlier.
        show: False shows nothing.
    """

    def __init__(self, total: int, done: int, show: bool = True):
        self.total, self.done, self.show = total, done, show
        self._seconds: list[float] = []
        self._started = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        if not self.show:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        if self.done:
            self._console.print(f"{self.done} of {self.total} runs are there already", highlight=False)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"), console=self._console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.done, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, scan: str, seed: int) -> None:
        """A run begins."""
        self._started = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, description=f"{scan}, seed {seed}")

    def finish(self, scan: str, seed: int, result: str) -> None:
        """It is finished."""
        self._seconds.append(time.perf_counter() - self._started)
        self.done += 1
        if not self.show:
            return
        left = (self.total - self.done) * sum(self._seconds) / len(self._seconds)
        eta = f"about {duration(left)} left" if self.done < self.total else "done"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=eta)
        else:
            line = f"{self.done}/{self.total} {scan}, seed {seed}: {result}, {duration(self._seconds[-1])}; {eta}"
            self._console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words that fit their size."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"

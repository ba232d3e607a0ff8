"""What a run says while it trains and when it ends: lines, a table, pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, RichProgressBar
from rich.console import Console
from rich.table import Table

from .checkpoints import write_atomically
from .running import History


def progress_bar() -> list[Callback]:
    """A bar on a terminal; elsewhere nothing, since `EpochLines` speaks."""
    return [RichProgressBar(leave=False)] if sys.stdout.isatty() else []


class EpochLines(Checkpoint):
    """One line an epoch, for logs and pipes; silent where a progress bar is shown.

    It counts as a checkpoint for the trainer, which calls those last and in order: a line then says that the epoch is
    saved.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a bar of ours, without any."""
        self.active = not sys.stdout.isatty() and trainer.is_global_zero

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the newest row of the history."""
        history = next((c for c in cast(Any, trainer).callbacks if isinstance(c, History)), None)
        if not self.active or history is None or not history.rows:
            return
        row = history.rows[-1]
        shown = ("train/loss", "val/loss", cast(Any, pl_module).monitor)
        parts = [f"epoch {row['epoch']}/{trainer.max_epochs}"]
        parts += [f"{key} {row[key]:.4f}" for key in dict.fromkeys(shown) if key in row]
        sys.stdout.write("  ".join([*parts, f"{row['seconds']:.1f} s"]) + "\n")
        sys.stdout.flush()


def print_summary(out: Path, rows: Sequence[dict[str, Any]], model: Any, data: Any, loaded: Sequence[str] = ()) -> None:
    """The learning curves as `curves.png`, and a table of the run on the terminal.

    Args:
        out: Folder of the run.
        rows: One an epoch.
        model: The task.
        data: What it was trained on.
        loaded: What was said of weights that the model started from.
    """
    plot_curves(rows, out / "curves.png", model.curves or (model.monitor,), f"score on the validation {model.unit}")
    known = [row for row in rows if model.monitor in row]
    seconds = sum(row["seconds"] for row in rows)
    table = Table(title=f"{model.name} on {data.root}", show_header=False, title_justify="left")
    table.add_row("parameters", f"{sum(p.numel() for p in model.net.parameters()):,}")
    given = [str(model.hparams[key]) for key in ("checkpoint_path", "init_encoder") if model.hparams.get(key)]
    for source in loaded or given:
        table.add_row("started from", source)
    for row in data.describe(model.unit):
        table.add_row(*row)
    speed = sum(row[model.unit] for row in rows) / max(seconds, 1e-9)
    table.add_row("training", f"{len(rows)} epochs, {seconds:.1f} s, {speed:,.0f} {model.unit}/s")
    if known:
        best = (max if model.monitor_mode == "max" else min)(known, key=lambda row: row[model.monitor])
        key = model.monitor.partition("/")[2]
        what = f"{model.metric_names.get(key, key)} {best[model.monitor]:.4f}"
        table.add_row("best epoch", f"{best['epoch']}, {what} on the validation {model.unit}")
    files = [name for name in ("best.ckpt", "last.ckpt", "history.csv", "curves.png") if (out / name).exists()]
    table.add_row("files", f"{out}: {', '.join(files)}")
    if checkpoints := [out / name for name in files if name.endswith(".ckpt")]:
        table.add_row("next", f"mamba-zoo test --checkpoint {out if 'best.ckpt' in files else checkpoints[0]}")
    Console().print(table, soft_wrap=True)


def plot_curves(rows: Sequence[dict[str, Any]], path: Path, scores: Sequence[str], title: str) -> None:
    """Loss on the left and `scores` on the right, by epoch, as a PNG."""
    figure = _figure((8, 3.2))
    left, right = figure.subplots(1, 2)
    for axis, keys in ((left, ("train/loss", "val/loss")), (right, scores)):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=key)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:  # a run may end before it is scored
            axis.legend(frameon=False)
    left.set_ylabel("loss")
    right.set_ylabel(title)
    _save(figure, path)


def plot_confusion(counts: np.ndarray, names: Sequence[str], path: Path, numbers: bool = True) -> None:
    """True classes as rows, predicted ones as columns, each row as parts of its class.

    Args:
        counts: `(classes, classes)` items.
        names: Of the classes; where matplotlib's font cannot write them all, the axes show class numbers.
        path: Of the PNG.
        numbers: Write the counts of up to 20 classes into the cells.
    """
    side = min(4 + 0.3 * len(names), 24)
    figure = _figure((side, side))
    axis = figure.subplots()
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(names) <= 60:
        names = names if _in_font("".join(names)) else [str(i) for i in range(len(names))]
        axis.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
    if numbers and len(names) <= 20:
        for i, j in np.argwhere(counts):
            color = "white" if parts[i, j] > 0.5 else "black"
            axis.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def _in_font(text: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return all(font.get_char_index(ord(character)) for character in text)


def _figure(size: tuple[float, float]) -> Any:
    # The object interface: no window system is asked for and no global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))

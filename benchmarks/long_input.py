"""Time and memory against the length of the input: `python -m benchmarks.long_input [--device cuda] [--out FOLDER]`.

Two causal models, whole and in chunks with state: the small enhancer on recordings of up to ten minutes, and the plain
sequence model on series of up to a million steps. On a GPU both ways at every length, on a CPU whole only up to
--cpu-whole chunks. Memory is what comes on top of the model and the input: allocated at the peak on a GPU, resident at
the peak on the CPU, where every measurement has a process of its own. Before a length is measured, a short input must
give the same both ways. Writes long_input_DEVICE.csv, and long_input.png of the tables of all devices in that folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mamba_zoo
from mamba_zoo.backbones import stream
from mamba_zoo.tasks.environment import machine

RATE = 8000
RECORDINGS = tuple(RATE * seconds for seconds in (10, 30, 60, 150, 300, 600))
SERIES = (1_000, 10_000, 100_000, 300_000, 1_000_000)
CHUNKS = {"recording": 10 * RATE, "series": 10_000}
MODELS = {"recording": "semamba_mini, causal", "series": "mamba_sequence"}
TOLERANCE = 1e-3  # of the norm


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the table and the plot."""
    args = _arguments(arguments)
    torch.backends.cudnn.allow_tf32 = False  # both ways in the same precision
    if args.one:
        kind, length, how = args.one
        sys.stdout.write(json.dumps(on_cpu(kind, int(length), how)) + "\n")
        return 0
    rows: list[dict[str, Any]] = []
    for kind, lengths in (("recording", args.recordings), ("series", args.series)):
        difference = check(kind, args.device)
        for length in lengths:
            for how in ("whole", "chunks"):
                if args.device == "cpu" and how == "whole" and length > args.cpu_whole * CHUNKS[kind]:
                    continue
                found = on_gpu(kind, length, how) if args.device == "cuda" else _in_process(kind, length, how)
                row = {"input": kind, "model": MODELS[kind], "length": length, "device": args.device, "how": how}
                rows.append({**row, **found, "difference": f"{difference:.1e}"})
                sys.stdout.write("  ".join(str(value) for value in rows[-1].values()) + "\n")
                sys.stdout.flush()
                _write(args.out / f"long_input_{args.device}.csv", rows)
    tables = sorted(args.out.glob("long_input_*.csv"))
    plot([row for path in tables for row in _read(path)], args.out / "long_input.png")
    return 0


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        where = ", ".join(f"{key} {value}" for key, value in machine().items())
        file.write(f"# {where}; {torch.get_num_threads()} threads; python -m benchmarks.long_input\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        file.readline()
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    numbers = ("length", "seconds", "memory_mb")
    return [row | {key: float(row[key]) for key in numbers if row[key] != ""} for row in rows]


def build(kind: str, device: str) -> Any:
    """The model of an input, with weights from a fixed seed."""
    torch.manual_seed(0)
    if kind == "series":
        return mamba_zoo.create_model("mamba_sequence").to(device).eval()
    model: Any = mamba_zoo.create_model("semamba_mini", causal=True).to(device).eval()
    for layer in (model.mask_out, model.phase_real, model.phase_imag):  # it would begin as an identity
        torch.nn.init.normal_(layer.weight)
    return model


def make(kind: str, length: int, device: str) -> Tensor:
    """An input: a synthetic voice in noise, or a random walk."""
    generator = torch.Generator().manual_seed(1)
    if kind == "series":
        steps = torch.randn(1, length, 1, generator=generator)
        return ((steps.cumsum(1)) / length**0.5).to(device)
    from mamba_zoo.tasks.speech_synthesis import synthetic_voice

    voice = torch.from_numpy(synthetic_voice(0, 10, RATE, 0)).repeat(-(-length // (10 * RATE)))[None, :length]
    return (voice + 0.05 * torch.randn(1, length, generator=generator)).to(device)


def pieces(kind: str, x: Tensor, model: Any) -> Iterator[Tensor]:
    """The outputs of the chunks, one after another."""
    return stream(model, x.split(CHUNKS[kind], dim=1))


def run(kind: str, how: str, model: Any, x: Tensor) -> None:
    """One pass; nothing of the output is kept."""
    with torch.inference_mode():
        if how == "whole":
            model(x)
        else:
            for _ in pieces(kind, x, model):
                pass


def check(kind: str, device: str) -> float:
    """Relative difference between both ways on two and a half chunks.

    Raises:
        RuntimeError: it is too large.
    """
    model, x = build(kind, device), make(kind, CHUNKS[kind] * 5 // 2, device)
    with torch.inference_mode():
        whole, parts = model(x), torch.cat(list(pieces(kind, x, model)), dim=1)
    difference = float((whole - parts).norm() / whole.norm())
    if not difference < TOLERANCE:
        raise RuntimeError(f"{kind} on {device}: chunks differ from the whole by {difference:.1e}")
    return difference


def on_gpu(kind: str, length: int, how: str) -> dict[str, Any]:
    """Seconds of the better of two passes, and memory on top of model and input."""
    try:
        model, x = build(kind, "cuda"), make(kind, length, "cuda")
        run(kind, how, model, x[:, : CHUNKS[kind] // 2])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = min(_timed(lambda: run(kind, how, model, x), torch.cuda.synchronize) for _ in range(2))
        memory = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return {"seconds": "", "memory_mb": "", "note": "out of memory"}
    return {"seconds": round(seconds, 4), "memory_mb": round(memory / 2**20, 1), "note": ""}


def on_cpu(kind: str, length: int, how: str) -> dict[str, Any]:
    """Seconds of one pass and memory on top of model and input, in a process that did nothing else."""
    model, x = build(kind, "cpu"), make(kind, length, "cpu")
    run(kind, how, model, x[:, : CHUNKS[kind] // 100])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that loading and compiling had
    before = _status("VmRSS")
    seconds = _timed(lambda: run(kind, how, model, x))
    memory = max(_status("VmHWM") - before, 0)
    return {"seconds": round(seconds, 4), "memory_mb": round(memory / 2**20, 1), "note": ""}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory above, time below, against length; one line a device and way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    styles = {"whole": "-o", "chunks": "--s"}
    colours = {"cuda": "#0072B2", "cpu": "#D55E00"}
    for column, (kind, unit, scale) in enumerate((("recording", "minutes", 60 * RATE), ("series", "steps", 1))):
        for line, (key, label) in enumerate((("memory_mb", "memory, MB"), ("seconds", "seconds"))):
            axis = axes[line, column]
            for device in ("cuda", "cpu"):
                for how, style in styles.items():
                    wanted = {"input": kind, "device": device, "how": how}
                    mine = [row for row in rows if wanted.items() <= row.items() and row[key] != ""]
                    if mine:
                        x, y = [row["length"] / scale for row in mine], [max(row[key], 1e-3) for row in mine]
                        name = f"{'GPU' if device == 'cuda' else 'CPU'}, {how}"
                        axis.loglog(x, y, style, color=colours[device], label=name, markersize=4)
            axis.set_ylabel(label)
            if key == "memory_mb":
                axis.set_ylim(bottom=1)
            axis.grid(alpha=0.3, which="both")
            if line == 0:
                axis.set_title(
                    f"{MODELS[kind]}: {'recordings at 8 kHz' if kind == 'recording' else 'series'}", fontsize=10
                )
        axes[1, column].set_xlabel(f"length, {unit}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _timed(work: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _status(name: str) -> int:
    """An entry of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _in_process(kind: str, length: int, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.long_input", "--one", kind, str(length), how]
    # glibc keeps small pieces that were freed; given back at once, what is resident is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"seconds": "", "memory_mb": "", "note": f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--recordings", type=int, nargs="+", default=RECORDINGS, help=f"samples at {RATE} a second")
    parser.add_argument("--series", type=int, nargs="+", default=SERIES, help="steps")
    parser.add_argument("--cpu-whole", type=float, default=10, help="longest input that a CPU takes whole, in chunks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

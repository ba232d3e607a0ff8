"""What the first calls of a model cost: `python -m benchmarks.first_call [NAME ...] [--out FILE]`.

Every model runs in processes of its own: with empty caches of compiled kernels, and again with those that the first
left. "forward" and "training" are the first calls under bfloat16 autocast, with compilation; "steady" are later ones.
Loading torch, the device and its libraries comes before, and a plain timm model shows what is left of that in a first
call.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

NAMES = ["swin_tiny_patch4_window7_224", "vmamba_tiny", "vim_small", "mambavision_t", "vmamba_tiny:mamba2"]
GOALS = {"empty": 5.0, "kept": 1.0}  # seconds, of our models
CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "CUDA_CACHE_PATH")


def seconds(run: Callable[[], Any], device: str) -> float:
    """One call, to the end of its work on the device."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str) -> dict[str, float]:
    """The first calls of a model in this process; "name:mixer" exchanges its scan."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(256, 256, device=device, requires_grad=True)
    image = torch.randn(1, 8, 16, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        (a @ a).sum().backward()
        torch.nn.functional.conv2d(image, torch.randn(8, 8, 3, 3, device=device))
    found = {"import": seconds(lambda: __import__("mamba_zoo"), device)}
    name, _, mixer = name.partition(":")
    start = time.perf_counter()
    arguments: dict[str, Any] = {"mixer": mixer} if mixer else {}
    model: Any = timm.create_model(name, **arguments).to(device)
    found["create"] = time.perf_counter() - start
    x = torch.randn(2, 3, 224, 224, device=device)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            model(x)

    def training() -> None:
        with torch.autocast(device, torch.bfloat16):
            y = model(x)
        y.float().logsumexp(-1).sum().backward()

    for what, run in (("forward", forward), ("training", training)):
        found[what] = seconds(run, device)
        found[f"{what}_steady"] = min(seconds(run, device) for _ in range(3))
    return found


def in_new_process(name: str, folder: str) -> dict[str, float]:
    """`measure` with its caches in `folder`."""
    env = {**os.environ, **{key: str(Path(folder) / key.lower()) for key in CACHES}}
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", name]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=NAMES)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child)) + "\n")
        return
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    rows, console = [], Console(width=120)
    table = Table(title=f"First calls in seconds, {place}, torch {torch.__version__}")
    columns = ("import", "create", "forward", "forward_steady", "training", "training_steady")
    for column in ("model", "caches", *columns):
        table.add_column(column, justify="left" if column in ("model", "caches") else "right")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            for caches, goal in GOALS.items():
                found = in_new_process(name, folder)
                rows.append({"model": name, "caches": caches, **{key: round(found[key], 3) for key in columns}})
                cells = [f"{found[key]:.2f}" for key in columns]
                if name != NAMES[0]:
                    place_of = columns.index("forward")
                    cells[place_of] = f"[{'green' if found['forward'] <= goal else 'red'}]{cells[place_of]}[/]"
                table.add_row(name, caches, *cells)
                if options.out:
                    write(rows, place, options.out)  # after each: what is measured stays if the rest is cut off
    console.print(table)


def write(rows: list[dict[str, Any]], place: str, path: Path) -> None:
    """CSV, its first line saying where it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {place}; torch {torch.__version__}; python {platform.python_version()}; ")
        file.write("python -m benchmarks.first_call\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

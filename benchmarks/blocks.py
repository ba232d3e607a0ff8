"""Blocks of maps as two functions beside their layers: `python -m benchmarks.blocks [--model NAME] [--out FILE]`.

Both in turn in one process, as the host's speed drifts: milliseconds of inference and of forward + backward under
bfloat16 autocast, called from Python and as CUDA graphs, after outputs and gradients of the two agreed. On a CPU, which
takes the layers either way, it only shows that it runs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track

from mamba_zoo import capture
from mamba_zoo.backbones import _map_nodes

from .models import seconds, several

WAYS = {"layers": (), "functions": _map_nodes.DEVICES}
TOLERANCE = 0.03  # of the norm of outputs and gradients, after all layers in bfloat16


@contextmanager
def taken(way: str) -> Iterator[None]:
    """Within it blocks are computed this way."""
    before, _map_nodes.DEVICES = _map_nodes.DEVICES, WAYS[way]
    try:
        yield
    finally:
        _map_nodes.DEVICES = before


def infer(call: Callable, x: torch.Tensor) -> torch.Tensor:
    """Without gradients."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        return call(x)


def train(model: torch.nn.Module, call: Callable, x: torch.Tensor) -> torch.Tensor:
    """Forward and backward."""
    with torch.autocast(x.device.type, torch.bfloat16):
        y = call(x)
    model.zero_grad(set_to_none=True)
    y.float().logsumexp(-1).sum().backward()
    return y.detach()


def check(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Raise unless both ways have the same output and gradients."""
    found = {}
    for way in WAYS:
        with taken(way):
            y = train(model, model, x)
        found[way] = [y.float(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    for a, b in zip(*found.values(), strict=True):
        if not float((a - b).norm()) <= TOLERANCE * float(b.norm()) + 1e-6:
            raise SystemExit(f"layers and functions differ by {float((a - b).norm() / b.norm()):.1e}, not timed")


def measure(name: str, batch: int, size: int, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """Medians of `rounds` turns, with the fastest and the slowest."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    check(model, x[:2])
    for mode in ("eager", *(("captured",) if device == "cuda" else ())):
        runs = {}
        for way in WAYS:
            call = capture(model) if mode == "captured" else model
            runs[way] = {"infer": partial(infer, call, x), "train": partial(train, model, call, x)}
        times: dict[tuple[str, str], list[float]] = {(way, what): [] for way in WAYS for what in ("infer", "train")}
        for _ in track(range(rounds), description=f"{name}, {mode}", transient=True):
            for (way, what), found in times.items():
                with taken(way):
                    several(runs[way][what], 2)  # another way was before
                    found.append(seconds(partial(several, runs[way][what], 8), device) / 8 * 1e3)
        for (way, what), found in times.items():
            yield {
                "model": name, "batch": batch, "mode": mode, "blocks": way, "what": what,
                "ms": statistics.median(found), "fastest": min(found), "slowest": max(found), "rounds": rounds,
            }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    place = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    rows = []
    for row in measure(options.model, options.batch, options.size, options.rounds, options.device):
        rows.append(row)
        Console().print(", ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            file.write(f"# {place}; torch {torch.__version__}; python -m benchmarks.blocks\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

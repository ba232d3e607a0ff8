"""Time whole models beside timm's: `python -m benchmarks.models [--device cpu|cuda] [--model ...] [--out FILE]`.

CPU: batch 1, float32, inference. GPU: batch 128, bfloat16 autocast, inference and training (forward + backward, without
the optimizer step), eager and, with --compile, through torch.compile. Models and peers run interleaved in one process.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mamba_zoo

from .shapes import anchors

PAIRS = {"vmamba_tiny": "swin_tiny_patch4_window7_224", "vim_tiny": "deit_tiny_patch16_224"}
PEERS = [
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
]
MODELS = ["vmamba_tiny", "vmamba_small", "vmamba_base", "vim_tiny", "vim_small"]


def seconds(run: Callable[[], object], device: str) -> float:
    """One timed call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: dict[str, Callable[[], object]], device: str, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Every run once a round, so that a drifting machine drifts for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in track(range(warmup + rounds), description="timing", transient=True):
        for name, run in runs.items():
            t = seconds(run, device)
            if i >= warmup:
                times[name].append(t)
    return times


def on_cpu(names: list[str], rounds: int) -> list[dict]:
    """Latency of one image of 224 px, and its ratio to the paired timm model in the same run."""
    x = torch.randn(1, 3, 224, 224)
    names = list(dict.fromkeys(other for name in names for other in (name, PAIRS.get(name, name))))
    models = {name: timm.create_model(name).eval() for name in names}

    def infer(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(x)

        return run

    times = interleaved({name: infer(model) for name, model in models.items()}, "cpu", rounds, 3)
    rows = []
    for name in names:
        ms = 1e3 * statistics.median(times[name])
        peer = PAIRS.get(name)
        ratio = None if peer is None else statistics.median(times[name]) / statistics.median(times[peer])
        spread = 1e3 * (max(times[name]) - min(times[name]))
        rows.append({"model": name, "ms": ms, "spread_ms": spread, "peer": peer, "times_peer": ratio})
    return rows


def on_gpu(names: list[str], batch: int, size: int, compile_too: bool) -> list[dict]:
    """Images per second and peak memory, inference and training."""
    rows = []
    for name in track(names, description="models", transient=True):
        for compiled in (False, True) if compile_too else (False,):
            torch.cuda.empty_cache()
            kwargs: dict[str, Any] = (
                {"img_size": size} if size != 224 and "vmamba" not in name and "convnext" not in name else {}
            )
            model = timm.create_model(name, **kwargs).cuda()
            run_model = torch.compile(model) if compiled else model
            x = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
            row = {"model": name, "batch": batch, "size": size, "compiled": compiled}
            first = seconds(lambda m=run_model, x=x: m(x[:2]), "cuda")
            for mode in ("infer", "train"):
                model.train(mode == "train")

                def run(mode: str = mode, model: nn.Module = model, forward=run_model, x: torch.Tensor = x) -> None:
                    with torch.set_grad_enabled(mode == "train"), torch.autocast("cuda", torch.bfloat16):
                        y = forward(x)
                    if mode == "train":
                        model.zero_grad(set_to_none=True)
                        y.float().logsumexp(-1).sum().backward()

                for _ in range(5):
                    run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                times = []
                for _ in range(3):
                    start = time.perf_counter()
                    for _ in range(8):
                        run()
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) / 8)
                row[f"{mode}_img_s"] = batch / statistics.median(times)
                row[f"{mode}_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
            row["first_call_s"] = first
            rows.append(row)
            del model, run_model
    return rows


def gpu_table(rows: list[dict]) -> Table:
    """Beside the published implementations' anchors where there are any."""
    published = anchors()["h100"]["end_to_end"]["rows"]
    official = {
        "vmamba_tiny": "official/vmamba_tiny_s1l8",
        "vmamba_small": "official/vmamba_small_s1l20",
        "vmamba_base": "official/vmamba_base_s1l20",
        "vmamba_tiny_s2l5": "official/vmamba_tiny_s2l5",
        "vim_tiny": "mamba_ssm/vimlike_tiny(2xMamba)",
        "vim_small": "mamba_ssm/vimlike_small(2xMamba)",
    }
    columns = ("model", "batch", "size", "compiled", "infer img/s", "x", "train img/s", "x", "train MB", "x", "first s")
    table = Table(*columns, title=f"{torch.cuda.get_device_name()}, bf16 autocast; x = ratio to the H100 anchor")
    for row in rows:
        anchor = published.get(official.get(row["model"], f"timm/{row['model']}"), {})

        def ratio(key: str, row: dict = row, anchor: dict = anchor) -> str:
            return f"{row[key] / anchor[key]:.2f}" if anchor and row["size"] == 224 and row["batch"] == 128 else "-"

        table.add_row(
            row["model"], str(row["batch"]), str(row["size"]), str(row["compiled"]),
            f"{row['infer_img_s']:.0f}", ratio("infer_img_s"), f"{row['train_img_s']:.0f}", ratio("train_img_s"),
            f"{row['train_peak_mb']:.0f}", ratio("train_peak_mb"), f"{row['first_call_s']:.1f}",
        )  # fmt: skip
    return table


def cpu_table(rows: list[dict]) -> Table:
    """Milliseconds an image, and the ratio to the peer."""
    title = f"one image of 224 px, float32, {torch.get_num_threads()} threads"
    table = Table("model", "ms", "spread", "peer", "times the peer", title=title)
    for row in rows:
        ratio = "" if row["times_peer"] is None else f"{row['times_peer']:.2f}"
        table.add_row(row["model"], f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}", row["peer"] or "", ratio)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", help="names; by default those of the README")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        rows = on_cpu(options.model or list(PAIRS), options.rounds)
        table, where = cpu_table(rows), platform.processor() or platform.machine()
    else:
        rows = on_gpu(options.model or MODELS + PEERS, options.batch, options.size, options.compile)
        table, where = gpu_table(rows), torch.cuda.get_device_name()
    Console(width=140).print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            versions = f"torch {torch.__version__}, timm {timm.__version__}, mamba_zoo {mamba_zoo.__version__}"
            file.write(f"# {where}; {versions}; python -m benchmarks.models {' '.join(sys.argv[1:])}\n")
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

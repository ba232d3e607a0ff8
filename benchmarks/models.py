"""Time whole models beside timm's: `python -m benchmarks.models [--device cpu|cuda] [--only PATTERN]
[--alone] [--out FILE]`.

CPU: batch 1, float32, inference, models and peers interleaved. GPU: batch 128, bfloat16 autocast, inference and
training (forward + backward, without the optimizer step), eager and, with --modes, with the backward pass in the
calling thread ("one-thread", as `mamba-zoo fit` runs it), through torch.compile ("compiled") and as a CUDA graph
("captured", `mamba_zoo.capture`); the smallest and largest model of every family and the model of timm nearest to it in
parameters and operations, one after another in one process. Videos are clips of 8 frames, in batches of 16, without a
peer. A speed of ours is given only after the outputs for two inputs, called as they are timed, agreed with the model's
in float32 through other kernels: the plain reference, or beyond 224 pixels Triton, which has no convolution of maps.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mamba_zoo
from mamba_zoo import capture, kernels

from .shapes import anchors

TOLERANCE = 0.03  # of the norm of the outputs, after all layers in bfloat16
MODES = ("eager", "one-thread", "compiled", "captured")
PAIRS = {"vmamba_tiny": "swin_tiny_patch4_window7_224", "vim_tiny": "deit_tiny_patch16_224"}


@dataclass(frozen=True)
class Row:
    """One model of the GPU table."""

    model: str
    family: str
    peer: str | None = None
    batch: int = 128


DEIT_T, DEIT_S, DEIT_B = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
SWIN_T, SWIN_S, SWIN_B, SWIN_L = (f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large"))
# The largest MambaVision for 224 pixels; its L3 models take larger images.
ROWS = [
    Row("vmamba_tiny", "vmamba", SWIN_T),
    Row("vmamba_small", "vmamba", SWIN_S),
    Row("vmamba_base", "vmamba", SWIN_B),
    Row("vim_tiny", "vim", DEIT_T),
    Row("vim_small", "vim", DEIT_S),
    Row("vim_base", "vim", DEIT_B),
    Row("mambavision_t", "mambavision", "convnext_tiny"),
    Row("mambavision_l2", "mambavision", SWIN_L),
    Row("plainmamba_l1", "plainmamba", DEIT_T),
    Row("plainmamba_l3", "plainmamba", SWIN_S),
    Row("efficient_vmamba_tiny", "efficientvmamba", "efficientformerv2_s1"),
    Row("efficient_vmamba_base", "efficientvmamba", SWIN_T),
    Row("local_vim_tiny", "localvim", DEIT_T),
    Row("local_vim_small", "localvim", DEIT_S),
    Row("local_vmamba_tiny", "localvmamba", SWIN_T),
    Row("local_vmamba_small", "localvmamba", SWIN_S),
    Row("videomamba_tiny", "videomamba", DEIT_T),
    Row("videomamba_base", "videomamba", DEIT_B),
    Row("videomamba_tiny_video", "videomamba video", batch=16),
    Row("videomamba_middle_video", "videomamba video", batch=16),
]
FIELDS = [
    "model", "family", "peer", "batch", "input", "mode", "params_m", "error", "infer_img_s", "infer_spread",
    "infer_peak_mb", "train_img_s", "train_spread", "train_peak_mb", "first_call_s", "infer_times_peer",
    "train_times_peer",
]  # fmt: skip


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


def chosen(patterns: list[str], batch: int | None, alone: bool = False) -> list[Row]:
    """The rows that match a pattern by model or family, and unless `alone` their peers before them; each once."""
    rows = [row for row in ROWS if any(fnmatch.fnmatch(name, p) for p in patterns for name in (row.model, row.family))]
    known = {row.model for row in ROWS}
    rows += [Row(name, "timm") for name in patterns if name not in known and timm.is_model(name)]
    if not rows:
        raise SystemExit(f"nothing matches {patterns}; known are {sorted(known | {row.family for row in ROWS})}")
    peers = [Row(row.peer, "timm") for row in rows if row.peer is not None and not alone]
    ordered = {row.model: row for row in [*peers, *rows]}
    return [row if batch is None else Row(row.model, row.family, row.peer, batch) for row in ordered.values()]


def on_gpu(rows: list[Row], size: int, modes: list[str], budget: float) -> Iterator[dict[str, Any]]:
    """Images (of videos: clips) per second and peak memory, inference and training; a row as soon as it is measured.

    Args:
        rows: What to measure.
        size: Pixels per side.
        modes: Of `MODES`.
        budget: Seconds of measuring for each of inference and training.
    """
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for row in track(rows, description="models", transient=True):
        for mode in modes:
            batch = row.batch
            while True:
                try:
                    found = measured(row, batch, size, mode, budget)
                    break
                except WrongAnswerError as wrong:  # the others are still measured
                    Console(stderr=True).print(wrong)
                    found = None
                    break
                except torch.cuda.OutOfMemoryError:
                    batch //= 2
                    if not batch:
                        raise
                finally:
                    gc.collect()
                    torch.cuda.empty_cache()
            if found is None:
                continue
            done[row.model, mode] = found
            for what in ("infer", "train"):
                peer = done.get((row.peer or "", mode))
                found[f"{what}_times_peer"] = peer and found[f"{what}_img_s"] / peer[f"{what}_img_s"]
            yield found


def measured(row: Row, batch: int, size: int, mode: str, budget: float, device: str = "cuda") -> dict[str, Any]:
    """One row of the table, without what compares it with others."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()  # what libraries and models measured earlier keep
    model: Any = created(row.model, size).to(device)
    make: dict[str, Any] = {"compiled": partial(torch.compile, dynamic=False), "captured": capture}
    forward = make.get(mode, lambda model: model)(model)
    shape = model.input_shape(size, size) if hasattr(model, "input_shape") else (3, size, size)
    x = torch.randn(batch, *shape, device=device)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    few = x if mode == "compiled" else x[:2]  # which is compiled for every shape anew

    def predict() -> torch.Tensor:  # as it is timed, so that nothing is compiled for it alone
        forward.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return forward(few)

    found: dict[str, Any] = {
        "model": row.model,
        "family": row.family,
        "peer": row.peer,
        "batch": batch,
        "input": "x".join(map(str, shape)),
        "mode": mode,
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "first_call_s": seconds(predict, device),
    }
    if row.family != "timm":
        found["error"] = error(model, predict(), few)
        if not found["error"] <= TOLERANCE:
            raise WrongAnswerError(f"{row.model}, {mode}: outputs are off by {found['error']:.1e}, not timed")
    if mode == "captured":
        forward.reset()
    for what in ("infer", "train"):
        forward.train(what == "train")

        def run(what: str = what) -> None:
            with torch.set_grad_enabled(what == "train"), torch.autocast(device, torch.bfloat16):
                y = forward(x)
            if what == "train":
                model.zero_grad(set_to_none=True)
                with torch.autograd.set_multithreading_enabled(mode != "one-thread"):
                    y.float().logsumexp(-1).sum().backward()

        torch.cuda.reset_peak_memory_stats()  # before the first runs: a graph allocates as it is captured
        for _ in range(3):
            run()
        one = seconds(run, device)
        repeats = min(max(int(budget / 3 / one), 2), 20)
        times = [seconds(partial(several, run, repeats), device) / repeats for _ in range(3)]
        found[f"{what}_img_s"] = batch / statistics.median(times)
        found[f"{what}_spread"] = (max(times) - min(times)) / statistics.median(times)
        found[f"{what}_peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def error(model: nn.Module, y: torch.Tensor, x: torch.Tensor) -> float:
    """How far the first two outputs `y` for `x` are from those in float32 through other kernels, relative to these."""
    model.eval()
    with torch.no_grad(), kernels.use("triton" if x.shape[-1] > 224 else "reference"):
        exact = model(x[:2])
    return float((y[:2].float() - exact).norm() / exact.norm())


class WrongAnswerError(Exception):
    """A model whose outputs are wrong, so that its speed means nothing."""


def several(run: Callable[[], object], repeats: int) -> None:
    """Run it that often, without waiting in between."""
    for _ in range(repeats):
        run()


def created(name: str, size: int) -> nn.Module:
    """The model for images of `size` pixels, if it has to know."""
    if size != 224:
        try:
            return timm.create_model(name, img_size=size)
        except TypeError:
            pass  # takes any size
    return timm.create_model(name)


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
        "mambavision_t": "official/mamba_vision_T",
    }
    columns = ("model", "batch", "input", "img/s", "of peer", "of anchor", "train img/s", "of peer", "of anchor",
               "train MB", "of anchor", "peer")  # fmt: skip
    table = Table(*columns, title=f"{torch.cuda.get_device_name()}, bf16 autocast; anchors: published code on an H100")
    for row in rows:
        anchor = published.get(official.get(row["model"], f"timm/{row['model']}"), {})
        alike = row["input"] == "3x224x224" and row["batch"] == 128

        def ratio(key: str, row: dict = row, anchor: dict = anchor, alike: bool = alike) -> str:
            return f"{row[key] / anchor[key]:.2f}" if anchor and alike else "-"

        def of_peer(key: str, row: dict = row) -> str:
            return "-" if row[key] is None else f"{row[key]:.2f}"

        table.add_row(
            row["model"] + ("" if row["mode"] == "eager" else f" {row['mode']}"), str(row["batch"]), row["input"],
            f"{row['infer_img_s']:.0f}", of_peer("infer_times_peer"), ratio("infer_img_s"),
            f"{row['train_img_s']:.0f}", of_peer("train_times_peer"), ratio("train_img_s"),
            f"{row['train_peak_mb']:.0f}", ratio("train_peak_mb"), row["peer"] or "",
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
    parser.add_argument(
        "--only",
        "--model",
        nargs="+",
        help="models or families, with * and ? as wildcards; on a GPU with their peers; by default all of the table",
    )
    parser.add_argument("--batch", type=int, help="GPU: instead of 128 images or 16 clips; halved where memory ends")
    parser.add_argument("--size", type=int, default=224, help="GPU: pixels per side")
    parser.add_argument("--alone", action="store_true", help="GPU: without the peers, as compiling takes minutes")
    parser.add_argument("--rounds", type=int, default=15, help="CPU: timed calls of each model")
    parser.add_argument("--seconds", type=float, default=1.2, help="GPU: of measuring, for each model twice")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="GPU: how models are called")
    parser.add_argument("--out", type=Path, help="CSV file, written row by row")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device")
    if options.device == "cpu":
        where, fields = platform.processor() or platform.machine(), ["model", "ms", "spread_ms", "peer", "times_peer"]
        measure: Any = on_cpu(options.only or list(PAIRS), options.rounds)
    else:
        where, fields = torch.cuda.get_device_name(), FIELDS
        rows = chosen(options.only or ["*"], options.batch, options.alone)
        measure = on_gpu(rows, options.size, options.modes, options.seconds)
    results = []
    with (options.out or Path(os.devnull)).open("w", newline="") as file:
        versions = f"torch {torch.__version__}, timm {timm.__version__}, mamba_zoo {mamba_zoo.__version__}"
        file.write(f"# {where}; {versions}; python -m benchmarks.models {' '.join(sys.argv[1:])}\n")
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        for row in measure:
            results.append(row)
            writer.writerow(row)
            file.flush()
    Console(width=160).print(cpu_table(results) if options.device == "cpu" else gpu_table(results))


if __name__ == "__main__":
    main()

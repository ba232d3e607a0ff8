"""Time the state-space dual on the anchors' shapes on a GPU: `python -m benchmarks.ssd [--profile] [--out FILE]`.

A time is printed only after the values and gradients of a slice of that very shape agreed with float64. Tokens are
visited in a random order. "fwd" and "f+b" are eager calls, host included, as the published implementation was timed (on
an H200); "graph" is a replayed CUDA graph of them, what the device takes alone.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from mamba_zoo.kernels import ssd

from .kernels import copy_bandwidth, graph_ms, median_ms
from .shapes import anchors

# Relative errors allowed of outputs and gradients: tests/kernels/test_ssd.py says why.
TOLERANCE = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3), torch.float32: (2e-5, 2e-5)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = ("x", "dt", "B", "C")
GOALS = {"fwd": 1.5, "fwdbwd": 2.0}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random inputs of one shape (b, l, h, p, g, n), as slices of one projection, visited in a random order."""
    torch.manual_seed(0)
    b, l, h, p, g, n = shape
    rows = torch.randn(b, l, h * p + 2 * g * n, device=device, dtype=dtype)
    x, B, C = rows.split([h * p, g * n, g * n], dim=-1)
    problem: dict[str, Any] = {
        "x": x.unflatten(-1, (h, p)),
        "dt": torch.randn(b, l, 1, h, device=device, dtype=dtype) * 0.5,
        "A": -torch.rand(1, h, device=device) * 15 - 1,
        "B": B.unflatten(-1, (1, g, n)),
        "C": C.unflatten(-1, (1, g, n)),
        "D": torch.randn(1, h, device=device),
        "dt_bias": torch.rand(1, h, device=device) * 4 - 6,
    }
    problem = {name: value.detach().requires_grad_() for name, value in problem.items()}
    problem["order"] = torch.randperm(l, device=device)[None]
    problem["dt_softplus"] = True
    return problem


def check(problem: dict[str, Any], backend: str) -> tuple[str | None, float]:
    """None if one sample (its first 500 tokens) agrees with float64, else what does not; and the largest error."""
    x = problem["x"]
    l = min(x.shape[1], 500)
    part = {name: value.detach()[:1, :l] if name in TOKENS else value for name, value in problem.items()}
    part["order"] = torch.randperm(l, device=x.device)[None]
    results = []
    for exact in (False, True):
        leaves: dict[str, Any] = {
            name: (v.detach().double().cpu() if exact else v.detach().clone()).requires_grad_()
            if torch.is_tensor(v) and v.is_floating_point()
            else (v.cpu() if exact and torch.is_tensor(v) else v)
            for name, v in part.items()
        }
        y = ssd(**leaves, backend="reference" if exact else backend)
        torch.manual_seed(1)
        dy = torch.randn(y.shape).to(x.dtype).to(y)
        inputs = {name: v for name, v in leaves.items() if torch.is_tensor(v) and v.requires_grad}
        grads = torch.autograd.grad(y, list(inputs.values()), dy)
        results.append({"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}})
    worst = 0.0
    for name, ours in results[0].items():
        theirs = results[1][name]
        error = float((ours.double().cpu() - theirs).norm() / theirs.norm())
        worst = max(worst, error)
        if not error <= TOLERANCE[x.dtype][name != "y"]:
            return f"{name} is off by {error:.1e}", worst
    return None, worst


def profile(run: Any) -> str:
    """Device time of every kernel of one call, in µs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    run()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    return "; ".join(f"{row.key[:40]} {row.device_time_total:.0f}x{row.count}" for row in rows if row.device_time_total)


def measure(name: str, row: dict[str, Any], dtype: str, backend: str, bandwidth: float, profiled: bool) -> dict:
    """Median times in ms, ratios to the anchor, and peak memory beyond the inputs of one shape."""
    shape = tuple(row["shape"])
    problem = make_inputs(shape, DTYPES[dtype], "cuda")
    wrong, worst = check(problem, backend)
    result: dict[str, Any] = {"shape": name, "sizes": "x".join(map(str, shape)), "dtype": dtype, "backend": backend}
    result["worst_error"] = worst
    if wrong:
        return result | {"wrong": wrong}
    inputs = [v for v in problem.values() if torch.is_tensor(v) and v.requires_grad]
    dy = torch.randn_like(ssd(**problem, backend=backend))

    def forward():
        with torch.no_grad():
            return ssd(**problem, backend=backend)

    def both():
        return torch.autograd.grad(ssd(**problem, backend=backend), inputs, dy)

    for what, run in (("fwd", forward), ("fwdbwd", both)):
        samples = [median_ms(run) for _ in range(3)]
        anchor = row[f"ssd_{what}_ms"]
        result |= {
            f"{what}_ms": statistics.median(samples), f"{what}_spread": max(samples) - min(samples),
            f"{what}_anchor_ms": anchor, f"{what}_ratio": anchor / statistics.median(samples),
        }  # fmt: skip
        result[f"device_{what}_ms"] = graph_ms(run)
        result[f"device_{what}_ratio"] = anchor / result[f"device_{what}_ms"]
        if profiled:
            result[f"{what}_kernels_us"] = profile(run)
    size = DTYPES[dtype].itemsize
    b, l, h, p, g, n = shape
    result["floor_ms"] = b * l * (2 * h * p + 2 * g * n + h) * size / bandwidth * 1e3  # each input read, each output
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    result["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result | {"anchor_peak_mb": row["peak_mb"]}


def report(rows: list[dict], console: Console, title: str) -> None:
    """A table."""
    table = Table(title=title)
    columns = ("shape", "dtype", "backend", "fwd ms", "x anchor", "f+b ms", "x anchor")
    for column in (*columns, "graph fwd", "x anchor", "floor", "graph f+b", "x anchor", "peak MB", "worst error"):
        table.add_column(column, justify="left" if column in ("shape", "dtype", "backend") else "right")
    for row in rows:
        if "wrong" in row:
            table.add_row(row["shape"], row["dtype"], row["backend"], f"[red]{row['wrong']}[/red]")
            continue
        met = ["green" if row[f"{what}_ratio"] >= goal else "red" for what, goal in GOALS.items()]
        table.add_row(
            row["shape"], row["dtype"], row["backend"],
            f"{row['fwd_ms']:.4f}", f"[{met[0]}]{row['fwd_ratio']:.2f}[/]",
            f"{row['fwdbwd_ms']:.4f}", f"[{met[1]}]{row['fwdbwd_ratio']:.2f}[/]",
            f"{row['device_fwd_ms']:.4f}", f"{row['device_fwd_ratio']:.2f}", f"{row['floor_ms']:.4f}",
            f"{row['device_fwdbwd_ms']:.4f}", f"{row['device_fwdbwd_ratio']:.2f}", f"{row['peak_mb']:.0f}",
            f"{row['worst_error']:.1e}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for what in GOALS:
            if f"{what}_kernels_us" in row:
                console.print(f"{row['shape']} {row['dtype']} {what}, µs: {row[f'{what}_kernels_us']}")


def main(arguments: list[str] | None = None) -> None:
    """Measure and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", nargs="+", default=["auto"])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--shape", nargs="+", help="names; all by default")
    parser.add_argument("--profile", action="store_true", help="device time of every kernel")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console = Console(width=170)
    bandwidth = copy_bandwidth("cuda")
    rows = []
    for name, row in anchors()["h200"]["ssd"]["rows"].items():
        if options.shape and name not in options.shape:
            continue
        for dtype in options.dtype:
            for backend in options.backend:
                try:
                    rows.append(measure(name, row, dtype, backend, bandwidth, options.profile))
                except (RuntimeError, ValueError, TritonError) as error:  # the other shapes are still measured
                    first = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
                    rows.append({"shape": name, "dtype": dtype, "backend": backend, "wrong": first})
                torch.cuda.empty_cache()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s"
    report(rows, console, where)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            command = f"python -m benchmarks.ssd {' '.join(sys.argv[1:])}"
            file.write(f"# {where}; triton {triton.__version__}; python {platform.python_version()}; {command}\n")
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Time the CPU kernels against plain torch, interleaved in one run: `python -m benchmarks.kernels_cpu`.

The baseline of the scan is its recurrence, one torch step per token, vectorised over samples, directions, channels and
states; with gradients, autograd through it. The baseline of the convolution is a gather, torch's depthwise conv1d
and a scatter. A time is printed only after values and gradients of that shape agreed with float64.
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

import numba
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mamba_zoo.kernels import causal_conv1d, selective_scan

# b, k, d, n, l, and the goals: forward, forward + backward
SCANS = {
    (1, 1, 384, 16, 197): (12, 8),  # Vim-T, one image
    (8, 1, 384, 16, 197): (4, 8),
    (1, 4, 96, 1, 3136): (40, 8),  # VMamba-T, first stage
    (1, 4, 192, 16, 784): (8, 8),  # VMamba v0, second stage
}
CONVS = ((1, 2, 384, 4, 197), (8, 2, 384, 4, 197))  # b, k, d, w, l: Vim
TOLERANCE = 1e-5
OUT = Path(__file__).parent / "results" / "kernels_cpu.csv"


def scan_problem(b: int, k: int, d: int, n: int, l: int) -> dict[str, Any]:
    """Random inputs of one shape, visited in a random order, softplus and bias inside."""
    return {
        "u": torch.randn(b, l, d),
        "dt": torch.randn(b, l, k, d) * 0.5,
        "A": -torch.rand(k, d, n) - 0.5,
        "B": torch.randn(b, l, k, n),
        "C": torch.randn(b, l, k, n),
        "D": torch.randn(k, d),
        "dt_bias": torch.randn(k, d) - 3,
        "order": torch.stack([torch.randperm(l) for _ in range(k)]),
    }


def scan(u, dt, A, B, C, D, dt_bias, order) -> Tensor:
    """Our op."""
    return selective_scan(u, dt, A, B, C, D, order=order, dt_bias=dt_bias, dt_softplus=True, backend="cpu")  # type: ignore[return-value]


def step_by_step(u, dt, A, B, C, D, dt_bias, order) -> Tensor:
    """The recurrence in torch, all samples, directions, channels and states at once, one step per token."""
    k, l = order.shape
    b, d, n = u.shape[0], A.shape[1], A.shape[2]
    direction = torch.arange(k)[:, None]
    u = u[:, order]  # (b, k, l, d)
    delta = F.softplus(dt.transpose(1, 2)[:, direction, order] + dt_bias[:, None])
    B, C = (x.transpose(1, 2)[:, direction, order] for x in (B, C))
    steps, drives = delta.unbind(2), (delta * u).unbind(2)
    B, C = B[:, :, :, None].unbind(2), C[..., None].unbind(2)  # rows to spread over d, columns to sum over n
    h = u.new_zeros(b, k, d, n)
    outputs = []
    for t in range(l):
        decay = torch.exp(steps[t][..., None] * A)
        h = torch.addcmul(decay * h, drives[t][..., None], B[t])
        outputs.append((h @ C[t])[..., 0])
    y = torch.stack(outputs, dim=2) + D[:, None] * u
    index = order[None, :, :, None].expand_as(y)
    return torch.zeros_like(y).scatter(2, index, y).transpose(1, 2)


def conv_problem(b: int, k: int, d: int, w: int, l: int) -> dict[str, Any]:
    """Random inputs of one shape, visited in a random order."""
    return {
        "x": torch.randn(b, l, d),
        "weight": torch.randn(k, d, w),
        "bias": torch.randn(k, d),
        "order": torch.stack([torch.randperm(l) for _ in range(k)]),
    }


def conv(x, weight, bias, order) -> Tensor:
    """Our op."""
    return causal_conv1d(x, weight, bias, order, "silu", backend="cpu")


def torch_conv(x, weight, bias, order) -> Tensor:
    """Gather, depthwise conv1d, scatter."""
    k, d, w = weight.shape
    rows = x[:, order].permute(0, 1, 3, 2).flatten(1, 2)  # (b, k * d, l)
    y = F.silu(F.conv1d(F.pad(rows, (w - 1, 0)), weight.view(k * d, 1, w), bias.view(-1), groups=k * d))
    y = y.view(len(x), k, d, -1).permute(0, 3, 1, 2)
    index = order.T[None, :, :, None].expand_as(y)
    return torch.zeros_like(y).scatter(1, index, y)


def gradients(run: Callable[..., Tensor], problem: dict[str, Any], dy: Tensor) -> list[Tensor]:
    """The output, then the gradient of every float input."""
    leaves = {name: x.detach().requires_grad_() if torch.is_floating_point(x) else x for name, x in problem.items()}
    y = run(**leaves)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves.values() if x.requires_grad], dy)]


def disagreement(ours: Callable, baseline: Callable, problem: dict[str, Any], dy: Tensor) -> str | None:
    """None if the value and every gradient agree with those of the baseline in float64, else which does not."""
    exact = {name: x.double() if torch.is_floating_point(x) else x for name, x in problem.items()}
    names = ["y", *(name for name, x in problem.items() if torch.is_floating_point(x))]
    both = gradients(ours, problem, dy), gradients(baseline, exact, dy.double())
    for name, got, want in zip(names, *both, strict=True):
        if not (error := float((got.double() - want).norm() / want.norm())) <= TOLERANCE:
            return f"{name} is off by {error:.1e}"
    return None


def interleaved(
    ours: Callable[[], Any], baseline: Callable[[], Any], seconds: float, clock: Callable[[], float]
) -> tuple[list, list]:
    """Times in ms of both by `clock`, in turn, so that other load on the machine meets both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (ours, baseline):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, into in ((ours, times[0]), (baseline, times[1])):
            start = clock()
            run()
            into.append((clock() - start) * 1e3)
    return times


def measure(
    op: str, shape: tuple, problem: dict[str, Any], ours: Callable, baseline: Callable, seconds: float, clock: Callable
) -> list[dict[str, Any]]:
    """Rows of the table for one shape: forward, and forward + backward."""
    with torch.no_grad():
        dy = torch.randn_like(ours(**problem))
    if wrong := disagreement(ours, baseline, problem, dy):
        return [{"op": op, "shape": str(shape), "wrong": wrong}]

    def forward(run):
        with torch.no_grad():
            return run(**problem)

    rows = []
    for index, (what, job) in enumerate(
        (("forward", forward), ("forward + backward", lambda run: gradients(run, problem, dy)))
    ):
        mine, theirs = interleaved(lambda job=job: job(ours), lambda job=job: job(baseline), seconds, clock)
        rows.append(
            {
                "op": op, "shape": str(shape), "what": what,
                "ms": statistics.median(mine), "best_ms": min(mine),
                "torch_ms": statistics.median(theirs), "torch_best_ms": min(theirs),
                "ratio": statistics.median(theirs) / statistics.median(mine), "best_ratio": min(theirs) / min(mine),
                "goal": SCANS[shape][index] if shape in SCANS else None, "runs": len(mine),
            }
        )  # fmt: skip
    return rows


def report(rows: list[dict], console: Console, title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("op", "b, k, d, n | w, l", "", "ms", "best", "torch ms", "best", "ratio", "of bests", "goal"):
        table.add_column(column, justify="left" if column in ("op", "b, k, d, n | w, l", "") else "right")
    for row in rows:
        if "wrong" in row:
            table.add_row(row["op"], row["shape"], f"[red]{row['wrong']}[/red]")
            continue
        table.add_row(
            row["op"], row["shape"], row["what"], f"{row['ms']:.3f}", f"{row['best_ms']:.3f}",
            f"{row['torch_ms']:.2f}", f"{row['torch_best_ms']:.2f}", f"{row['ratio']:.1f}x",
            f"{row['best_ratio']:.1f}x", "" if row["goal"] is None else f"{row['goal']}x",
        )  # fmt: skip
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", nargs="+", type=int, help="rows of the table to measure, from 0; all by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV file; benchmarks/results/kernels_cpu.csv by default")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, not wall time: for a busy machine, with 1 thread"
    )
    options = parser.parse_args(arguments)
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads, idle ones included; give --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    jobs = [("selective_scan", shape, scan_problem, scan, step_by_step) for shape in SCANS]
    jobs += [("causal_conv1d", shape, conv_problem, conv, torch_conv) for shape in CONVS]
    for i, (op, shape, problem, ours, baseline) in enumerate(jobs):
        if options.shape is None or i in options.shape:
            rows += measure(op, shape, problem(*shape), ours, baseline, options.seconds, clock)
    where = (
        f"{cpu_name()}, {options.threads} threads{', CPU time' * options.cpu_time}, torch {torch.__version__}, "
        f"numba {numba.__version__}, python {platform.python_version()}"
    )
    report(rows, Console(width=130), where)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        file.write(f"# {where}; python -m benchmarks.kernels_cpu {' '.join(sys.argv[1:])}\n")
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def cpu_name() -> str:
    """The model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

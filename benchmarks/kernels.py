"""Time the selective scan on the anchors' shapes on a GPU: `python -m benchmarks.kernels [--backend B] [--out FILE]`.

A time is printed only after the values and gradients of a slice of that very shape agreed with float64. "fwd" and "f+b"
are eager calls, host included, as the published implementations were timed; "graph" is a replayed CUDA graph of them,
"same bits" the graph of f+b in torch's deterministic mode, whose memory is beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.testing import do_bench

from mamba_zoo.kernels import selective_scan

from .shapes import Shape, scan_anchor, scan_shapes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-4}
TOKENS = ("u", "dt", "B", "C", "z")


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random inputs of one shape, visited in a random order."""
    torch.manual_seed(0)
    b, l, k, d, n = shape.b, shape.l, shape.k, shape.d, shape.n
    rows = torch.randn(b, l, k, 2 * n, device=device, dtype=dtype)  # B and C as they come out of one projection
    problem: dict[str, Any] = {
        "u": torch.randn(b, l, d, device=device, dtype=dtype),
        "dt": torch.randn(b, l, k, d, device=device, dtype=dtype) * 0.5,
        "A": -torch.rand(k, d, n, device=device) - 0.5,
        "B": rows[..., :n],
        "C": rows[..., n:],
        "D": torch.randn(k, d, device=device),
        "dt_bias": torch.randn(k, d, device=device) - 3,
    }
    if shape.z:
        problem["z"] = torch.randn(b, l, d, device=device, dtype=dtype)
    for name, value in problem.items():
        problem[name] = value.detach().requires_grad_()
    problem["order"] = torch.stack([torch.randperm(l, device=device) for _ in range(k)])
    problem["dt_softplus"] = True
    return problem


def check(shape: Shape, problem: dict, backend: str) -> str | None:
    """None if one sample of the shape (its first 600 steps if longer) agrees with float64, else what does not."""
    l = min(shape.l, 600)
    part: dict[str, Any] = {}
    for name, value in problem.items():
        part[name] = value.detach()[:1, :l] if name in TOKENS else value
    part["order"] = torch.stack([torch.randperm(l, device=problem["u"].device) for _ in range(shape.k)])

    def run(given: dict[str, Any], exact: bool) -> tuple[torch.Tensor]:
        return (selective_scan(**given, backend="reference" if exact else backend),)

    return disagreement(run, part, TOLERANCE[problem["u"].dtype])


def disagreement(
    run: Callable[[dict[str, Any], bool], tuple[torch.Tensor, ...]], problem: dict[str, Any], tolerance: float
) -> str | None:
    """None if values and gradients agree with float64, else what does not, and by how much of its norm.

    Args:
        run: `(arguments, exact)` to the outputs; `exact` says that the arguments are float64.
        problem: The arguments; gradients are those of its tensors of floating point.
        tolerance: Of relative errors.
    """
    names = [name for name, value in problem.items() if torch.is_tensor(value) and value.is_floating_point()]
    results: list[dict[str, torch.Tensor]] = []
    seeds: list[torch.Tensor] = []
    for exact in (False, True):
        given = dict(problem)
        for name in names:
            value = problem[name].detach()
            given[name] = (value.double() if exact else value.clone()).requires_grad_()
        outputs = run(given, exact)
        seeds = [seed.double() for seed in seeds] if exact else [torch.randn_like(y) for y in outputs]
        grads = torch.autograd.grad(outputs, [given[name] for name in names], seeds)
        results.append({f"output {i}": y.detach() for i, y in enumerate(outputs)})
        results[-1] |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    for name, ours in results[0].items():
        theirs = results[1][name]
        error = float((ours.double() - theirs).norm() / theirs.norm())
        if not error <= tolerance:
            return f"{name} is off by {error:.1e}"
    return None


def copy_bandwidth(device: str) -> float:
    """Measured device-to-device copy, bytes read plus written per second."""
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2e3 * a.numel() / median_ms(lambda: b.copy_(a))


def median_ms(run: Callable[[], Any]) -> float:
    """Median time of `run`, the L2 cache flushed before each repetition."""
    return cast(float, do_bench(run, warmup=20, rep=80, return_mode="median"))


def graph_ms(run: Callable[[], Any]) -> float:
    """The same for a replayed CUDA graph of `run`: what the device takes, without the host."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory of the device that `run` takes, above what is taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic mode, without its fill of new memory, which would be timed."""
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


def device_line(bandwidth: float) -> str:
    """The device, what the times depend on, and the copy bandwidth."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
    return f"{torch.cuda.get_device_name()}, {versions}, copy {bandwidth / 1e12:.2f} TB/s"


def write_csv(path: Path, rows: list[dict[str, Any]], where: str, name: str) -> None:
    """Rows as CSV, under a line that says `where` they come from and the command, `benchmarks.<name>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {where}; python -m benchmarks.{name} {' '.join(sys.argv[1:])}\n")
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def measure(shape: Shape, dtype: str, backend: str, reduce: str | None, device: str, bandwidth: float) -> dict:
    """Median times in ms and extra memory of one shape."""
    problem = make_inputs(shape, DTYPES[dtype], device)
    if wrong := check(shape, problem, backend):
        return {"shape": shape.name, "dtype": dtype, "backend": backend, "wrong": wrong}
    inputs = [v for v in problem.values() if torch.is_tensor(v) and v.requires_grad]
    dy = torch.randn_like(selective_scan(**problem, reduce=reduce, backend=backend))

    def forward():
        with torch.no_grad():
            return selective_scan(**problem, reduce=reduce, backend=backend)

    def both():
        return torch.autograd.grad(selective_scan(**problem, reduce=reduce, backend=backend), inputs, dy)

    times = {}
    for name, run in (("fwd", forward), ("fwdbwd", both)):
        samples = [median_ms(run) for _ in range(3)]
        times[name], times[name + "_spread"] = statistics.median(samples), max(samples) - min(samples)
    device_fwd, device_both = graph_ms(forward), graph_ms(both)
    peak = peak_bytes(both)
    with deterministic():
        same_bits, same_bits_peak = graph_ms(both), peak_bytes(both)
    kept = sum(x.numel() * x.element_size() for x in (*inputs, dy))  # the gradients, and y
    given = sum(v.numel() * v.element_size() for v in inputs)
    anchor_fwd, anchor_both = scan_anchor(shape, dtype)
    floor = max(shape.bytes(DTYPES[dtype].itemsize) / bandwidth, shape.exps / 3.7e12) * 1e3
    return {
        "shape": shape.name, "dtype": dtype, "backend": backend, "reduce": reduce or "none",
        "fwd_ms": times["fwd"], "fwd_spread": times["fwd_spread"], "fwd_ratio": anchor_fwd / times["fwd"],
        "fwdbwd_ms": times["fwdbwd"], "fwdbwd_spread": times["fwdbwd_spread"],
        "fwdbwd_ratio": anchor_both / times["fwdbwd"],
        "device_fwd_ms": device_fwd, "device_fwd_ratio": anchor_fwd / device_fwd, "device_floor": device_fwd / floor,
        "device_fwdbwd_ms": device_both, "device_fwdbwd_ratio": anchor_both / device_both,
        "peak_mb": peak / 2**20, "extra_over_inputs": max(0, peak - kept) / given,
        "same_bits_fwdbwd_ms": same_bits, "same_bits_extra": max(0, same_bits_peak - kept) / given,
    }  # fmt: skip


def report(rows: list[dict], console: Console, title: str) -> None:
    """A table, and the geometric means of the ratios."""
    table = Table(title=title)
    columns = ("shape", "dtype", "backend", "fwd ms", "x anchor", "f+b ms", "x anchor")
    for column in (
        *columns,
        "graph fwd",
        "x anchor",
        "x floor",
        "graph f+b",
        "x anchor",
        "peak MB",
        "extra",
        "same bits",
        "extra",
    ):
        table.add_column(column, justify="left" if column in ("shape", "dtype", "backend") else "right")
    for row in rows:
        if "wrong" in row:
            table.add_row(row["shape"], row["dtype"], row["backend"], f"[red]{row['wrong']}[/red]")
            continue
        table.add_row(
            row["shape"], row["dtype"], row["backend"],
            f"{row['fwd_ms']:.4f}", f"{row['fwd_ratio']:.2f}", f"{row['fwdbwd_ms']:.4f}", f"{row['fwdbwd_ratio']:.2f}",
            f"{row['device_fwd_ms']:.4f}", f"{row['device_fwd_ratio']:.2f}", f"{row['device_floor']:.2f}",
            f"{row['device_fwdbwd_ms']:.4f}", f"{row['device_fwdbwd_ratio']:.2f}",
            f"{row['peak_mb']:.0f}", f"{row['extra_over_inputs']:.2f}",
            f"{row['same_bits_fwdbwd_ms']:.4f}", f"{row['same_bits_extra']:.2f}",
        )  # fmt: skip
    console.print(table)
    for backend in dict.fromkeys(row["backend"] for row in rows):
        good = [row for row in rows if row["backend"] == backend and "wrong" not in row]
        if good:
            mean = {
                key: math.exp(statistics.fmean(math.log(row[key]) for row in good)) for key in good[0] if "ratio" in key
            }
            console.print(
                f"{backend}, geometric means of {len(good)} rows: {', '.join(f'{k} {v:.2f}x' for k, v in mean.items())}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=[shape.name for shape in scan_shapes()], help="all by default")
    parser.add_argument("--reduce", choices=["sum", "mean"], help="reduce over directions, as the models do")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; on a CPU run python -m benchmarks.kernels_cpu")
    console = Console(width=170)
    bandwidth = copy_bandwidth("cuda")
    rows = []
    for shape in scan_shapes():
        if options.shape and shape.name not in options.shape:
            continue
        for dtype in options.dtype:
            for backend in options.backend:
                try:
                    rows.append(measure(shape, dtype, backend, options.reduce, "cuda", bandwidth))
                except (RuntimeError, ValueError) as error:  # one failing shape must not hide the others
                    first = str(error).strip().splitlines()[0][:90]
                    rows.append({"shape": shape.name, "dtype": dtype, "backend": backend, "wrong": first})
                torch.cuda.empty_cache()
    where = device_line(bandwidth)
    report(rows, console, where)
    if options.out:
        write_csv(options.out, rows, where, "kernels")


if __name__ == "__main__":
    main()

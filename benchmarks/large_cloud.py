"""One cloud of up to 1,000,000 points through one layer: `python -m benchmarks.large_cloud [--device cuda]`.

A surface with noise is ordered along Hilbert's curve and passes one Mamba layer of two directions, forward and forward
+ backward. Times are medians; memory is the peak above what was allocated before, on a CUDA device. The smallest cloud
is checked first: visiting points through the table must give what the layer gives for points stored in that order.
Writes large_cloud_DEVICE.csv and large_cloud_DEVICE.png, and the exponent of growth over the last decade.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_zoo.backbones._mixer import Mamba
from mamba_zoo.scans import point_order
from mamba_zoo.scans._cloud import trusted

RESULTS = Path(__file__).parent / "results"
SCAN = "join(hilbert(cell=None, depth=16), hilbert_trans(cell=None, depth=16))"
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def surface(n: int, device: torch.device) -> Tensor:
    """Points of a wavy sheet, `(1, n, 3)`."""
    draw = torch.Generator().manual_seed(0)
    flat = torch.rand(n, 2, generator=draw) * 2 - 1
    height = 0.3 * torch.sin(4 * flat[:, 0]) * torch.cos(3 * flat[:, 1]) + 0.01 * torch.randn(n, generator=draw)
    return torch.cat([flat, height[:, None]], dim=1)[None].to(device)


def check(layer: Mamba, x: Tensor, xyz: Tensor) -> None:
    """Raise unless following a table equals moving the points.

    Raises:
        RuntimeError: they differ.
    """
    order = point_order(SCAN, xyz)
    with torch.no_grad():
        along = layer(x.float(), order).float()
        first = order[0, 0]
        back = first.argsort()
        table = back[order[0]][None]  # the same walk over points that are stored along the first curve
        moved = layer(x.float()[:, first], table).float()[:, back]
    error = float((along - moved).norm() / moved.norm())
    if not error < 1e-4:
        raise RuntimeError(f"visiting through the table differs from moving the points by {error:.1e}")


def measure(call: Callable[[], Any], device: torch.device, seconds: float = 2.0) -> tuple[float, float | None]:
    """Median time in ms, and the peak of memory in MB above what is there before; None without CUDA."""
    cuda = device.type == "cuda"
    call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        memory = None
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < seconds and len(times) < 50):
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2], memory


def rows_of(sizes: tuple[int, ...], dim: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Times and memory of every size."""
    torch.manual_seed(0)
    layer = Mamba(dim, k=2).to(device)
    check(layer, torch.randn(1, sizes[0], dim, device=device), surface(sizes[0], device))
    layer = layer.to(dtype)
    rows = []
    for n in sizes:
        xyz = surface(n, device)
        x = torch.randn(1, n, dim, device=device, dtype=dtype)
        order_ms, order_mb = measure(lambda xyz=xyz: point_order(SCAN, xyz), device)
        order = trusted(point_order(SCAN, xyz), n)

        def forward(x: Tensor = x, order: Tensor = order) -> Tensor:
            with torch.no_grad():
                return layer(x, order)

        def both(x: Tensor = x, order: Tensor = order) -> None:
            inputs = [x.requires_grad_(), *layer.parameters()]
            torch.autograd.grad(layer(x, order).sum(), inputs)

        fwd_ms, fwd_mb = measure(forward, device)
        both_ms, both_mb = measure(both, device)
        rows.append({
            "points": n, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "order_ms": order_ms, "fwd_ms": fwd_ms,
            "fwdbwd_ms": both_ms, "order_mb": order_mb, "fwd_mb": fwd_mb, "fwdbwd_mb": both_mb,
        })  # fmt: skip
        sys.stdout.write("  ".join(f"{k}={_short(v)}" for k, v in rows[-1].items() if v is not None) + "\n")
        sys.stdout.flush()
    return rows


def growth(rows: list[dict[str, Any]], key: str) -> float | None:
    """The exponent p of `points ** p` between the largest cloud and the largest one a tenth of it or less."""
    last = rows[-1]
    first = next((row for row in reversed(rows) if row["points"] <= last["points"] / 10), None)
    if first is None or not first[key] or not last[key]:
        return None
    return math.log(last[key] / first[key]) / math.log(last["points"] / first["points"])


def plot(rows: list[dict[str, Any]], path: Path, where: str) -> None:
    """Time and memory against points, with lines of linear growth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("ms", "milliseconds")] + ([("mb", "MB above the inputs")] if rows[0]["fwd_mb"] is not None else [])
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    points = [row["points"] for row in rows]
    names = {"order": "Hilbert order", "fwd": "layer, forward", "fwdbwd": "layer, forward + backward"}
    for i, (unit, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for kind, name in names.items():
            axes.plot(points, [row[f"{kind}_{unit}"] for row in rows], marker=".", label=name)
        end = rows[-1][f"fwdbwd_{unit}"]
        axes.plot(points, [end * n / points[-1] for n in points], ":", color="gray", label="linear")
        axes.set(xscale="log", yscale="log", xlabel="points of one cloud", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{where}: width {rows[0]['dim']}, two directions, {rows[0]['dtype']}", fontsize=10)
    figure.savefig(path, dpi=130)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, help="points of the largest cloud (default: 1,000,000; CPU 100,000)")
    parser.add_argument("--dim", type=int, help="width of the layer (default: 384; CPU 64)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file and the picture")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    largest = args.largest or (1_000_000 if cuda else 100_000)
    sizes = tuple(n for n in SIZES if n <= largest)
    if not sizes:
        parser.error(f"--largest must be at least {SIZES[0]}")
    rows = rows_of(sizes, args.dim or (384 if cuda else 64), device, torch.bfloat16 if cuda else torch.float32)
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    kind = torch.cuda.get_device_name().split()[1].lower() if cuda else "cpu"
    for key in ("order_ms", "fwd_ms", "fwdbwd_ms", "fwdbwd_mb"):
        if (exponent := growth(rows, key)) is not None:
            sys.stdout.write(f"{key} grows with points to the power {exponent:.2f} over the last decade\n")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"large_cloud_{kind}.csv").open("w", newline="") as file:
        file.write(f"# {where}; torch {torch.__version__}; python -m benchmarks.large_cloud\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / f"large_cloud_{kind}.png", where)
    return 0


if __name__ == "__main__":
    sys.exit(main())

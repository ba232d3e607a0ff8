"""What visiting orders and long inputs cost on a GPU: `python -m benchmarks.scans [orders] [lengths] [--out FOLDER]`.

orders: the same selective scan through every image scan of the library, against tokens in their own order.
lengths: one sample of growing length, up to 1,000,000 tokens, through the scan and through torch's flash attention of
the same width; time and peak memory, forward and forward + backward. Orders are timed in CUDA graphs, without the host;
lengths as eager calls. `python -m benchmarks.plots` draws the CSV files.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mamba_zoo.kernels import selective_scan
from mamba_zoo.scans import build_scan, list_scans

from .kernels import check, graph_ms, make_inputs, median_ms
from .shapes import Shape, scan_shapes

SIDES = {"vmamba_t_s1": 56, "vmamba_t_s3": 14, "vmamba_v0_s1": 56}
LENGTHS = [2**e for e in range(10, 20)] + [1_000_000]
WIDTH, STATES, HEAD = 384, 16, 64  # of Vim-T's inner stream
LONGEST_ATTENTION = 2**18  # a quarter of a minute a repetition beyond


def orders(device: str) -> list[dict[str, Any]]:
    """Device times of each order, and how much longer they are than in the order of the tokens."""
    rows = []
    shapes = {shape.name: shape for shape in scan_shapes()}
    for name, side in SIDES.items():
        shape = shapes[name]
        problem = make_inputs(shape, torch.bfloat16, device)
        if wrong := check(shape, problem, "cuda"):
            raise RuntimeError(f"{name}: {wrong}")
        inputs = [v for v in problem.values() if torch.is_tensor(v) and v.requires_grad]
        dy = torch.randn_like(selective_scan(**problem))
        own = None
        for scan in track(["own order", *list_scans(modality="image")], description=name):
            if scan == "own order":
                order = torch.arange(shape.l, device=device).repeat(shape.k, 1)
            else:
                table = build_scan(scan, side, side).order.to(device)
                if table.shape[1] != shape.l:  # a direction that visits a part of the tokens does less work
                    continue
                order = table.repeat(-(-shape.k // len(table)), 1)[: shape.k].contiguous()
            problem["order"] = order

            def both(problem: dict[str, Any] = problem, inputs: list = inputs, dy: torch.Tensor = dy) -> Any:
                return torch.autograd.grad(selective_scan(**problem), inputs, dy)

            def forward(problem: dict[str, Any] = problem) -> Any:
                with torch.no_grad():
                    return selective_scan(**problem)

            times = graph_ms(forward), graph_ms(both)
            own = own or times
            rows.append(
                {
                    "shape": name, "scan": scan, "fwd_ms": times[0], "fwdbwd_ms": times[1],
                    "fwd_over_own": times[0] / own[0] - 1, "fwdbwd_over_own": times[1] / own[1] - 1,
                }
            )  # fmt: skip
    return rows


def lengths(device: str) -> list[dict[str, Any]]:
    """Time and memory of one sample of each length, through the scan and through attention."""
    rows = []
    for l in track(LENGTHS, description="lengths"):
        shape = Shape(f"length {l}", 1, l, 1, WIDTH, STATES, True)
        problem = make_inputs(shape, torch.bfloat16, device)
        if wrong := check(shape, problem, "cuda"):
            raise RuntimeError(f"{shape.name}: {wrong}")
        inputs = [v for v in problem.values() if torch.is_tensor(v) and v.requires_grad]
        rows.append({"what": "scan", "tokens": l, **_cost(lambda p=problem: selective_scan(**p), inputs)})
        del problem, inputs
        if l <= LONGEST_ATTENTION:
            q, k, v = (
                torch.randn(1, WIDTH // HEAD, l, HEAD, device=device, dtype=torch.bfloat16, requires_grad=True)
                for _ in range(3)
            )
            cost = _cost(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), [q, k, v])
            rows.append({"what": "attention", "tokens": l, **cost})
            del q, k, v
        torch.cuda.empty_cache()
    return rows


def _cost(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Times in ms, and the peak of memory above the inputs in MB."""
    dy = torch.randn_like(run())

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return run()

    def both() -> Any:
        return torch.autograd.grad(run(), inputs, dy)

    cost = {"fwd_ms": median_ms(forward), "fwdbwd_ms": median_ms(both)}
    for name, call in (("fwd_mb", forward), ("fwdbwd_mb", both)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        cost[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        del result
    return cost


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as CSV under a line that says where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, python {platform.python_version()}"
        file.write(f"# {where}; python -m benchmarks.scans {' '.join(sys.argv[1:])}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help="orders, lengths; both by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV files")
    options = parser.parse_args()
    if unknown := set(options.what) - {"orders", "lengths"}:
        parser.error(f"{', '.join(sorted(unknown))}: choose orders or lengths")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console = Console(width=120)
    kind = torch.cuda.get_device_name().split()[1].lower()
    for name, measure in (("orders", orders), ("lengths", lengths)):
        if options.what and name not in options.what:
            continue
        rows = measure("cuda")
        table = Table(*rows[0], title=f"{name}, {torch.cuda.get_device_name()}")
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
        write(rows, options.out / f"{name}_{kind}.csv")


if __name__ == "__main__":
    main()

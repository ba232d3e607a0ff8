"""Time alternatives to the CUDA launch table: `python -m benchmarks.launch_table [--shape NAME ...] [--pass forward]`.

For another GPU, or after a change of a kernel: what `_cuda/_plan.py` chooses, against other tiles, lanes and blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mamba_zoo.kernels import selective_scan
from mamba_zoo.kernels._cuda import _plan
from mamba_zoo.kernels._cuda import selective_scan as implementation
from mamba_zoo.kernels._cuda._plan import Launch

from .kernels import DTYPES, graph_ms, make_inputs
from .shapes import scan_shapes

# (lanes, channels per thread, steps per tile, threads, resident blocks, decays kept in registers)
FORWARD = {
    1: [(1, v, t, threads, blocks, True)
        for v in (1, 2) for t in (8, 16) for threads, blocks in ((64, 6), (64, 8), (96, 4), (128, 4))],
    16: [(1, 1, 8, 64, 6, True), (1, 1, 8, 64, 8, True), (1, 1, 8, 128, 3, True), (1, 1, 4, 64, 8, True),
         (2, 1, 8, 64, 6, True), (2, 1, 8, 64, 8, True), (2, 1, 16, 64, 6, True), (2, 1, 8, 128, 4, True),
         (4, 1, 16, 128, 3, True), (4, 1, 16, 128, 4, True), (4, 1, 8, 128, 4, True), (4, 1, 16, 64, 6, True),
         (2, 2, 8, 64, 4, True), (2, 2, 8, 64, 6, True)],
}  # fmt: skip
BACKWARD = {
    1: [(1, v, t, threads, blocks, True)
        for v in (1, 2) for t in (8, 16)
        for threads, blocks in ((32, 8), (32, 12), (64, 4), (64, 6), (64, 8), (96, 4), (128, 2), (128, 4))],
    16: [(4, 1, 8, 64, 6, True), (4, 1, 8, 64, 8, True), (4, 1, 4, 128, 4, True), (4, 1, 4, 64, 8, True),
         (2, 1, 4, 64, 6, True), (2, 1, 8, 64, 5, False), (2, 1, 8, 128, 3, False),
         (2, 1, 8, 128, 2, True), (2, 1, 8, 128, 2, False), (2, 1, 8, 64, 4, True), (2, 1, 4, 128, 3, False),
         (2, 1, 4, 128, 3, True), (2, 1, 4, 128, 2, True), (1, 1, 4, 128, 2, True), (1, 1, 4, 64, 4, True),
         (4, 1, 8, 128, 3, True), (4, 1, 8, 128, 4, True), (4, 1, 8, 128, 4, False), (4, 1, 8, 128, 2, True),
         (4, 1, 16, 128, 2, True), (2, 1, 8, 256, 1, True)],
}  # fmt: skip


def candidates(table: dict[int, list], n: int, d: int) -> Iterator[Launch]:
    """Lines to try for `n` states, without blocks that would be mostly idle."""
    for lanes, width, tile, threads, blocks, hold in table[16 if n > 1 else 1]:
        launch = Launch(_plan.padded(n), lanes, width, tile, threads, blocks, hold)
        if d % width == 0 and launch.channels <= max(32, 2 * d):
            yield launch


def time_pass(problem: dict[str, Any], backward: bool, compile_only: bool) -> float:
    """Median ms on the device of a forward pass, or of a forward and a backward pass."""
    inputs = [v for v in problem.values() if torch.is_tensor(v) and v.requires_grad]
    dy = torch.randn_like(selective_scan(**problem, backend="cuda"))

    def run() -> Any:
        if backward:
            return torch.autograd.grad(selective_scan(**problem, backend="cuda"), inputs, dy)
        with torch.no_grad():
            return selective_scan(**problem, backend="cuda")

    if compile_only:
        run()
        return 0.0
    return graph_ms(run)


def try_launches(shape, dtype: str, name: str, console: Console, compile_only: bool) -> None:
    """Time the shipped line and the candidates for one shape and pass."""
    backward = name == "backward"
    problem = make_inputs(shape, DTYPES[dtype], "cuda")
    attribute = f"{name}_launch"
    shipped = getattr(_plan, attribute)
    times: list[tuple[float, str]] = []
    try:
        times.append((time_pass(problem, backward, compile_only), "shipped"))
        for launch in candidates(BACKWARD if backward else FORWARD, shape.n, shape.d):
            label = (
                f"lanes {launch.lanes} x {launch.width} channels, T {launch.tile}, {launch.threads} threads, "
                f"{launch.blocks} blocks{'' if launch.hold else ', decays again'}"
            )
            setattr(_plan, attribute, lambda *_, line=launch: line)
            implementation._setups.clear()
            try:
                times.append((time_pass(problem, backward, compile_only), label))
            except RuntimeError as error:
                console.print(f"{label}: {str(error).splitlines()[0]}")
    finally:
        setattr(_plan, attribute, shipped)
        implementation._setups.clear()
    if compile_only:
        return
    table = Table(title=f"{shape.name} {dtype} {name}")
    table.add_column("ms")
    table.add_column("launch")
    best = sorted(times)[:6]
    for ms, label in best if times[0] in best else [*best, times[0]]:
        table.add_row(f"{ms:.4f}", label)
    console.print(table)


def main() -> None:
    """Parse the command line and try every chosen shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", help="names of shapes; all by default")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--pass", dest="passes", nargs="*", default=["forward", "backward"])
    parser.add_argument("--compile", action="store_true", help="fill the kernel cache only, one process a shape")
    options = parser.parse_args()
    console = Console(width=140)
    for shape in scan_shapes():
        if not options.shape or shape.name in options.shape:
            for name in options.passes:
                try_launches(shape, options.dtype, name, console, options.compile)


if __name__ == "__main__":
    main()

"""Time the causal convolution on a GPU, in CUDA and in Triton: `python -m benchmarks.conv [--out FILE]`.

Replayed CUDA graphs, so without the host; "floor" is what the bytes take at the measured copy bandwidth, each input
read once and each output written once. A time is only given after values and gradients agreed with float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mamba_zoo.kernels import causal_conv1d

from .kernels import TOLERANCE, copy_bandwidth, device_line, disagreement, graph_ms, write_csv

# name: samples, tokens, channels, directions that share the tokens, SiLU
SHAPES = {
    "vim_tiny": (128, 197, 384, 2, True),
    "vim_small": (128, 197, 768, 2, True),
    "lm_2k": (8, 2048, 1536, 1, True),
    "aum_base": (32, 513, 768, 2, True),
    "four_directions": (64, 784, 192, 4, False),
}
TAPS = 4


def make_inputs(b: int, l: int, d: int, k: int, silu: bool) -> dict[str, Any]:
    """Random inputs in bfloat16; directions visit the tokens in random orders."""
    torch.manual_seed(0)
    return {
        "x": torch.randn(b, l, d, device="cuda", dtype=torch.bfloat16).requires_grad_(),
        "weight": torch.randn(k, d, TAPS, device="cuda").requires_grad_(),
        "bias": torch.randn(k, d, device="cuda").requires_grad_(),
        "order": torch.stack([torch.randperm(l, device="cuda") for _ in range(k)]),
        "activation": "silu" if silu else None,
    }


def check(problem: dict[str, Any], backend: str) -> None:
    """Raise unless two samples of the problem agree with float64.

    Raises:
        RuntimeError: they do not; says by how much.
    """

    def run(given: dict[str, Any], exact: bool) -> tuple[torch.Tensor]:
        return (causal_conv1d(**given, backend="reference" if exact else backend),)

    if wrong := disagreement(run, problem | {"x": problem["x"][:2]}, TOLERANCE[torch.bfloat16]):
        raise RuntimeError(f"{backend}: {wrong}")


def measure(name: str, backend: str, bandwidth: float) -> dict[str, Any]:
    """Times of one shape in ms."""
    b, l, d, k, silu = SHAPES[name]
    problem = make_inputs(b, l, d, k, silu)
    check(problem, backend)
    inputs = [problem[key] for key in ("x", "weight", "bias")]

    def forward() -> Any:
        with torch.no_grad():
            return causal_conv1d(**problem, backend=backend)

    dy = torch.randn_like(forward())
    one = graph_ms(forward)
    both = graph_ms(lambda: torch.autograd.grad(causal_conv1d(**problem, backend=backend), inputs, dy))
    rows = 2 * b * l * d / bandwidth * 1e3
    return {
        "shape": name, "backend": backend, "fwd_ms": one, "fwd_floor": rows * (1 + k),
        "fwdbwd_ms": both, "fwdbwd_floor": rows * (1 + k + 2 + k),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    bandwidth = copy_bandwidth("cuda")
    rows = [measure(name, backend, bandwidth) for name in SHAPES for backend in ("triton", "cuda")]
    table = Table(*rows[0], title="causal convolution, ms")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
    Console(width=120).print(table)
    if options.out:
        write_csv(options.out, rows, device_line(bandwidth), "conv")


if __name__ == "__main__":
    main()

"""Time norms, MLPs and convolutions of maps on a GPU: `python -m benchmarks.layers [--only NAME ...] [--out FILE]`.

Replayed CUDA graphs, so without the host, of what models call under autocast: tokens are bfloat16, Vim's stream and all
weights float32. Times have in them what a backend casts of the weights, which in models is cast for all linear layers
at once. "torch" is plain torch. "fwd" is without gradients, "fwdbwd" both passes with all gradients.

"floor" is what the bytes take at the copy bandwidth of the same run: forward each argument read once and each result
written once; backward each gradient of a result, and the tokens that the op keeps, read once, and each gradient of an
argument written once, one for stream and branch if they are the same tensor. The MLP has none: bytes are not all
that limits its products, which torch makes on every backend. "peak" is the memory that an eager fwdbwd takes beyond its
arguments, results and gradients included.

A time is only given after values and gradients of the first samples agreed with float64.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from triton.errors import TritonError

from mamba_zoo.kernels import add_norm, depthwise_conv2d
from mamba_zoo.kernels.mlp import mlp

from .kernels import copy_bandwidth, device_line, disagreement, graph_ms, peak_bytes, write_csv

OPS: dict[str, Callable[..., Any]] = {"add_norm": add_norm, "mlp": mlp, "depthwise_conv2d": depthwise_conv2d}
BACKENDS = {
    "add_norm": ("cuda", "triton", "torch"),
    "mlp": ("cuda", "triton", "torch"),
    "depthwise_conv2d": ("cuda", "torch"),
}
# Relative errors allowed: plain torch in bfloat16 is off by up to 2e-3, 4e-3 and 3e-3.
TOLERANCE = {"add_norm": 6e-3, "mlp": 1e-2, "depthwise_conv2d": 6e-3}
CHECKED = 16  # samples; rows are then a multiple of 16 as all rows are, so that Triton compiles nothing twice


@dataclass(frozen=True)
class Case:
    """One op at the shape of one model's tokens, `(b, ..., d)`."""

    op: str
    shape: str
    tokens: tuple[int, ...]
    branch: bool = False
    stream: torch.dtype = torch.bfloat16
    kind: str = "layer"


def cases() -> list[Case]:
    """All of them."""
    stages = {f"vmamba_t{i + 1}": (128, 56 >> i, 56 >> i, 96 << i) for i in range(4)}
    base = {"vmamba_b1": (128, 56, 56, 128)}
    return [
        *(Case("add_norm", name, tokens) for name, tokens in stages.items()),
        *(Case("add_norm", f"{name}_branch", tokens, True) for name, tokens in (stages | base).items()),
        Case("add_norm", "vim_s_branch", (128, 197, 384), True, torch.float32, "rms"),
        *(Case("mlp", name, tokens) for name, tokens in stages.items()),
        *(Case("depthwise_conv2d", name, tokens) for name, tokens in (stages | base).items()),
    ]


def chosen(patterns: list[str]) -> list[Case]:
    """The cases whose op, shape or "op/shape" matches a pattern.

    Raises:
        ValueError: a pattern that nothing matches.
    """

    def matches(case: Case, pattern: str) -> bool:
        names = (case.op, case.shape, f"{case.op}/{case.shape}")
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)

    for pattern in patterns:
        if not any(matches(case, pattern) for case in cases()):
            names = ", ".join(f"{case.op}/{case.shape}" for case in cases())
            raise ValueError(f"{pattern!r} is no op, shape or op/shape; there are {names}")
    return [case for case in cases() if any(matches(case, pattern) for pattern in patterns)]


def make_inputs(case: Case, device: str) -> dict[str, Any]:
    """Random arguments of the op, all tensors with a gradient."""
    torch.manual_seed(0)
    d = case.tokens[-1]

    def weight(*size: int, fan_in: int = 1) -> torch.Tensor:
        return (torch.randn(size, device=device) / fan_in**0.5).requires_grad_()

    def rows(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(case.tokens, device=device, dtype=dtype).requires_grad_()

    problem: dict[str, Any] = {"x": rows(case.stream)}
    if case.op == "mlp":
        problem |= {"weight1": weight(4 * d, d, fan_in=d), "bias1": weight(4 * d)}
        return problem | {"weight2": weight(d, 4 * d, fan_in=4 * d), "bias2": weight(d)}
    if case.op == "depthwise_conv2d":
        return problem | {"weight": weight(d, 1, 3, 3, fan_in=9), "activation": "silu"}
    problem |= {"weight": weight(d), "kind": case.kind, "out_dtype": torch.bfloat16}
    if case.kind == "layer":
        problem["bias"] = weight(d)
    if case.branch:
        problem["branch"] = rows(torch.bfloat16)
    return problem


def call(op: str, problem: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
    """What the op computes under autocast, or in float64."""
    x = problem["x"]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
        results = OPS[op](**problem, backend="reference" if backend == "torch" else backend)
    if op != "add_norm":
        return (results,)
    return results if "branch" in problem else results[1:]  # the stream is then x itself


def check(op: str, problem: dict[str, Any], backend: str) -> str | None:
    """None if the first samples agree with float64, else what does not."""

    def run(given: dict[str, Any], exact: bool) -> tuple[torch.Tensor, ...]:
        wide = {"out_dtype": torch.float64} if exact and op == "add_norm" else {}
        return call(op, given | wide, "torch" if exact else backend)

    part = problem | {name: problem[name][:CHECKED] for name in ("x", "branch") if name in problem}
    return disagreement(run, part, TOLERANCE[op])


def floor_bytes(case: Case) -> tuple[int, int] | None:
    """Least traffic of a forward pass and of both passes; None for the MLP."""
    if case.op == "mlp":
        return None
    problem = make_inputs(case, "meta")
    tensors = {name: value for name, value in problem.items() if torch.is_tensor(value)}
    tokens = tensors["x"].numel()
    stream = tokens * case.stream.itemsize
    given = sum(t.numel() * t.element_size() for t in tensors.values())
    results = tokens * torch.bfloat16.itemsize + (stream if case.branch else 0)
    gradients = given
    if case.branch and tensors["branch"].dtype == case.stream:
        gradients -= stream
    forward = given + results
    return forward, forward + results + stream + gradients


def measure(case: Case, backend: str, bandwidth: float, device: str = "cuda") -> dict[str, Any]:
    """Times in us and memory in MB of one op at one shape, or what is "wrong"."""
    problem = make_inputs(case, device)
    if wrong := check(case.op, problem, backend):
        return {"wrong": wrong}
    inputs = [value for value in problem.values() if torch.is_tensor(value)]

    def forward() -> Any:
        with torch.no_grad():
            return call(case.op, problem, backend)

    seeds = [torch.randn_like(y) for y in forward()]

    def both() -> Any:
        return torch.autograd.grad(call(case.op, problem, backend), inputs, seeds)

    peak = peak_bytes(both)
    floors = [None, None] if (least := floor_bytes(case)) is None else [1e6 * n / bandwidth for n in least]
    return {
        "fwd_us": 1e3 * graph_ms(forward), "fwd_floor": floors[0],
        "fwdbwd_us": 1e3 * graph_ms(both), "fwdbwd_floor": floors[1], "peak_mb": peak / 2**20,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], title: str) -> Table:
    """A table; a line that is wrong says why in the place of times."""
    table = Table("op", "shape", "tokens", "backend", title=title)
    for column in ("fwd us", "floor", "fwd+bwd us", "floor", "peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        names = [row[key] for key in ("op", "shape", "tokens", "backend")]
        if "wrong" in row:
            table.add_row(*names, Text(row["wrong"], style="red"))
            continue
        values = (row[key] for key in ("fwd_us", "fwd_floor", "fwdbwd_us", "fwdbwd_floor", "peak_mb"))
        table.add_row(*names, *("-" if value is None else f"{value:.1f}" for value in values))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="ops, shapes or op/shape; * is any text"
    )
    backends = ["cuda", "triton", "torch"]
    parser.add_argument("--backends", nargs="+", default=backends, choices=backends)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    try:
        found = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    wanted = [(case, backend) for case in found for backend in BACKENDS[case.op] if backend in options.backends]
    if not wanted:
        parser.error(f"no backend of {', '.join(options.backends)} has what --only names")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    bandwidth = copy_bandwidth("cuda")
    rows = []
    for case, backend in wanted:
        row = {"op": case.op, "shape": case.shape, "tokens": "x".join(map(str, case.tokens)), "backend": backend}
        try:
            row |= measure(case, backend, bandwidth)
        except (RuntimeError, ValueError, TritonError) as error:  # one that fails must not hide the others
            row["wrong"] = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
        rows.append(row)
        torch.cuda.empty_cache()
    where = device_line(bandwidth)
    Console(width=150).print(report(rows, where))
    if options.out:
        write_csv(options.out, rows, where, "layers")


if __name__ == "__main__":
    main()

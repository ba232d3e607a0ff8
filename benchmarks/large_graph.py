"""One layer over large graphs: `python -m benchmarks.large_graph [--sizes 1000,10000,100000,1000000] [--device cuda]`.

Random graphs of `--degree` edges a node, nodes joined to others a geometric distance away, so that there is a local
structure and a few long edges. For each size: the seconds that the order takes (once for a graph, on the CPU), and time
and peak memory of one layer of Graph-Mamba, forward and forward + backward; beside it the same layer without its scan,
and attention over all nodes, PyG's GPS layer, where it fits. Writes `large_graph.csv` and `large_graph.png`.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mamba_zoo
from mamba_zoo.backbones._graph import Visit
from mamba_zoo.scans import Graphs, graph_order

RESULTS = Path(__file__).parent / "results"


def random_graph(nodes: int, degree: int, seed: int = 0) -> Graphs:
    """Undirected, with `degree` edges a node on average, most of them to nodes near by in the numbering."""
    draw = np.random.default_rng(seed)
    count = nodes * degree // 2
    source = draw.integers(0, nodes, count)
    target = (source + draw.geometric(0.02, count)) % nodes
    far = draw.random(count) < 0.05
    target[far] = draw.integers(0, nodes, int(far.sum()))
    pairs = torch.from_numpy(np.stack([source, target]))
    shuffled = torch.from_numpy(draw.permutation(nodes))
    return Graphs(shuffled[torch.cat([pairs, pairs.flip(0)], dim=1)], torch.tensor([0, nodes]))


def measure(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, int | None]:
    """Median seconds, and peak bytes allocated on a GPU."""
    work()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def layer_rows(graphs: Graphs, order: Tensor, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of the layers on one graph."""
    n, dim = graphs.num_nodes, args.dim
    x = torch.randn(n, dim, device=device, requires_grad=True)
    edge_index, ptr, order = graphs.edge_index.to(device), graphs.ptr.to(device), order.to(device)
    rows = []
    for name in ("mamba", "mamba + gcn", "gcn", "attention"):
        if name == "attention":
            if n > args.attention_nodes:
                continue
            attention = torch.nn.MultiheadAttention(dim, 4, batch_first=True).to(device)
            forward = lambda: attention(x[None], x[None], x[None], need_weights=False)[0]  # noqa: E731, B023
        else:
            options: dict[str, Any] = {"k": 0 if name == "gcn" else 1, "local": "none" if name == "mamba" else "gcn"}
            layer: Any = mamba_zoo.create_model("graph_mamba_layer", dim=dim, **options).to(device)
            visits = [Visit(order if options["k"] else None, ptr)]
            forward = lambda: layer(x, edge_index, None, visits)[0]  # noqa: E731, B023

        def backward() -> None:
            x.grad = None
            forward().sum().backward()  # noqa: B023

        with torch.no_grad():
            ahead, ahead_bytes = measure(forward, device, args.repeats)
        both, both_bytes = measure(backward, device, args.repeats)
        rows.append({
            "layer": name, "forward_ms": round(1e3 * ahead, 3), "forward_backward_ms": round(1e3 * both, 3),
            "forward_mb": _mb(ahead_bytes), "forward_backward_mb": _mb(both_bytes),
        })  # fmt: skip
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory against the number of nodes, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    memory = any(row["forward_backward_mb"] != "" for row in rows)
    figure, axes = pyplot.subplots(1, 2 if memory else 1, figsize=(11 if memory else 5.5, 4), squeeze=False)
    columns = [("forward_backward_ms", "forward + backward, ms"), ("forward_backward_mb", "peak memory, MB")]
    for axis, (column, label) in zip(axes[0], columns, strict=False):
        for name in dict.fromkeys(row["layer"] for row in rows):
            mine = [row for row in rows if row["layer"] == name]
            axis.plot([row["nodes"] for row in mine], [row[column] for row in mine], "o-", label=name)
        sizes = sorted({row["nodes"] for row in rows})
        base = next(row for row in rows if row["layer"] == "mamba" and row["nodes"] == sizes[-1])[column]
        axis.plot(sizes, [base * n / sizes[-1] for n in sizes], "k:", linewidth=1, label="linear")
        axis.set(xscale="log", yscale="log", xlabel="nodes", ylabel=label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mb(count: int | None) -> float | str:
    return "" if count is None else round(count / 2**20, 1)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="nodes (default: %(default)s)")
    parser.add_argument("--degree", type=int, default=8, help="edges a node (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="channels (default: %(default)s)")
    parser.add_argument("--order", default="rcm", help="order of the nodes (default: %(default)s)")
    parser.add_argument("--attention-nodes", type=int, default=20000, help="largest graph for attention")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found: list[dict[str, Any]] = []
    args.results.mkdir(parents=True, exist_ok=True)
    for nodes in map(int, args.sizes.split(",")):
        graphs = random_graph(nodes, args.degree)
        started = time.perf_counter()
        order = graph_order(args.order, graphs)
        seconds = time.perf_counter() - started
        for row in layer_rows(graphs, order, args, device):
            head = {"nodes": nodes, "edges": graphs.edge_index.shape[1], "order": args.order,
                    "order_s": round(seconds, 3)}  # fmt: skip
            found.append({**head, **row})
            sys.stdout.write("  ".join(f"{key}={value}" for key, value in found[-1].items()) + "\n")
            sys.stdout.flush()
        write(found, name, args, device)  # after each size: the last one takes longest
    plot(found, args.results / f"large_graph_{device.type}.png")
    return 0


def write(rows: Sequence[dict[str, Any]], name: str, args: argparse.Namespace, device: torch.device) -> None:
    """CSV, its first line saying where it was made."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    with (args.results / f"large_graph_{device.type}.csv").open("w", newline="", encoding="utf-8") as file:
        command = f"python -m benchmarks.large_graph --sizes {args.sizes} --order {args.order} --device {args.device}"
        file.write(
            f"# {name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, float32, dim {args.dim}, "
            f"{args.degree} edges a node, process peak {peak} MB; {command}\n"
        )
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())

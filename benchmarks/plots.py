"""Pictures of the measurements in `benchmarks/results`: `python -m benchmarks.plots [--device h100]`.

`roofline_DEVICE.png`: device time of every scan shape against the floor that memory and exponentials set.
`lengths_DEVICE.png`: time and memory against length, scan and attention.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
COLORS = {"scan": "tab:blue", "attention": "tab:orange"}


def read(name: str) -> tuple[str, list[dict[str, str]]]:
    """The first line of a result file, which says where it is from, and its rows."""
    path = RESULTS / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; README.md beside this file says which command writes it")
    with path.open() as file:
        where = file.readline().removeprefix("# ").strip()
        return where.split(";")[0], list(csv.DictReader(file))


def figure(width: float, height: float) -> Any:
    """An empty figure, without a window."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def roofline(device: str) -> Any:
    """Forward times of the scan's shapes against their floors."""
    where, rows = read(f"scan_{device}.csv")
    rows = [row for row in rows if row["backend"] == "cuda" and row["device_fwd_ms"]]
    drawn = figure(7, 5)
    axis = drawn.subplots()
    floors = [float(row["device_fwd_ms"]) / float(row["device_floor"]) for row in rows]
    times = [float(row["device_fwd_ms"]) for row in rows]
    ends = [min(floors) / 1.5, max(floors) * 1.5]
    for factor, style in ((1, "-"), (2, "--")):
        axis.plot(ends, [factor * e for e in ends], style, color="gray", label=f"{factor} x floor")
    axis.scatter(floors, times, zorder=3)
    for row, x, y in zip(rows, floors, times, strict=True):
        axis.annotate(row["shape"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="floor: bytes / copy bandwidth or exponentials / 3.7e12 per s, in ms")
    axis.set(ylabel="measured forward pass, ms", title=where)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    return drawn


def lengths(device: str) -> Any:
    """Time and memory of one sample against its length."""
    where, rows = read(f"lengths_{device}.csv")
    drawn = figure(10, 4.2)
    axes = drawn.subplots(1, 2)
    for what, (kind, style) in itertools.product(COLORS, (("fwd", "--"), ("fwdbwd", "-"))):
        mine = [row for row in rows if row["what"] == what]
        tokens = [int(row["tokens"]) for row in mine]
        label = f"{what}, {'forward' if kind == 'fwd' else 'forward + backward'}"
        for axis, unit in zip(axes, ("ms", "mb"), strict=True):
            values = [float(row[f"{kind}_{unit}"]) for row in mine]
            axis.plot(tokens, values, style, marker=".", color=COLORS[what], label=label)
    for axis, name in zip(axes, ("ms", "MB above the inputs"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    drawn.suptitle(f"{where}: width 384, 16 states, bf16, one sample")
    return drawn


def main() -> None:
    """Draw what the files of one device allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="h100", help="part of the file names (default: h100)")
    device = parser.parse_args().device
    for name, draw in (("roofline", roofline), ("lengths", lengths)):
        path = RESULTS / f"{name}_{device}.png"
        draw(device).savefig(path, dpi=130)
        print(path)


if __name__ == "__main__":
    main()

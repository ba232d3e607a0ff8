"""Draw every registered scan into docs/scans/ and write its section of docs/scans.md, from the docstrings.

Scans of grids, orders of graphs and orders of points have a part of the page each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mamba_zoo.scans import SCANS, Graphs, ScanEntry, build_scan, graph_order, list_scans, point_order
from mamba_zoo.scans._cloud import POINTS

PAGE = Path(__file__).parent / "scans.md"
PICTURES = Path(__file__).parent / "scans"
GRIDS = {2: (14, 14), 3: (4, 8, 8)}  # of images and of videos
BEGIN, END = "<!-- begin: {}, written by docs/make_scans.py -->", "<!-- end: {} -->"
COLUMNS = {
    "jump_mean": "mean jump",
    "jump_max": "longest jump",
    "adjacent": "moves to a neighbour",
    "near_any": "neighbours within 8 steps",
    "gap_best_mean": "steps between neighbours",
}
NEAREST = 6  # points that count as neighbours


def main() -> None:
    """Write the pictures and the page."""
    PICTURES.mkdir(exist_ok=True)
    for name in list_scans():
        build_scan(name, *grid_of(name)).plot(PICTURES / f"{name}.png", panel=1.9, title="", dpi=90)
    for name in list_scans(modality="graph"):
        draw_graph(name, PICTURES / f"graph_{name}.png")
    for name in list_scans(modality="points"):
        draw_points(name, PICTURES / f"points_{name}.png")
    for path in PICTURES.glob("*.png"):
        with Image.open(path) as picture:  # of limited colours, which keeps the repository small
            small = picture.convert("RGB").quantize(160, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
    PAGE.write_text(page_with(generated(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def generated() -> dict[str, str]:
    """Each part of the page: the table of its scans, then one section each."""
    grids = [section(name, SCANS[name], name, "") for name in list_scans()]
    graphs = [section(name, SCANS[name], name, "graph_") for name in list_scans(modality="graph")]
    clouds = [
        section(name, POINTS.named[name], f"{name}, of points", "points_") for name in list_scans(modality="points")
    ]
    return {
        "scans": "\n".join([*grid_table(), "", *grids]),
        "graphs": "\n".join([*graph_table(), "", *graphs]),
        "points": "\n".join([*point_table(), "", *clouds]),
    }


def page_with(parts: Mapping[str, str], page: str) -> str:
    """The page with its generated parts replaced."""
    for name, text in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"
    return page


def section(name: str, entry: ScanEntry, heading: str, prefix: str) -> str:
    """Name, options, picture and docstring of one scan."""
    parameters = inspect.signature(entry.function).parameters.values()
    options = ", ".join(f"{p.name}={p.default!r}" for p in parameters if p.default is not p.empty)
    text = re.split(r"\n\n(?:Raises|Returns):", inspect.cleandoc(entry.function.__doc__ or ""))[0].replace("``", "`")
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    call = f"`{name}({options})`" if options else f"`{name}`"
    picture = f"![{heading}](scans/{prefix}{name}.png)"
    return f"### {heading}\n\n{call}, for {', '.join(entry.modality)}\n\n{picture}\n\n{text}\n"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def grid_of(name: str) -> tuple[int, ...]:
    """The grid that a scan is shown on: of an image wherever it takes one."""
    return GRIDS[len(SCANS[name].axes or GRIDS[2])]


def grid_table() -> list[str]:
    """Directions and statistics of every scan of grids."""
    rows = []
    for name in list_scans():
        scan = build_scan(name, *grid_of(name))
        found = scan.statistics(window=8)
        # A scan that separates all neighbours has no steps between them.
        cells = [f"{found[key]:.2f}" if key != "gap_best_mean" or found["lost"] < 1 else "none" for key in COLUMNS]
        rows.append([f"[{name}](#{name})", " x ".join(map(str, scan.size)), str(scan.k), *cells])
    return table(["scan", "grid", "directions", *COLUMNS.values()], rows)


@lru_cache
def club() -> tuple[Graphs, np.ndarray]:
    """Zachary's karate club, in 34 nodes, and where the nodes are drawn `(34, 2)`."""
    import networkx

    graph = networkx.karate_club_graph()
    edges = torch.tensor(list(graph.edges())).T
    places = networkx.kamada_kawai_layout(graph)
    return Graphs(torch.cat([edges, edges.flip(0)], 1), torch.tensor([0, 34])), np.stack([places[i] for i in graph])


def graph_table() -> list[str]:
    """What every order makes of the edges of the karate club."""
    graphs, _ = club()
    rows = []
    for name in list_scans(modality="graph"):
        rank = graph_order(name, graphs)[0].argsort()
        apart = rank[graphs.edge_index].diff(dim=0).abs().float()
        moves = int((apart == 1).sum()) / 2 / (graphs.num_nodes - 1)
        cells = [f"{apart.mean():.2f}", f"{int(apart.max())}", f"{moves:.2f}", f"{(apart <= 8).float().mean():.2f}"]
        rows.append([f"[{name}](#{name})", *cells])
    columns = ["order", "steps between joined nodes", "at most", "moves along an edge", "joined nodes within 8 steps"]
    return table(columns, rows)


@lru_cache
def lamp() -> torch.Tensor:
    """200 points of a lamp, `(1, 200, 3)`, y upwards."""
    from mamba_zoo.backbones._points import furthest_points, take_points
    from mamba_zoo.tasks._bundled_clouds import SOLIDS, solid_clouds

    points, label, _ = solid_clouds(1)
    cloud = torch.from_numpy(points[label == list(SOLIDS).index("lamp")])
    return take_points(cloud, furthest_points(cloud, 200).sort(1).values)


def point_table() -> list[str]:
    """Jumps of every order, and what becomes of neighbours, on the lamp."""
    apart = torch.cdist(lamp()[0].double(), lamp()[0].double())
    near = apart.argsort(1)[:, 1 : NEAREST + 1]
    rows = []
    for name in list_scans(modality="points"):
        order = point_order(name, lamp())[0, 0]
        jumps = apart[order[:-1], order[1:]]
        moves = (near[order[:-1]] == order[1:, None]).any(1).double().mean()
        within = (order.argsort()[near] - order.argsort()[:, None]).abs() <= 8
        cells = [f"{value:.2f}" for value in (jumps.mean(), jumps.max(), moves, within.double().mean())]
        rows.append([f"[{name}](#{name}-of-points)", *cells])
    return table(["order", "mean jump", "longest jump", "moves to a neighbour", "neighbours within 8 steps"], rows)


def draw_graph(name: str, path: Path) -> None:
    """The karate club with every node's step, and the way from node to node."""
    from matplotlib.collections import LineCollection

    graphs, places = club()
    order = graph_order(name, graphs)[0].numpy()
    figure, axes = canvas()
    axes.add_collection(LineCollection(list(places[graphs.edge_index.T.numpy()]), colors="0.85", linewidths=0.8))
    joined = {(int(a), int(b)) for a, b in graphs.edge_index.T}
    for step, move in enumerate(zip(order[:-1].tolist(), order[1:].tolist(), strict=True)):
        line = {"linewidth": 1.8} if move in joined else {"linewidth": 0.7, "linestyle": (0, (2, 1.5))}
        axes.plot(*places[list(move)].T, color=colour(step, len(order)), **line)
    axes.scatter(*places[order].T, c=np.arange(len(order)), cmap="viridis", s=130, zorder=3, linewidths=0)
    for step, node in enumerate(order):
        dark = step < 0.6 * len(order)
        axes.text(
            *places[node], str(step), ha="center", va="center", fontsize=6.5, color="w" if dark else "k", zorder=4
        )
    axes.set_axis_off()
    figure.savefig(path, dpi=90)


def draw_points(name: str, path: Path) -> None:
    """The lamp and the way through its points, from the front and from above."""
    cloud = lamp()[0].numpy()[point_order(name, lamp())[0, 0].numpy()]
    figure, _ = canvas(None)
    for place, (height, turn) in enumerate(((12, -70), (55, -30))):
        axes: Any = figure.add_subplot(1, 2, place + 1, projection="3d")
        x, z, y = cloud.T
        for step in range(len(cloud) - 1):
            axes.plot(
                x[step : step + 2], y[step : step + 2], z[step : step + 2], color=colour(step, len(cloud)), lw=0.9
            )
        axes.scatter(x, y, z, c=np.arange(len(cloud)), cmap="viridis", s=7, depthshade=False, linewidths=0)
        axes.view_init(height, turn)
        axes.set_box_aspect((np.ptp(x), np.ptp(y), np.ptp(z)), zoom=1.3)
        axes.set_axis_off()
    figure.savefig(path, dpi=90)


def canvas(axes: str | None = "flat") -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots() if axes else None


def colour(step: int, steps: int) -> Any:
    """Dark for the first step, bright for the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](step / max(steps - 1, 1))


if __name__ == "__main__":
    main()

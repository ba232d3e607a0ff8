"""Parts of point clouds as a picture, and as a page that turns them; the page needs no other file and no network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import write_atomically

COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0",
    "#1f3f7a", "#7a5c00",
)  # fmt: skip


def plot_parts(
    points: np.ndarray, parts: Mapping[str, np.ndarray], names: Sequence[str], path: Path, up: int = 1
) -> None:
    """One panel for each labelling of a cloud, drawn from the same side.

    Args:
        points: `(n, 3)`.
        parts: Titles of the panels, and the part of every point, `(n,)`.
        names: Of the parts.
        path: Of the picture; its ending says the format.
        up: Axis that points upwards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(4.2 * len(parts), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    order = {0: (1, 2, 0), 1: (2, 0, 1), 2: (0, 1, 2)}[up]
    for i, (title, part) in enumerate(parts.items()):
        axes: Any = figure.add_subplot(1, len(parts), i + 1, projection="3d")
        colours = [COLOURS[int(p) % len(COLOURS)] for p in part]
        axes.scatter(*(points[:, axis] for axis in order), c=colours, s=5, linewidths=0, depthshade=True)
        axes.set_title(title)
        axes.set_axis_off()
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        half = max(float(np.linalg.norm(points - middle, axis=1).max()), 1e-6)  # no corner sticks out, from any side
        for axis, limits in zip(order, (axes.set_xlim, axes.set_ylim, axes.set_zlim), strict=True):
            limits(middle[axis] - half, middle[axis] + half)
        axes.set_box_aspect((1, 1, 1), zoom=1.6)
        axes.view_init(20, 40)
    shown = [name for i, name in enumerate(names) if any((part == i).any() for part in parts.values())]
    marks = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS[list(names).index(name) % len(COLOURS)], label=name)
        for name in shown
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 6), frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=110))


def write_viewer(clouds: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[str]]], path: Path) -> None:
    """A page with one cloud after the other: drag turns, the wheel zooms, a click on a part hides it.

    Args:
        clouds: For each its title, points `(n, 3)`, part of every point `(n,)`, and names of the parts.
        path: Of the page.
    """
    data = []
    for title, points, part, names in clouds:
        middle = (points.max(axis=0) + points.min(axis=0)) / 2
        half = max(float(np.abs(points - middle).max()), 1e-9)
        data.append(
            {
                "title": title,
                "names": list(names),
                "points": base64.b64encode(((points - middle) / half).astype("<f4").tobytes()).decode(),
                "parts": base64.b64encode(part.astype(np.uint8).tobytes()).decode(),
            }
        )
    # "</" would end the script wherever it stood.
    text = json.dumps({"clouds": data, "colours": COLOURS}).replace("</", "<\\/")
    title = html.escape(path.stem)
    page = _PAGE.replace("__TITLE__", title).replace("__DATA__", text)
    write_atomically(path, lambda file: file.write(page.encode()))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>__TITLE__</title>
<style>
body { margin: 0; font: 15px sans-serif; color: #222; background: #fff; display: flex; height: 100vh; }
aside { padding: 16px; width: 220px; overflow: auto; border-right: 1px solid #ddd; }
select { width: 100%; padding: 4px; margin-bottom: 12px; }
button { display: block; border: 0; background: none; font: inherit; padding: 4px 0; cursor: pointer; }
button.off { opacity: 0.35; }
button span { display: inline-block; width: 12px; height: 12px; border-radius: 6px; margin-right: 8px; }
canvas { flex: 1; min-width: 0; cursor: grab; touch-action: none; }
p { color: #666; font-size: 13px; }
</style></head><body>
<aside><select id="choice" aria-label="cloud"></select><div id="legend"></div>
<p>Drag to turn, wheel to zoom, click a part to hide it.</p></aside>
<canvas id="view"></canvas>
<script>
const data = __DATA__;
const view = document.getElementById("view"), pen = view.getContext("2d");
const choice = document.getElementById("choice"), legend = document.getElementById("legend");
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const clouds = data.clouds.map(c => ({
  ...c, points: new Float32Array(bytes(c.points).buffer), parts: bytes(c.parts) }));
let current = clouds[0], hidden = new Set(), yaw = 0.7, pitch = 0.35, zoom = 1;
clouds.forEach((c, i) => choice.add(new Option(c.title, i)));
function list() {
  legend.replaceChildren(...current.names.flatMap((name, i) => {
    if (!current.parts.includes(i)) return [];
    const button = document.createElement("button"), dot = document.createElement("span");
    dot.style.background = data.colours[i % data.colours.length];
    button.append(dot, name);
    button.className = hidden.has(i) ? "off" : "";
    button.onclick = () => { hidden.has(i) ? hidden.delete(i) : hidden.add(i); list(); draw(); };
    return [button];
  }));
}
function draw() {
  const ratio = devicePixelRatio || 1, width = view.clientWidth, height = view.clientHeight;
  view.width = width * ratio; view.height = height * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const size = Math.min(width, height) * 0.38 * zoom, n = current.parts.length;
  const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
  const seen = [];
  for (let i = 0; i < n; i++) {
    if (hidden.has(current.parts[i])) continue;
    const x = current.points[3 * i], y = current.points[3 * i + 1], z = current.points[3 * i + 2];
    const a = cy * x + sy * z, b = cy * z - sy * x;
    seen.push([cp * b + sp * y, a, cp * y - sp * b, current.parts[i]]);
  }
  seen.sort((p, q) => p[0] - q[0]);
  const dot = Math.max(1.2, 2.4 * Math.sqrt(zoom) * Math.min(1, Math.sqrt(4000 / n)));
  for (const [depth, a, b, part] of seen) {
    pen.globalAlpha = 0.55 + 0.4 * Math.min(1, Math.max(0, (depth + 1) / 2));
    pen.fillStyle = data.colours[part % data.colours.length];
    pen.beginPath();
    pen.arc(width / 2 + size * a, height / 2 - size * b, dot * (1 + 0.25 * depth), 0, 7);
    pen.fill();
  }
}
choice.onchange = () => { current = clouds[choice.value]; hidden = new Set(); list(); draw(); };
view.onpointerdown = e => view.setPointerCapture(e.pointerId);
view.onpointermove = e => {
  if (!e.buttons) return;
  yaw -= e.movementX * 0.01;
  pitch = Math.max(-1.57, Math.min(1.57, pitch + e.movementY * 0.01));
  draw();
};
view.onwheel = e => {
  e.preventDefault();
  zoom = Math.max(0.3, Math.min(12, zoom * Math.exp(-e.deltaY * 0.001)));
  draw();
};
addEventListener("resize", draw);
list(); draw();
</script></body></html>
"""

"""Draw every registered scan into docs/scans/ and write its section of docs/scans.md, from the docstrings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from PIL import Image

from mamba_zoo.scans import SCANS, ScanEntry, build_scan, list_scans

PAGE = Path(__file__).parent / "scans.md"
PICTURES = Path(__file__).parent / "scans"
GRIDS = {2: (14, 14), 3: (4, 8, 8)}  # of images and of videos
BEGIN, END = "<!-- begin: written by docs/make_scans.py -->", "<!-- end -->"
COLUMNS = {
    "jump_mean": "mean jump",
    "jump_max": "longest jump",
    "adjacent": "moves to a neighbour",
    "near_any": "neighbours within 8 steps",
    "gap_best_mean": "steps between neighbours",
}


def main() -> None:
    """Write the pictures and the page."""
    PICTURES.mkdir(exist_ok=True)
    for name in list_scans():
        draw(name, PICTURES / f"{name}.png")
    PAGE.write_text(page_with(generated(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def draw(name: str, path: Path) -> None:
    """A picture of limited colours, which keeps the repository small."""
    build_scan(name, *grid_of(name)).plot(path, panel=1.9, title="", dpi=90)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(160, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def grid_of(name: str) -> tuple[int, ...]:
    """The grid that a scan is shown on: of an image wherever it takes one."""
    return GRIDS[len(SCANS[name].axes or GRIDS[2])]


def generated() -> str:
    """The table of all scans, then one section each."""
    head = f"| scan | grid | directions | {' | '.join(COLUMNS.values())} |"
    rows = [head, re.sub(r"[^|]+", "---", head), *(table_row(name) for name in list_scans())]
    return "\n".join(rows) + "\n\n" + "\n".join(section(name, SCANS[name]) for name in list_scans())


def table_row(name: str) -> str:
    """Directions and statistics of one scan."""
    scan = build_scan(name, *grid_of(name))
    found = scan.statistics(window=8)
    cells = [f"{found[key]:.2f}" if scan_has(found, key) else "none" for key in COLUMNS]
    grid = " x ".join(map(str, scan.size))
    return f"| [{name}](#{name}) | {grid} | {scan.k} | {' | '.join(cells)} |"


def scan_has(found: dict[str, float], key: str) -> bool:
    """Whether a statistic means anything: a scan that separates all neighbours has no steps between them."""
    return key != "gap_best_mean" or found["lost"] < 1


def section(name: str, entry: ScanEntry) -> str:
    """Name, options, picture and docstring of one scan."""
    parameters = inspect.signature(entry.function).parameters.values()
    options = ", ".join(f"{p.name}={p.default!r}" for p in parameters if p.default is not p.empty)
    text = inspect.cleandoc(entry.function.__doc__ or "").split("\n\nRaises:")[0].replace("``", "`")
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    call = f"`{name}({options})`" if options else f"`{name}`"
    return f"### {name}\n\n{call}, for {', '.join(entry.modality)}\n\n![{name}](scans/{name}.png)\n\n{text}\n"


def page_with(text: str, page: str) -> str:
    """The page with its generated part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()

"""The page of scans is what its generator writes."""

import importlib.util
from pathlib import Path

from mamba_zoo.scans import list_scans

DOCS = Path(__file__).parents[2] / "docs"


def test_page_of_scans_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_scans", DOCS / "make_scans.py")
    assert spec is not None
    assert spec.loader is not None
    make_scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_scans)
    page = (DOCS / "scans.md").read_text(encoding="utf-8")
    assert make_scans.page_with(make_scans.generated(), page) == page, "run `make docs`"
    named = {"": list_scans(), "graph_": list_scans(modality="graph"), "points_": list_scans(modality="points")}
    pictures = {f"{prefix}{name}.png" for prefix, names in named.items() for name in names}
    assert {path.name for path in (DOCS / "scans").glob("*.png")} == pictures
    for name in pictures:
        assert (DOCS / "scans" / name).stat().st_size < 120_000

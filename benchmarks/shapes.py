"""The shapes that models really use, and what today's implementations take on them (`anchors.json`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """One call of the selective scan: b samples, l tokens, k directions of d channels with n states."""

    name: str
    b: int
    l: int
    k: int
    d: int
    n: int
    z: bool

    @property
    def exps(self) -> int:
        """Exponentials of the decay, the arithmetic that no implementation avoids."""
        return self.b * self.l * self.k * self.d * self.n

    def bytes(self, itemsize: int) -> int:
        """Least traffic of a forward pass: each input read once, one output row a direction written once."""
        tokens = self.b * self.l
        per_token = self.d * (2 if self.z else 1) + self.k * (2 * self.d + 2 * self.n)
        return tokens * per_token * itemsize


@cache
def anchors() -> dict:
    """Published implementations, timed; the file says on what."""
    return json.loads((Path(__file__).parent / "anchors.json").read_text())


def scan_shapes() -> list[Shape]:
    """The anchors' selective-scan shapes."""
    shapes = []
    for key, row in anchors()["h100"]["selective_scan"]["rows"].items():
        if key.endswith("/bf16"):
            s = row["shape"]
            shapes.append(Shape(key[:-5], s["B"], s["L"], s["G"], s["D"] // s["G"], s["N"], s["z"]))
    return shapes


def scan_anchor(shape: Shape, dtype: str) -> tuple[float, float]:
    """Best published forward and forward + backward time in ms on an H100, for `dtype` "bf16" or "fp32"."""
    row = anchors()["h100"]["selective_scan"]["rows"][f"{shape.name}/{dtype}"]
    fastest = [
        min(row[key] for key in (f"mamba_ssm_{what}", f"vmamba_{what}") if key in row)
        for what in ("fwd_ms", "fwdbwd_ms")
    ]
    return fastest[0], fastest[1]

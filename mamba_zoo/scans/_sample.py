"""Orders that follow from the data of each sample, such as a graph's edges or a cloud's points, and not from a grid.

They share the specs of grid scans: `"both_ways(rcm)"` for graphs is written as `"both_ways(raster)"` for images. On a
grid, such an order is that of the sample that its modality makes of the grid, such as the graph of neighbouring cells,
so that it can be drawn, described, compared, and used by an image model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Samples(tuple):
    """Samples packed into one list of tokens, in place of the grid size for which a spec is built.

    As a tuple it is `(l,)`, the number of tokens, so that grid scans of any number of dimensions fit it.

    Attributes:
        modality: Such as "graph"; only its orders can read `data`.
        data: What its orders take: all samples at once.
        lengths: Tokens of each sample, in the order in which they are packed.
    """

    modality: str
    data: Any
    lengths: tuple[int, ...]

    def __new__(cls, modality: str, data: Any, lengths: Sequence[int]) -> Samples:
        self = super().__new__(cls, (sum(lengths),))
        self.modality, self.data, self.lengths = modality, data, tuple(lengths)
        return self


GRID_SAMPLES: dict[str, Callable[[tuple[int, ...]], Any]] = {}  # modality -> what its orders take, for a grid

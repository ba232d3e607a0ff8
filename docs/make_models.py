"""Write docs/models.md, the table of all models, from their cards and from what is counted on the meta device."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import mamba_zoo
from mamba_zoo._counting import CONVENTIONS

PAGE = Path(__file__).parent / "models.md"
HEAD = """# Models
Written by `make docs` from the models' cards. Parameters and accuracies are those that the authors state. "weights" are
published by the authors: `pretrained=True` downloads them from the address on the card, `checkpoint_path=` takes a
file. `*_mini` and `*_midi` are small models of our own, without weights. `list_models(commercial=True)` leaves out
weights under non-commercial licences.

## How operations are counted
Counters disagree, because most do not see a fused scan and those that do have different formulas. "multiply-adds" is
what `mamba-zoo info NAME` counts for one input of the published size, from shapes alone: the multiply-adds of matrix
products and convolutions, and half of the scan's operations. These are `9 b m d n + b m d` per direction for b samples,
m steps, d channels and n states, and `b m d` more for a gate (`mamba_zoo.kernels.flops`); torch's `FlopCounterMode`
gives twice this number. "stated" is what the authors state; "same way" counts it again as they seem to have done, by
the way that the last column names:

{conventions}

VMamba, LocalVMamba and EfficientVMamba come out to the digit stated; MambaVision and VideoMamba within 0.5 % and half
of the last digit (`tests/test_counting.py`). LocalVim's 1.5 and 4.8 could not be reproduced: without the scan it is
1.29 and 4.61, with half of its operations 1.70 and 5.43, with all of them 2.17 and 6.37. The READMEs of Vim and
PlainMamba state nothing. Clouds of points are counted without the search for neighbours. What takes graphs, waveforms
of any length, or more than one input is not in this table.
"""
COLUMNS = ("model", "modality", "parameters", "ImageNet-1k top-1", "weights", "licence", "paper")
COUNTED = ("model", "input", "multiply-adds, G", "stated, G", "same way, G", "way")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    counted = [row for name in mamba_zoo.list_models() if (row := operations(name)) is not None]
    return f"{head()}\n{table(COUNTED, counted)}\n\n{cards()}"


def head() -> str:
    """How operations are counted."""
    return HEAD.format(conventions="\n".join(f"- *{name}*: {way.text}." for name, way in CONVENTIONS.items()))


def cards() -> str:
    """The last part of the page."""
    return f"## Cards\n{table(COLUMNS, map(facts, mamba_zoo.list_models()))}\n"


def facts(name: str) -> tuple[str, ...]:
    """What the card says."""
    card = mamba_zoo.model_card(name)
    return (
        f"`{name}`",
        card.modality,
        "" if card.params is None else f"{card.params:,}",
        "" if card.top1 is None else f"{card.top1:g} %",
        card.checkpoint or "",
        card.license,
        "" if card.paper is None else f"[{card.paper}](https://arxiv.org/abs/{card.paper})",
    )


@lru_cache(maxsize=512)
def operations(name: str) -> tuple[str, ...] | None:
    """What is counted; None for a model without a default input, or whose packages are not installed here."""
    try:
        card = mamba_zoo.model_card(name, count=True)
    except ImportError:
        return None
    if card.counted_gmacs is None or card.input_size is None:
        return None
    return (
        f"`{name}`",
        " x ".join(map(str, card.input_size)),
        f"{card.counted_gmacs:.{2 if card.counted_gmacs >= 0.1 else 5}f}",
        "" if card.gflops is None else f"{card.gflops:.1f}",
        "" if card.counted_as_published is None else f"{card.counted_as_published:.2f}",
        (card.convention or "not known") if card.gflops is not None else "",
    )


def table(columns, rows) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    main()

"""Write docs/models.md, the table of all models, from their cards."""

from __future__ import annotations

from pathlib import Path

import mamba_zoo

PAGE = Path(__file__).parent / "models.md"
HEAD = """# Models
Written by `make docs` from the models' cards. Parameters, multiply-adds and accuracies are those that the authors
state; `mamba-zoo info NAME --count` counts them here. "weights" are published by the authors: `pretrained=True`
downloads them from the address on the card, `checkpoint_path=` takes a file. `*_mini` and `*_midi` are small models of
our own, without weights. `list_models(commercial=True)` leaves out weights under non-commercial licences.
"""
COLUMNS = ("model", "modality", "parameters", "multiply-adds", "ImageNet-1k top-1", "weights", "licence", "paper")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in mamba_zoo.list_models():
        card = mamba_zoo.model_card(name)
        cells = (
            f"`{name}`",
            card.modality,
            "" if card.params is None else f"{card.params:,}",
            "" if card.gflops is None else f"{card.gflops:g} G",
            "" if card.top1 is None else f"{card.top1:g} %",
            card.checkpoint or "",
            card.license,
            "" if card.paper is None else f"[{card.paper}](https://arxiv.org/abs/{card.paper})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

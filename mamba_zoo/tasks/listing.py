"""`mamba-zoo list` and `mamba-zoo info`: what the zoo holds, without building a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

import mamba_zoo


def list_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo list`."""
    parser = argparse.ArgumentParser("mamba-zoo list", description="The models of the zoo.")
    parser.add_argument("pattern", nargs="?", default="", help="such as 'vmamba*'; a plain word matches anywhere")
    parser.add_argument("--modality", help="image, video, audio, series, graph, points or sequence")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    parser.add_argument("--commercial", action="store_true", help="only models whose licence allows commercial use")
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    args = parser.parse_args(argv)
    names = mamba_zoo.list_models(args.pattern, args.modality, args.pretrained, True if args.commercial else None)
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}; mamba-zoo list shows all")
    # A pipe has no width: nothing is cut there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.names:
        console.print("\n".join(names), highlight=False)
        return 0
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for header in ("model", "modality", "params", "GFLOPs", "top-1", "weights", "licence", "arXiv"):
        numeric = header in ("params", "GFLOPs", "top-1")
        table.add_column(header, justify="right" if numeric else "left", no_wrap=True)
    for name in names:
        card = mamba_zoo.model_card(name)
        table.add_row(
            name,
            card.modality,
            "" if card.params is None else f"{card.params / 1e6:.1f} M",
            "" if card.gflops is None else f"{card.gflops:g}",
            "" if card.top1 is None else f"{card.top1:g}",
            "yes" if card.published else "",
            card.license,
            card.paper or "",
        )
    console.print(table)
    return 0


def info_main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo info`."""
    parser = argparse.ArgumentParser("mamba-zoo info", description="What is known of one model.")
    parser.add_argument("name", help="as in mamba-zoo list")
    parser.add_argument(
        "--count",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="build it without memory, and count parameters and operations",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    card = mamba_zoo.model_card(args.name, count=args.count)
    text = json.dumps(asdict(card), indent=1) if args.json else str(card)
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
    return 0

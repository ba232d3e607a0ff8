"""`mamba-zoo look`: pictures of what a model sees, one scan beside another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from .._factory import create_model
from .pictures import plot_receptive_fields, plot_scan_maps
from .receptive import contribution_area, receptive_field
from .record import RecordedScan, record_scans


def main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo look`."""
    from rich.console import Console
    from rich.table import Table

    args = _parser().parse_args(argv)
    if len(args.checkpoint) not in (0, 1, len(args.scan)):
        raise ValueError(f"--checkpoint needs one file, or one for each of the {len(args.scan)} scans")
    if args.pretrained and args.checkpoint:
        raise ValueError("give either --checkpoint or --pretrained; both name the weights")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trained = bool(args.checkpoint or args.pretrained)
    fields: dict[str, Tensor] = {}
    written = []
    for i, scan in enumerate(args.scan):
        model = build(args.model, scan, args.checkpoint[i % len(args.checkpoint)] if args.checkpoint else None,
                      args.pretrained, args.num_classes)  # fmt: skip
        shown, inputs = read_images(args.image, model, args.size, args.samples)
        name = scan or args.model
        fields[name] = receptive_field(model, inputs, args.stage)
        written += _maps(model, inputs[:1], shown, name, args, trained, out)
    note = args.model + ("" if trained else ", untrained: random weights")
    count = len(args.image) or args.samples
    what = f"{count} image{'' if count == 1 else 's'}{'' if args.image else ' of noise'}"
    plot_receptive_fields(fields, out / "receptive_field.png", title=f"Effective receptive field of {note}; {what}")
    table = Table("scan", "50 %", "90 %", "99 %", title="part of the image that holds this share of the gradient")
    for name, field in fields.items():
        table.add_row(name, *(f"{100 * contribution_area(field, share):.1f} %" for share in (0.5, 0.9, 0.99)))
    console = Console()
    console.print(table)
    for path in [out / "receptive_field.png", *written]:
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def build(name: str, scan: str | None, checkpoint: str | None, pretrained: bool, num_classes: int | None) -> nn.Module:
    """The model in evaluation mode; arguments that are None are the model's own."""
    options: dict[str, Any] = {"scan": scan, "num_classes": num_classes}
    torch.manual_seed(0)
    kept = {key: value for key, value in options.items() if value is not None}
    return create_model(name, checkpoint, pretrained, **kept).eval()


def read_images(
    files: Sequence[str], model: nn.Module, size: Sequence[int] | None, samples: int
) -> tuple[Tensor | None, Tensor]:
    """Images as a model wants them.

    Args:
        files: Pictures; without any, `samples` images of noise are made.
        model: Whose size, mean and deviation are used.
        size: Height and width, instead of the model's. Pictures are stretched to it.
        samples: Images of noise.

    Returns:
        The first picture between 0 and 1, `(c, h, w)`, or None; and the inputs `(b, c, h, w)`.

    Raises:
        ValueError: a file that is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    cfg = resolve_data_config({}, model=model)
    channels = getattr(model, "in_chans", cfg["input_size"][0])
    height, width = size or cfg["input_size"][-2:]
    if not files:
        return None, torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(0))
    shown = []
    for file in files:
        try:
            picture = Image.open(file).convert("L" if channels == 1 else "RGB").resize((width, height))
        except UnidentifiedImageError as error:
            raise ValueError(f"{file} is no picture that Pillow can read") from error
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, -1)
        shown.append(values.permute(2, 0, 1).float() / 255)
    mean, std = (torch.tensor(cfg[key][:channels]).view(-1, 1, 1) for key in ("mean", "std"))
    return shown[0], (torch.stack(shown) - mean) / std


def query_of(scan: RecordedScan, query: str) -> tuple[int, tuple[int, int] | None]:
    """The token that `query` means, and its place on the grid.

    Args:
        scan: With a grid.
        query: "middle", "class", or row and column as fractions of the grid, such as "0.5,0.25".

    Raises:
        ValueError: anything else, or "class" where there is no class token.
    """
    if query == "class":
        if scan.extra is None:
            raise ValueError("--query class needs a class token, which this model does not have")
        return scan.extra, None
    height, width = scan.grid or (1, 1)
    try:
        row, column = (0.5, 0.5) if query == "middle" else map(float, query.split(","))
    except ValueError:
        row = column = -1.0
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise ValueError(f"--query {query!r} must be middle, class, or ROW,COLUMN between 0 and 1, such as 0.5,0.25")
    place = (min(int(row * height), height - 1), min(int(column * width), width - 1))
    return scan.token_at(*place), place


def _maps(
    model: nn.Module, x: Tensor, shown: Tensor | None, name: str, args: argparse.Namespace, trained: bool, out: Path
) -> list[Path]:
    with torch.no_grad(), record_scans(model) as scans:
        model(x)
    scans = [scan for scan in scans if scan.grid is not None]
    if not scans:
        return []
    last = len(scans) - 1
    numbers = args.layer or sorted({0, last // 2, last})
    if wrong := [number for number in numbers if not 0 <= number <= last]:
        raise ValueError(f"--layer {wrong[0]}: the scans of this model are numbered 0 to {last}")
    attention, states, places = {}, {}, {}
    for number in numbers:
        scan = scans[number]
        token, place = query_of(scan, args.query)
        label = f"{number}: {scan.name}\n{scan.grid[0]} x {scan.grid[1]}" if scan.grid else scan.name
        attention[label], states[label] = scan.as_maps(scan.weights(token)), scan.as_maps(scan.states())
        places[label] = place
    note = f"{args.model}, {name}" + ("" if trained else ", untrained: random weights")
    stem = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    paths = [out / f"attention_{stem}.png", out / f"states_{stem}.png"]
    plot_scan_maps(attention, shown, places, paths[0], title=f"What each token adds to the marked one: {note}")
    plot_scan_maps(states, shown, None, paths[1], title=f"Norm of the state after each token: {note}")
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mamba-zoo look",
        description="Effective receptive fields, and what each direction of the scans brings to a token, as pictures.",
    )
    parser.add_argument("--model", default="vmamba_mini", help="as in mamba-zoo list; receptive fields of timm's too")
    parser.add_argument("--scan", nargs="+", default=[None], help="scans to compare; by default the model's own")
    parser.add_argument("--checkpoint", nargs="+", default=[], help="weights: one file or run, or one for each scan")
    parser.add_argument("--pretrained", action="store_true", help="weights from the authors' address")
    parser.add_argument("--num-classes", type=int, help="of the weights")
    parser.add_argument("--image", nargs="+", default=[], help="pictures; by default noise")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="by default the model's")
    parser.add_argument("--samples", type=int, default=4, help="images of noise")
    parser.add_argument("--stage", type=int, default=-1, help="feature map whose middle the receptive field is of")
    parser.add_argument("--layer", nargs="+", type=int, help="scans to draw, by number; by default first, middle, last")
    parser.add_argument("--query", default="middle", help="token to look from: middle, class, or 0.5,0.25")
    parser.add_argument("--out", default="look", help="folder for the pictures")
    return parser

"""`mamba-zoo export`: an image or video model as a torch.export program, held against the model it came from."""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from .building import build_model, image_input, input_shape
from .checkpoints import read_checkpoint, write_atomically

_TOLERANCE = 1e-4  # relative to the largest output, float32


def export_model(net: nn.Module, example: torch.Tensor, out: Path) -> float:
    """Write `net` to `out`, read it back, and compare it on images it was not exported with.

    Args:
        net: Put into evaluation mode.
        example: Images `(b, channels, height, width)` or clips; the batch stays free, the other sizes are fixed.
        out: Of the `.pt2` file.

    Returns:
        The largest difference between program and model, relative to the largest output.

    Raises:
        ValueError: the program differs by more than 1e-4, and nothing is written.
    """
    net.eval()
    batch = torch.export.Dim("batch", min=1, max=65535)
    # Exported with two images: a batch of one would be taken as a constant.
    images = example.new_zeros(2, *example.shape[1:]).copy_(example[:1])
    with torch.no_grad():
        program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with warnings.catch_warnings():
        # torch.export.load reads its own read-only buffers.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        again = torch.export.load(file).module()
    test = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    with torch.no_grad():
        want, got = net(test), again(test)
    difference = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
    if not difference <= _TOLERANCE:
        raise ValueError(f"the exported program differs from the model by {difference:.2g}; nothing is written")
    write_atomically(out, lambda target: target.write(file.getvalue()))
    return difference


def main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo export`."""
    parser = argparse.ArgumentParser(
        "mamba-zoo export",
        description="Write an image or video model as a torch.export program (.pt2), checked against the model itself. "
        "It calls operators of mamba_zoo: `import mamba_zoo` before torch.export.load. ONNX is not supported yet.",
    )
    parser.add_argument("name", nargs="?", help="as in mamba-zoo list; not needed with the checkpoint of a run")
    parser.add_argument("--checkpoint", type=Path, help="of mamba-zoo fit (or its run folder), or a published file")
    parser.add_argument("--scan", help="scan order; default: the published one, or that of the run")
    parser.add_argument("--image-size", type=int, help="height and width in pixels; default: the model's")
    parser.add_argument("--out", type=Path, default=Path("model.pt2"), help="file or folder (default: model.pt2)")
    args = parser.parse_args(argv)
    out = args.out / "model.pt2" if args.out.is_dir() else args.out
    net, channels, size = _model(args)
    shape = input_shape(net, channels, size)
    difference = export_model(net, torch.zeros(1, *shape), out)
    Console().print(
        f"{out}: inputs (batch, {', '.join(map(str, shape))}) -> class scores; "
        f"largest relative difference from the model {difference:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _model(args: argparse.Namespace) -> tuple[nn.Module, int, int]:
    """The model, its channels and its image size."""
    if args.checkpoint is not None and _is_run(args.checkpoint):
        from .registry import load_task

        if args.scan is not None:
            raise ValueError("scan= is part of a trained run; leave --scan out")
        classifier = load_task(args.checkpoint)
        if args.name not in (None, classifier.name):
            raise ValueError(f"{args.checkpoint} holds {classifier.name}, not {args.name}")
        values = classifier.hparams
        if "in_chans" not in values:
            raise ValueError(
                f"{args.checkpoint} holds {classifier.name}, which takes no images; export is for images and clips"
            )
        size = args.image_size or values.get("img_size") or image_input(classifier.name, None)[1]
        return classifier.inference_net, values["in_chans"], size
    if args.name is None:
        raise ValueError("give the name of a model, or --checkpoint of a run")
    channels, size = image_input(args.name, args.image_size)
    path = None if args.checkpoint is None else str(args.checkpoint)
    net = build_model(args.name, args.scan, None, channels, args.image_size, False, path, None, None)
    return net, channels, size


def _is_run(path: Path) -> bool:
    if path.is_dir():
        return True
    if path.suffix != ".ckpt":
        return False
    return "hyper_parameters" in read_checkpoint(path)

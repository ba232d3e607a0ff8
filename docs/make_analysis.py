"""Write the pictures of docs/analysis.md: untrained models at 224 pixels, and small ones trained on digits first.

Takes about five minutes on two CPU cores; prints the accuracies that the page states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mamba_zoo  # noqa: F401 - registers its models with timm
from mamba_zoo.analysis import contribution_area, plot_receptive_fields, plot_scan_maps, receptive_field, record_scans

FOLDER = Path(__file__).parent / "analysis"
UNTRAINED = ["vmamba_tiny", "vim_tiny", "plainmamba_l1", "mambavision_t", "convnext_tiny", "deit_tiny_patch16_224"]
SCANS = ["cross", "hilbert", "raster", "none"]
EPOCHS, BATCH, TRAINED_ON = 6, 64, 1400


def main() -> None:
    """Draw everything."""
    console = Console()
    FOLDER.mkdir(exist_ok=True)
    untrained(console)
    on_digits(console)


def untrained(console: Console) -> None:
    """Receptive fields at 224 pixels that initial weights give."""
    torch.manual_seed(0)
    noise, fields = torch.randn(2, 3, 224, 224), {}
    for name in UNTRAINED:
        torch.manual_seed(0)
        field = receptive_field(timm.create_model(name), noise)
        console.print(name, f"{contribution_area(field):.3f}")
        fields[name] = F.avg_pool2d(field[None], 4)[0]  # a smaller picture
    title = "Untrained: receptive field of the middle of the last map; 2 images of noise, means of 4 x 4 pixels"
    plot_receptive_fields(fields, FOLDER / "untrained.png", columns=3, title=title)


def on_digits(console: Console) -> None:
    """Receptive fields before and after training, and maps per direction after it."""
    digits: Any = load_digits()
    images = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=16, mode="bilinear")
    labels = torch.from_numpy(digits.target)
    held_out = images[TRAINED_ON:]
    fields: dict[str, Tensor] = {}
    for scan in SCANS:
        torch.manual_seed(0)
        model: Any = timm.create_model("vmamba_mini", in_chans=1, num_classes=10, scan=scan)
        fields[f"{scan}, untrained"] = receptive_field(model, held_out[:64], stage=0)
        train(model, images[:TRAINED_ON], labels[:TRAINED_ON])
        with torch.inference_mode():
            right = (model.eval()(held_out).argmax(1) == labels[TRAINED_ON:]).float().mean()
        console.print(scan, f"{100 * float(right):.1f} % of held-out digits")
        fields[f"{scan}, trained"] = receptive_field(model, held_out[:64], stage=0)
        if scan in ("cross", "hilbert"):
            maps(model, held_out[:1], scan)
    ordered = {f"{scan}, {when}": fields[f"{scan}, {when}"] for when in ("untrained", "trained") for scan in SCANS}
    title = "vmamba_mini on digits: receptive field of the middle of the first stage's map; 64 held-out images"
    plot_receptive_fields(ordered, FOLDER / "digits_fields.png", title=title)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Some epochs of AdamW with a one-cycle schedule."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def maps(model: nn.Module, image: Tensor, scan: str) -> None:
    """What each token adds to the middle one, and the norms of the states, in the first layer of the three stages."""
    with torch.no_grad(), record_scans(model.eval()) as scans:
        model(image)
    attention, states, places = {}, {}, {}
    for one in scans[::2]:
        height, width = one.grid or (0, 0)
        label = f"{one.name.removesuffix('.mixer.ssm')}\n{height} x {width}"
        places[label] = (height // 2, width // 2)
        attention[label] = one.as_maps(one.weights(one.token_at(*places[label])))
        states[label] = one.as_maps(one.states())
    shown = (image[0] + 1) / 2
    note = f"vmamba_mini trained on digits, {scan}"
    title = f"What each token adds to the marked one: {note}"
    plot_scan_maps(attention, shown, places, FOLDER / f"digits_attention_{scan}.png", title=title)
    if scan == "cross":
        path = FOLDER / f"digits_states_{scan}.png"
        plot_scan_maps(states, shown, None, path, title=f"Norm of the state after each token: {note}")


if __name__ == "__main__":
    main()

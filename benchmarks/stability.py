"""Train models under mixed precision and look for NaN: `python -m benchmarks.stability [NAME ...] [--jobs N]`.

One image model of every architecture, the smallest, unless names are given. A thousand steps of AdamW with warm-up and
clipping on images that repeat, so that the loss must fall: bfloat16 autocast, and float16 with a gradient scaler, which
finds its scale by overflowing now and then. On a GPU forward and backward are a CUDA graph. Every row is written as
soon as it is measured; rows that the file has already are not measured again. `--jobs` trains several models at once.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import mamba_zoo

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OUT = Path(__file__).parent / "results" / "stability.csv"
CLASSES, IMAGES, WARMUP = 10, 256, 100
_OVERFLOWS = 0.02  # of the steps: what the search for a scale may cost in float16


def train(name: str, dtype: str, steps: int, batch: int, device: str, **arguments: Any) -> dict[str, Any]:
    """Train a model and say what became of it.

    Args:
        name: A registered image model.
        dtype: "bf16" or "fp16".
        steps: Of the optimizer.
        batch: Images a step.
        device: "cuda", or "cpu" for a trial.
        arguments: Of the model.
    """
    torch.manual_seed(0)
    model: Any = mamba_zoo.create_model(name, num_classes=CLASSES, **arguments).to(device).train()
    size = model.pretrained_cfg["input_size"][-2:]
    images = torch.randn(IMAGES, *model.input_shape(*size), device=device)
    labels = torch.arange(IMAGES, device=device) % CLASSES
    forward = mamba_zoo.capture(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    scaler = torch.amp.grad_scaler.GradScaler(device, enabled=dtype == "fp16" and device == "cuda")
    losses = torch.zeros(steps, device=device)
    norms = torch.zeros(steps, device=device)
    start = time.perf_counter()
    for i in range(steps):
        pick = torch.randint(IMAGES, (batch,), device=device)
        with torch.autocast(device, dtype=DTYPES[dtype]):
            loss = F.cross_entropy(forward(images[pick]).float(), labels[pick])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms[i] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not scaler.is_enabled():
            # Without a scaler nothing else would skip the step, and one bad step would hide whether others follow.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0, 0, 0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses[i] = loss.detach()
        if (i + 1) % max(1, steps // 4) == 0 and i + 1 < steps:
            Console(width=150).print(f"{name} {dtype}: step {i + 1}, loss {float(losses[i]):.3f}")
    bad_losses, bad_norms = int((~losses.isfinite()).sum()), ~norms.isfinite()
    overflows = int(bad_norms.sum())
    intact = all(bool(p.isfinite().all()) for p in model.parameters())
    few = overflows <= (_OVERFLOWS * steps if scaler.is_enabled() else 0)
    tenth = max(1, steps // 10)
    return {
        "model": name, "dtype": dtype, "steps": steps, "batch": batch, "size": "x".join(map(str, size)),
        "ok": intact and few and not bad_losses, "nonfinite_losses": bad_losses, "skipped_steps": overflows,
        "skipped_in_last_half": int(bad_norms[steps // 2 :].sum()), "final_scale": scaler.get_scale(),
        "first_loss": float(losses[:tenth].mean()), "last_loss": float(losses[-tenth:].mean()),
        "largest_norm": float(norms[norms.isfinite()].max()) if not bad_norms.all() else math.nan,
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names; the smallest image model of each architecture by default")
    parser.add_argument("--all", action="store_true", help="all image models, the smallest first")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--mixer", default="mamba", help="mamba, mamba2 or mamba3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--largest", type=float, default=120e6, help="leave models with more parameters out")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.models or (mamba_zoo.list_models(modality="image") if options.all else smallest())
    sizes = {name: mamba_zoo.model_card(name).params or 0 for name in names}
    names = [name for name in sorted(names, key=sizes.__getitem__) if sizes[name] <= options.largest]
    console, end = Console(width=150), time.monotonic() + 60 * options.minutes
    known = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    done = {(row["model"], row["dtype"], row["mixer"], row["steps"], row["device"]) for row in known}
    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        (name, dtype)
        for name in names
        for dtype in options.dtype
        if (name, dtype, options.mixer, str(options.steps), place) not in done
    ]
    settings = (options.steps, options.batch, device, options.mixer, end)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train_until, *run, *settings) for run in wanted]):
            row = future.result()
            if row is None:
                continue
            new = not options.out.exists()
            with options.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
            console.print({key: row[key] for key in ("model", "dtype", "ok", "skipped_steps", "last_loss", "seconds")})


def train_until(
    name: str, dtype: str, steps: int, batch: int, device: str, mixer: str, end: float
) -> dict[str, Any] | None:
    """`train`, or None if the monotonic clock is past `end`."""
    if time.monotonic() > end:
        return None
    return {**train(name, dtype, steps, batch, device, mixer=mixer), "mixer": mixer}


def smallest() -> list[str]:
    """The smallest published image model of every architecture."""
    found: dict[str, str] = {}
    for name in mamba_zoo.list_models(modality="image"):
        card = mamba_zoo.model_card(name)
        if not card.params or card.source == "mamba_zoo":
            continue
        other = found.get(card.source)
        if other is None or card.params < (mamba_zoo.model_card(other).params or 0):
            found[card.source] = name
    return list(found.values())


if __name__ == "__main__":
    main()

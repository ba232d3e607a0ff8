"""`mamba-zoo bench`: how fast one image or video model runs and trains on this machine, and with how much memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mamba_zoo

from .building import build_model, image_input, input_shape

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WARMUP, _LEAST, _MOST = 2, 5, 50


@dataclass(frozen=True)
class Timing:
    """Time and memory of one kind of step.

    Attributes:
        milliseconds: Median of one step.
        spread: Interquartile range as a part of the median.
        images_per_second: From the median.
        peak_memory_bytes: Most GPU memory held during the steps; None on a CPU.
        steps: Timed steps.
    """

    milliseconds: float
    spread: float
    images_per_second: float
    peak_memory_bytes: int | None
    steps: int


def time_steps(step: Callable[[], None], batch: int, device: torch.device, seconds: float) -> Timing:
    """Time `step` after a warm-up, at least 5 times and for about `seconds`.

    Args:
        step: One forward pass, or one training step.
        batch: Images of a step.
        device: Where it runs; waited for before and after each step.
        seconds: Time to spend.
    """
    cuda = device.type == "cuda"
    for _ in range(_WARMUP):
        step()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < seconds and len(times) < _MOST):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    low, middle, high = statistics.quantiles(times, n=4)
    memory = torch.cuda.max_memory_allocated(device) if cuda else None
    return Timing(1e3 * middle, (high - low) / middle, batch / middle, memory, len(times))


def bench_model(
    model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, train: bool = True, seconds: float = 3.0
) -> dict[str, Timing]:
    """Time a classifier on its device.

    Args:
        model: In float32; lower precisions run under autocast, as training does.
        x: Images `(b, channels, height, width)`, or clips `(b, channels, frames, height, width)`.
        dtype: float32, bfloat16 or float16.
        train: Also time training steps: forward, backward and AdamW.
        seconds: Time to spend on each row.

    Returns:
        Timings by "inference" and "training".
    """
    device = x.device

    def cast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def infer() -> None:
        with torch.inference_mode(), cast():
            model(x)

    model.eval()
    found = {"inference": time_steps(infer, len(x), device, seconds)}
    if not train:
        return found
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    target = torch.zeros(len(x), dtype=torch.long, device=device)

    def learn() -> None:
        with cast():
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return found | {"training": time_steps(learn, len(x), device, seconds)}


def main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo bench`."""
    parser = argparse.ArgumentParser("mamba-zoo bench", description="Speed and memory of an image or video model here.")
    parser.add_argument("name", help="as in mamba-zoo list, or a model of timm to compare with")
    parser.add_argument("--scan", help="scan order; default: the published one")
    parser.add_argument("--batch-size", type=int, help="images a step; default: 64 on a GPU, 1 on a CPU")
    parser.add_argument("--image-size", type=int, help="height and width in pixels; default: the model's")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="lower ones under autocast")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the first GPU if there is one")
    parser.add_argument("--captured", action="store_true", help="as a CUDA graph (mamba_zoo.capture); needs a GPU")
    parser.add_argument("--no-train", action="store_true", help="inference only")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each row (default: 3)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    if (args.batch_size is not None and args.batch_size < 1) or args.seconds <= 0:
        raise ValueError("batch-size must be at least 1 and seconds above 0")
    device = _device(args.device)
    if args.captured and device.type != "cuda":
        raise ValueError(f"captured needs a CUDA device, not {device.type}; leave --captured out")
    batch = args.batch_size or (64 if device.type == "cuda" else 1)
    channels, size = image_input(args.name, args.image_size)
    model = build_model(args.name, args.scan, 1000, channels, args.image_size, False, None, None, None).to(device)
    shape = input_shape(model, channels, size)
    found = bench_model(
        mamba_zoo.capture(model) if args.captured else model,
        torch.rand(batch, *shape, device=device),
        _DTYPES[args.dtype],
        not args.no_train,
        args.seconds,
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    facts = {
        "model": args.name,
        "scan": args.scan,
        "batch": batch,
        "image_size": size,
        "input_shape": shape,
        "dtype": args.dtype,
        "captured": args.captured,
        "device": where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mamba_zoo": mamba_zoo.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    console = Console()
    if args.json:
        console.print_json(json.dumps(facts | {key: asdict(timing) for key, timing in found.items()}))
        return 0
    table = Table("", "ms a step", "spread", "images/s", "GPU memory", "steps")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, t in found.items():
        memory = "" if t.peak_memory_bytes is None else f"{t.peak_memory_bytes / 2**30:.2f} GiB"
        table.add_row(
            key, f"{t.milliseconds:.2f}", f"{t.spread:.1%}", f"{t.images_per_second:,.1f}", memory, str(t.steps)
        )
    threads = "" if device.type == "cuda" else f", {facts['threads']} threads"
    size_text = "x".join(map(str, shape[1:]))
    console.print(
        f"{args.name}, {facts['parameters'] / 1e6:.1f} M parameters, {batch} x {size_text}, {args.dtype}\n"
        f"{where}{threads}, torch {torch.__version__}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    return 0


def _device(name: str | None) -> torch.device:
    """The device of that name, tried once; without a name the first GPU, or the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].strip().rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); give cpu or cuda:NUMBER, or leave --device out"
        ) from None
    return device

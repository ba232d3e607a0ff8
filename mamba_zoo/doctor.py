"""What runs on this machine, why the rest does not, and where a NaN comes from. Also `mamba-zoo doctor`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks.environment import Finding, describe, devices, packages
from .tasks.nonfinite import NonFinite, Place, find_nonfinite
from .tasks.selftest import Check, check_kernels, unchecked

__all__ = ["Check", "Finding", "NonFinite", "Place", "Report", "examine", "find_nonfinite", "main"]

OK, FAILED = 0, 1


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
        machine: Processor, accelerators, drivers.
        packages: What mamba_zoo can use, installed or not.
        checks: Every op on every device and dtype, held against float64.
        caches: Where compiled kernels are kept, and what is there.
        problems: What stops mamba_zoo from working, or makes it wrong; empty if it is fit.
        warnings: What makes it slower or smaller than it could be.
    """

    machine: tuple[Finding, ...]
    packages: tuple[Finding, ...]
    checks: tuple[Check, ...]
    caches: dict[str, str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether mamba_zoo works here and computes the right numbers."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The report in one sentence."""
        if not self.ok:
            return f"mamba_zoo does not work properly here: {'; '.join(self.problems)}."
        chosen = {}
        for check in self.checks:
            chosen.setdefault(check.device, []).append(check.backend)
        used = ", ".join(
            f"{' and '.join(dict.fromkeys(names))} kernels on {device}" for device, names in chosen.items()
        )
        return f"mamba_zoo works here: {used}, all equal to float64 within rounding."

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, "verdict": self.verdict, **dataclasses.asdict(self)}


def examine() -> Report:
    """Look at this machine and try every kernel that would run on it. Takes some seconds; raises nothing."""
    checks, broken = [], []
    try:
        checks = list(check_kernels())
    except Exception as error:
        broken.append(f"the kernels cannot be tried: {describe(error)}")
    machine, found = tuple(devices()), tuple(packages())
    problems = [
        f"{f.name} is needed but {f.state} ({f.detail})" for f in (*machine, *found) if f.needed and f.state != "ok"
    ]
    problems += broken
    problems += [f"{c.op} ({c.backend}, {c.device}, {c.dtype}): {c.problem}" for c in checks if not c.passed]
    warnings = [
        f"{f.name} is installed but broken, needed for {f.use}" for f in found if f.state == "broken" and not f.needed
    ]
    slow = {
        (c.device, c.op): "; ".join(f"{k}: {v}" for k, v in c.refused.items())
        for c in checks
        if c.backend == "reference"
    }
    warnings += [f"{op} runs its slow reference on {device} ({why})" for (device, op), why in slow.items()]
    warnings += [f"{name} was not tried" for name in unchecked()]
    if any(f.name == "GPU" for f in machine):  # with one that works, they have numbers
        driver = Path("/proc/driver/nvidia/version").exists()
        why = "an NVIDIA driver is loaded, but torch cannot use a GPU: check that torch is a CUDA build for this driver"
        warnings.append(why if driver else "no GPU that torch can use; models run on the processor")
    return Report(machine, found, tuple(checks), _caches(), tuple(problems), tuple(warnings))


def main(arguments: Sequence[str]) -> int:
    """`mamba-zoo doctor`; 0 if all is well, 1 if something is broken, or not finite."""
    import argparse

    from .tasks._model_check import PRECISIONS

    parser = argparse.ArgumentParser(
        prog="mamba-zoo doctor",
        description="Say what runs on this machine and why the rest does not, and try the kernels against float64. "
        "With --model or --checkpoint, run that model once instead and say where a NaN comes from.",
        epilog="Exit code: 0 if all is well, 1 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--model", help="look for NaN in this model")
    parser.add_argument("--checkpoint", help="with these weights: a published file, or a run of mamba-zoo fit")
    parser.add_argument("--input", help="an image, or a tensor in .pt or .npy (default: random noise)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float32", help="autocast (default: off)")
    parser.add_argument("--device", default="cpu", help="where to run the model (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="in training mode")
    args = parser.parse_args(list(arguments))
    if args.model is None and args.checkpoint is None:
        if args.input is not None:
            raise ValueError(f"--input {args.input} is for a model; give --model or --checkpoint as well")
        report = examine()
        _show(report, as_json=args.json)
        return OK if report.ok else FAILED
    from .tasks._model_check import check_model

    found = check_model(
        args.model, args.checkpoint, args.input, args.image_size, args.precision, args.device, args.train
    )
    _show_model(found, as_json=args.json)
    return FAILED if found else OK


def _show_model(found: NonFinite, as_json: bool) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps({"finite": not found, **dataclasses.asdict(found)}))
        return
    for place in found.places:
        console.print(str(place), style="bold red", markup=False)
    console.print("not finite" if found else "all values are finite: inputs, weights, outputs and gradients")


def _show(report: Report, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    if as_json:
        console.print_json(json.dumps(report.as_dict()))
        return
    marks = {"ok": ("ok", "green"), "absent": ("-", "dim"), "broken": ("broken", "bold red")}
    for title, findings in (("Machine", report.machine), ("Packages", report.packages)):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for f in findings:
            word, style = marks[f.state]
            use = f"for {f.use}" if f.use and f.state != "ok" else ""
            table.add_row(Text(word, style), f.name, Text(f"{f.detail}{'; ' if use else ''}{use}"))
        console.print(table)
    table = Table(title="Kernels", title_justify="left")
    for head in ("op", "device", "dtype", "backend", "error / allowed", "first call", "next", "result"):
        table.add_column(head)
    for c in report.checks:
        error = "-" if c.error is None else f"{c.error:.0e} / {c.allowed:.0e}"
        result = Text("right", "green") if c.passed else Text(c.problem, "bold red")
        table.add_row(
            c.op,
            c.device,
            c.dtype,
            c.backend,
            error,
            f"{c.first_seconds:.2f} s",
            f"{1e3 * c.next_seconds:.1f} ms",
            result,
        )
    console.print(table)
    console.print("First calls include compiling, or reading the cache; forward and backward of a small problem.")
    for line in _refused(report.checks):
        console.print(Text(line))
    for name, what in report.caches.items():
        console.print(Text(f"cache of {name}: {what}"), soft_wrap=True)
    for warning in report.warnings:
        console.print(Text(f"note: {warning}", "yellow"))
    console.print(Text(report.verdict, "bold green" if report.ok else "bold red"))


def _refused(checks: Sequence[Check]) -> list[str]:
    """One line for every backend and device: used, or why not."""
    lines: dict[str, None] = {}
    for c in checks:
        for backend, why in c.refused.items():
            lines[f"not used on {c.device}: {backend}, because {why}"] = None
    return list(lines)


def _caches() -> dict[str, str]:
    """Folders of compiled kernels, with the number and size of what is in them."""

    def nvrtc() -> tuple[Path, str]:
        from .kernels._cuda.nvrtc import cache_folder

        return cache_folder(), "*.cubin"

    def numba() -> tuple[Path, str]:
        import numba

        own = Path(__file__).parent / "kernels" / "_cpu" / "__pycache__"
        return Path(numba.config.CACHE_DIR or own), "**/*.nbc"  # type: ignore[attr-defined]

    def triton() -> tuple[Path, str]:
        from triton import knobs

        return Path(knobs.cache.dir), "*"

    return {name: _count(where) for name, where in (("CUDA", nvrtc), ("numba", numba), ("Triton", triton))}


def _count(where: Callable[[], tuple[Path, str]]) -> str:
    try:
        folder, pattern = where()
        if not folder.is_dir():
            return f"{folder}, empty: the first calls will compile"
        files = list(folder.glob(pattern))
        size = sum(f.stat().st_size for f in files if f.is_file())
        return f"{folder}, {len(files)} entries" + (f", {size / 2**20:.1f} MiB" if size else "")
    except Exception as error:
        return f"unknown ({describe(error)})"

"""The same model under several scan orders: equal budget, paired seeds, controls, and statistics that admit noise."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import operator
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._comparison import Comparison, Metric, analyse
from ._run_store import RunStore, make_run
from ._task_runs import Trainer, task_trainer
from .environment import machine
from .registry import DEFAULT, TASKS, TaskEntry, find_task

if TYPE_CHECKING:
    from ._task import Task

CONTROLS = ("random", "none")


def orders(
    model: str | None = None,
    data: Any = None,
    scans: Sequence[Any] | None = None,
    seeds: int | Sequence[int] = 3,
    epochs: int = 20,
    out: str | Path = "runs/compare",
    controls: Sequence[str] = CONTROLS,
    reference: str | None = None,
    match_directions: bool = False,
    metric: Metric | None = None,
    alpha: float = 0.05,
    data_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    train: Trainer | None = None,
    grid: tuple[int, ...] | None = None,
    keep_checkpoints: bool = False,
    report: bool = True,
    progress: bool = True,
    task: str = DEFAULT,
) -> Comparison:
    """Train `model` once for every order and seed, and say which differences are real.

    Runs go seed by seed, each time through all orders, so that a partial comparison is already a balanced one. Each
    finished run is kept under `out/runs`; called again with the same settings, only missing runs are trained, and
    orders or seeds may be added. `out` also gets `results.csv` (one row a run), `summary.csv` (one row an order) and
    `report.html`, a single file.

    Args:
        model: A model that takes a `scan`; None is the task's own choice, for images vmamba_mini.
        data: What `--data.root` of the task takes, such as "digits", a folder of images or "torchvision:NAME"; or the
            task's data as an object, such as an `ImageData`. None is the task's own choice. With `train`, any text.
        scans: Names or specs such as "window(2)", or `Scan` objects. A function must be registered first. None takes
            the orders that the task is compared by.
        seeds: How many (0, 1, ...), or which. 3 find large differences only; the verdict says how large.
        epochs: Budget of every run.
        out: Folder of this comparison.
        controls: "random": a shuffled order, another one for each seed, with as many directions as the reference.
            "none": the model without any scan, its mixers reduced to what surrounds them.
        reference: The order that all others are compared to; None is the first.
        match_directions: Repeat the directions of orders that have fewer, so that all have the same number of
            parameters. Otherwise orders run as they are published, and the report says where sizes differ.
        metric: What to compare; None is the score of the task on the test set, for classifiers the accuracy.
        alpha: Error rate of all comparisons with the reference together.
        data_options: Arguments of the task's data beside `root`, such as `{"batch_size": 128}`.
        model_options: Arguments of the task, such as `{"lr": 2e-3}`.
        trainer_options: Arguments of Lightning's `Trainer`, such as `{"precision": "bf16-mixed"}`.
        train: Instead of a task: a function of (scan, seed, folder) that trains once and returns a mapping
            with the metric and, where it has them, `curve` (pairs of epoch and validation score), `items` (score of
            every test example, in a fixed order), `parameters`, `seconds`, `images_per_second` (or whatever an example
            is), `inference_images_per_second` and `peak_memory_bytes`. What it depends on belongs into `model_options`.
        grid: The grid on which the report draws and describes the orders; None is that of the task.
        keep_checkpoints: Keep the weights of finished runs too.
        report: Write `report.html`.
        progress: Show what runs, and how long it will take.
        task: What is trained, one of `mamba_zoo.tasks.registry.TASKS`.

    Raises:
        ValueError: an unknown order, fewer than two of them, or an `out` that holds runs with other settings.
        KeyboardInterrupt: after Ctrl-C; a partial report is there, and calling again goes on.
    """
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(operator.index(s) for s in seeds)
    entry = find_task(task)
    if model is None:
        model_options = {**entry.model_class.compared, **(model_options or {})}
    model = str(model or _default(entry.model_class, "name"))
    grid = grid or entry.model_class.grid
    if metric is None:
        metric = Metric() if train is not None else entry.model_class.metric()
    scans = entry.model_class.orders if scans is None else scans
    names, specs = _specs(scans, controls, seeds, reference, match_directions, grid, entry.model_class)
    controls = [c for c in controls if c in names]
    reference = reference or names[0]
    items = None if train is not None else _data(entry, data, model, data_options)
    root = _default(entry.data_class, "root") if data is None else data
    store = RunStore(
        out,
        {
            "model": model,
            "data": dict(items.hparams) if items is not None else {"root": str(root), **(data_options or {})},
            "epochs": epochs,
            "match_directions": match_directions,
            "model_options": dict(model_options or {}),
            "trainer_options": dict(trainer_options or {}),
            "random_directions": specs["random", seeds[0]][1] if "random" in controls else None,
            **({} if task == DEFAULT else {"task": task}),
        },
    )
    plan = {
        "scans": [n for n in names if n not in controls], "controls": controls, "seeds": list(seeds),
        "reference": reference, "metric": dataclasses.asdict(metric), "alpha": alpha,
        "grid": None if grid is None else list(grid),
    }  # fmt: skip
    store.write_plan(plan)
    if train is None:
        train = task_trainer(task, model, items, epochs, model_options or {}, trainer_options or {}, keep_checkpoints)
    try:
        _train_missing(store, plan, specs, train, metric, progress)
    finally:
        comparison = load(out)
        from .report import write_all

        write_all(comparison, store.out, report)
    return comparison


def load(out: str | Path) -> Comparison:
    """The comparison in a folder, finished or not, without training anything.

    Raises:
        FileNotFoundError: `out` holds no comparison.
        ValueError: one of its files is damaged.
    """
    store = RunStore.open(out)
    plan = store.plan()
    names = [*plan["scans"], *plan["controls"]]
    runs = [run for name in names for seed in plan["seeds"] if (run := store.load(name, seed)) is not None]
    settings = {**store.settings, "grid": plan["grid"]}
    return analyse(
        runs, plan["scans"], plan["controls"], plan["seeds"], plan["reference"], Metric(**plan["metric"]),
        plan["alpha"], settings,
    )  # fmt: skip


def schedule(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Every (order, seed), seed by seed; each seed starts with another order, so that none always runs first."""
    turns = [i % len(names) for i in range(len(seeds))]
    return [(name, s) for i, s in zip(turns, seeds, strict=True) for name in [*names[i:], *names[:i]]]


def _train_missing(
    store: RunStore, plan: Mapping[str, Any], specs: Mapping, train: Trainer, metric: Metric, progress: bool
) -> None:
    from ._progress import RunProgress

    todo = schedule([*plan["scans"], *plan["controls"]], plan["seeds"])
    missing = [pair for pair in todo if store.load(*pair) is None]
    here = machine() if missing else {}
    with RunProgress(len(todo), len(todo) - len(missing), progress and bool(missing)) as bar:
        for name, seed in missing:
            bar.start(name, seed)
            spec, directions = specs[name, seed]
            started = time.perf_counter()
            metrics = dict(train(spec, seed, store.folder(name, seed)))
            metrics.setdefault("seconds", time.perf_counter() - started)
            metrics.setdefault("directions", directions)
            run = make_run(metrics, name, seed, metric, here)
            store.save(run)
            bar.finish(name, seed, f"{metric.name} {metric.score(run.score)}")


def _specs(
    scans: Sequence[Any],
    controls: Sequence[str],
    seeds: Sequence[int],
    reference: str | None,
    match_directions: bool,
    grid: tuple[int, ...] | None,
    kind: type[Task],
) -> tuple[list[str], dict[tuple[str, int], tuple[str, int | None]]]:
    """Names in the table, and for each name and seed the spec to train and its number of directions."""
    from mamba_zoo.scans import Scan, build_scan

    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds} must name at least one seed, and each once")
    if unknown := [c for c in controls if c not in CONTROLS]:
        raise ValueError(f"controls={tuple(controls)}: {unknown[0]!r} is unknown; choose from {', '.join(CONTROLS)}")
    names: list[str] = []
    for scan in scans:
        if not isinstance(scan, str | Scan):
            raise TypeError(
                f"scans holds a {type(scan).__name__}; give names, specs or Scan objects. A function has no name that "
                "a continued comparison could trust: register it with mamba_zoo.scans.register_scan"
            )
        names.append("none" if scan == "none" else kind.scan_spec(scan))
    names += [c for c in controls if c not in names]
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise ValueError(f"scans={tuple(map(str, scans))} leaves nothing to compare; give two orders or more")
    if reference is not None and reference not in names:
        raise ValueError(f"reference={reference!r} is not among the orders {', '.join(names)}; add it to scans")
    specs: dict[tuple[str, int], tuple[str, int | None]] = {}
    counted = {name: kind.scan_directions(name) for name in names if name not in CONTROLS} if grid is None else {}
    if grid is None and (not counted or None in counted.values()):  # directions follow from the data
        for name, seed in itertools.product(names, seeds):
            specs[name, seed] = (f"random(seed={seed})" if name == "random" else name, None)
        return names, specs
    counts = {name: counted.get(name) or build_scan(name, *(grid or ())).k for name in names if name not in CONTROLS}
    if not counts:
        counts = {"": build_scan("random", *(grid or ())).k}
    base = counts.get(reference or names[0], next(iter(counts.values())))
    most = max(counts.values()) if match_directions else 0
    for name in names:
        for seed in seeds:
            if name == "none":
                specs[name, seed] = (name, None)
            elif name == "random":
                k = max(base, most)
                specs[name, seed] = (f"random(seed={seed}, k={k})", k)
            else:
                specs[name, seed] = (_repeated(name, counts[name], most), max(counts[name], most))
    return names, specs


def _repeated(spec: str, k: int, most: int) -> str:
    """A spec with its `k` directions repeated until there are `most`."""
    if k >= most:
        return spec
    whole = f"join({', '.join([spec] * -(-most // k))})"
    return whole if most % k == 0 else f"first({whole}, {most})"


def _data(entry: TaskEntry, data: Any, model: str, options: Mapping[str, Any] | None) -> Any:
    kind: Any = entry.data_class
    if isinstance(data, kind):
        if options:
            raise ValueError(f"data_options go with a name or folder; data is already a {kind.__name__}")
        return data
    told = {"model_name": model} if "model_name" in inspect.signature(kind).parameters else {}
    return kind(**({} if data is None else {"root": str(data)}), **told, **(options or {}))


def _default(kind: type, argument: str) -> Any:
    return inspect.signature(kind).parameters[argument].default


def main(arguments: Sequence[str]) -> int:
    """`mamba-zoo compare`."""
    import argparse

    from rich.console import Console

    from ._compare_flags import take_settings
    from ._tables import rich_tables

    given, arguments = take_settings(arguments)
    parser = argparse.ArgumentParser(
        prog="mamba-zoo compare",
        description="Train one model under several scan orders, with equal budget and paired seeds, and say which "
        "differences are real. Call again with the same --out to go on, or to add orders or seeds. Settings are given "
        "as to mamba-zoo fit: --config RECIPE, --data.KEY VALUE, --model.KEY VALUE, --trainer.KEY VALUE.",
    )
    parser.add_argument(
        "--task",
        default=given.task or DEFAULT,
        choices=tuple(TASKS),
        metavar="TASK",
        help=f"one of {', '.join(TASKS)} (default: %(default)s)",
    )
    parser.add_argument("--model", help="a model that takes a scan (default: the task's, for images vmamba_mini)")
    parser.add_argument("--data", help="as --data.root of mamba-zoo fit (default: the task's, for images digits)")
    parser.add_argument(
        "--scans",
        help="names or specs, separated by commas (default: the task's, for images cross,hilbert,snake)",
    )
    parser.add_argument("--seeds", default="3", help="how many, or a list such as 0,1,5 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="budget of every run (default: the recipe's, or 20)")
    parser.add_argument("--out", default="runs/compare", help="folder of the comparison (default: %(default)s)")
    parser.add_argument("--reference", help="what the others are compared to (default: the first order)")
    parser.add_argument("--controls", default="random,none", help="random, none, both, or '' (default: %(default)s)")
    parser.add_argument(
        "--match-directions", action="store_true", help="repeat directions until all orders have as many"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="error rate of all comparisons (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, help="pixels, of images or frames (default: the data's or the model's)"
    )
    parser.add_argument("--batch-size", type=int, help="items a step (default: that of the task)")
    parser.add_argument("--lr", type=float, help="highest learning rate (default: that of the task)")
    parser.add_argument("--precision", help="as in Lightning, for instance bf16-mixed")
    parser.add_argument("--accelerator", help="as in Lightning: cpu, gpu, ... (default: what there is)")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the weights of finished runs")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; table and report of what --out holds"
    )
    args = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:  # a log has no width of its own
        console = Console(width=140)

    def show(comparison: Comparison) -> None:
        for table in rich_tables(comparison):
            console.print(table)
        for sentence in (*comparison.verdict, *comparison.notes):
            console.print(f"- {sentence}", highlight=False)
        console.print(f"report: {Path(args.out) / 'report.html'}", highlight=False, soft_wrap=True)

    if args.report_only:
        from .report import write_all

        comparison = load(args.out)
        write_all(comparison, args.out)
        show(comparison)
        return 0
    given.check(args.task)
    model, root = given.model.pop("name", None), given.data.pop("root", None)
    epochs = given.trainer.pop("max_epochs", 20)
    try:
        comparison = orders(
            args.model or model,
            args.data or root,
            split_specs(args.scans) if args.scans else None,
            _seeds(args.seeds),
            args.epochs or epochs,
            args.out,
            split_specs(args.controls),
            args.reference,
            args.match_directions,
            alpha=args.alpha,
            data_options=given.data | _given(image_size=args.image_size, batch_size=args.batch_size),
            model_options=given.model | _given(lr=args.lr),
            trainer_options=given.trainer | _given(precision=args.precision, accelerator=args.accelerator),
            keep_checkpoints=args.keep_checkpoints,
            task=args.task,
        )
    except KeyboardInterrupt:
        show(load(args.out))
        console.print("Interrupted. The same command goes on where it stopped.", style="bold")
        raise
    show(comparison)
    return 0


def split_specs(text: str) -> list[str]:
    """Specs separated by commas; commas inside parentheses belong to a spec."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text!r} must be a number, or numbers separated by commas, such as 0,1,2") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}

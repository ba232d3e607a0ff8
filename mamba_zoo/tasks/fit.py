"""`mamba-zoo fit`: train or fine-tune from a YAML recipe, flags, or nothing at all."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import jsonargparse
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger

from ._data import restoring
from ._task import Task
from .checkpoints import AtomicCheckpointIO, read_checkpoint, write_atomically
from .recipes import RUNS, plan, shipped_for
from .registry import find_task, task_list
from .running import fit, loading, quiet, run_callbacks, trainer_settings
from .summary import EpochLines, print_summary, progress_bar

# A process started by the trainer for another GPU works in the folder that the first one chose.
_RUN_VARIABLE = "MAMBA_ZOO_RUN"


def main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo fit`.

    Args:
        argv: Arguments after `fit`.

    Raises:
        ValueError: an unknown task, wrong arguments, or data that cannot be trained on.
        FileNotFoundError: no such run, recipe or folder.
    """
    task, args, resume = plan(argv)
    with quiet():
        try:
            cli = FitCLI(task, args, resume)
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"{error.message}; see mamba-zoo fit --help") from None
        return cli.fit()


class FitCLI(LightningCLI):
    """The trainer, a task and its data, from a recipe and flags.

    Args:
        task: Name of the task.
        args: Flags, recipes among them.
        resume: Folder of the run to continue, or None.
    """

    def __init__(self, task: str, args: Sequence[str], resume: Path | None) -> None:
        self.task, self.entry = task, find_task(task)
        self.resume = resume
        self.out = Path()
        super().__init__(
            self.entry.model_class,
            self.entry.data_class,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, "max_epochs": 30},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "mamba-zoo fit",
                "usage": "mamba-zoo fit [--task TASK] [--data.root DATA] [--model.name NAME] [--resume [RUN]] [flags]",
                "description": _description(task),
                "formatter_class": _HelpFormatter,
                "exit_on_error": False,
                "dump_header": ["recipe of mamba-zoo fit"],
            },
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            # save_hyperparameters then stores plain values, which load without running a pickle
            load_from_checkpoint_support=False,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What users set most comes first."""
        parser.add_lightning_class_args(self.entry.data_class, "data")
        parser.add_lightning_class_args(self.entry.model_class, "model")
        _explain_shared(parser)
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own flags, and what the data tells the model."""
        parser.add_argument("--task", type=str, default=self.task, help="what to train, see above")
        parser.add_argument("--out", type=str | None, default=None, help="folder of the run; default runs/MODEL-NUMBER")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            metavar="[RUN]",
            help="continue the run in this folder, or the latest in runs/, exactly where its last epoch ended",
        )
        if "model_name" in inspect.signature(self.entry.data_class).parameters:
            parser.link_arguments("model.name", "data.model_name")
        for argument, source in self.entry.data_class.tells.items():
            parser.link_arguments(f"data.{source}", f"model.{argument}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given flags; the program's own are not looked at."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Choose the folder of the run."""
        self.out = self._folder()
        os.environ[_RUN_VARIABLE] = str(self.out)

    def instantiate_classes(self) -> None:
        """Data of a run that is resumed have its parts before the model is told of them."""
        with (
            loading() as self.loaded,
            restoring({} if self.resume is None else read_checkpoint(self.resume / "last.ckpt")),
        ):
            super().instantiate_classes()

    def _folder(self) -> Path:
        if self.resume is not None:
            return self.resume
        if "LOCAL_RANK" in os.environ and _RUN_VARIABLE in os.environ:
            return Path(os.environ[_RUN_VARIABLE])
        if self.config.out is not None:
            out = Path(self.config.out)
            if (out / "last.ckpt").exists():
                raise ValueError(f"out={out} holds a run; continue it with --resume {out}, or choose another folder")
            return out
        name = re.sub(r"[^\w.-]", "_", self.config.model.name)
        return next(out for n in range(1, 10**6) if not (out := RUNS / f"{name}-{n}").exists())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks, the logger and the safe writing of checkpoints."""
        trainer: Any = self.config_init["trainer"]
        model = self.model
        callbacks, self.history = run_callbacks(
            self.out, self.config.seed_everything, model.monitor, model.monitor_mode
        )
        given = trainer["callbacks"] or []
        callbacks += given if isinstance(given, list) else [given]
        callbacks += [EpochLines(), *progress_bar()]
        if not sys.stdout.isatty() and trainer["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = False
        if trainer["logger"] is None:
            kwargs["logger"] = TensorBoardLogger(self.out, name="", version="")
        plugins = trainer["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        self.datamodule.seed_order(self.config.seed_everything)
        steps = max(1, len(self.datamodule.train_dataloader()))
        kwargs["log_every_n_steps"] = trainer["log_every_n_steps"] or min(50, steps)
        with trainer_settings(**{f"--trainer.{key}": trainer[key] for key in ("accelerator", "devices")}):
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def fit(self) -> int:
        """Train, and say where the results are."""
        last = self.out / "last.ckpt"
        if self.resume is None:
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            fit(self.trainer, self.model, self.datamodule, last if self.resume else None)
        except KeyboardInterrupt:
            where = (
                f"complete epochs are saved; continue with: mamba-zoo fit --resume {self.out}"
                if last.exists()
                else "no epoch was complete, nothing is saved"
            )
            sys.stderr.write(f"\ninterrupted: {where}\n")
            return 130
        if self.trainer.is_global_zero:
            print_summary(self.out, self.history.rows, self.model, self.datamodule, self.loaded)
        return 0


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class _SaveConfig(SaveConfigCallback):
    """Store the recipe of the run, for `--resume`."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        config = self.config.clone()
        for key in ("config", "resume", "out"):
            config.pop(key, None)
        text = self.parser.dump(config)
        out = Path(trainer.log_dir or trainer.default_root_dir)
        write_atomically(out / "config.yaml", lambda file: file.write(text.encode()))
        self.already_saved = True


def _explain_shared(parser: LightningArgumentParser) -> None:
    """Arguments that a task only hands on to `Task` get their help from there."""
    shared = {p.arg_name: p.description for p in docstring_parser.parse(Task.__doc__ or "").params}
    for action in parser._actions:
        key = action.dest.removeprefix("model.")
        if action.dest.startswith("model.") and (action.help or "").startswith("See `"):
            action.help = (shared.get(key) or "").replace("\n", " ")


def _description(task: str) -> str:
    configs = " | ".join([*shipped_for(task), "FILE.yaml"])
    return f"""Train or fine-tune a model. With no arguments: vmamba_mini on handwritten digits, about a minute.

tasks (--task, or `task:` in a recipe; the flags below are those of {task}):
{task_list()}

A recipe is a YAML file that flags override: --config {configs}. Without --config it
follows from --data.root. --print_config shows every setting.

Results: runs/MODEL-NUMBER with best.ckpt, last.ckpt, history.csv, curves.png, config.yaml and TensorBoard events.

  mamba-zoo fit
  mamba-zoo fit --task {task} --help
  mamba-zoo fit --data.root photos --model.name vmamba_tiny --model.pretrained true
  mamba-zoo fit --model.scan hilbert --trainer.max_epochs 50
  mamba-zoo fit --config cifar --trainer.precision bf16-mixed
  mamba-zoo fit --resume"""

"""`mamba-zoo fit`: train or fine-tune from a YAML recipe, flags, or nothing at all."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger

from .checkpoints import AtomicCheckpointIO, write_atomically
from .classification import ImageClassifier
from .image_data import ImageData
from .running import fit, quiet, run_callbacks
from .summary import EpochLines, print_summary, progress_bar

RUNS = Path("runs")
CONFIGS = Path(__file__).parent / "configs"
_SMALL = re.compile(r"torchvision:(CIFAR|SVHN|MNIST|FashionMNIST|KMNIST|EMNIST|USPS)")
# A process started by the trainer for another GPU works in the folder that the first one chose.
_RUN_VARIABLE = "MAMBA_ZOO_RUN"
_TOLD_BY_THE_DATA = {
    "num_classes": "num_classes",
    "classes": "class_names",
    "in_chans": "in_chans",
    "image_size": "img_size",
    "preprocess_values": "preprocess",
}


def main(argv: Sequence[str]) -> int:
    """Run `mamba-zoo fit`.

    Args:
        argv: Arguments after `fit`.

    Raises:
        ValueError: wrong arguments or data that cannot be trained on.
        FileNotFoundError: no such run, recipe or folder.
    """
    args, resume = _take_resume(list(argv))
    args = [*_recipe(args, resume), *_named_configs(args)]
    with quiet():
        try:
            cli = FitCLI(args, resume)
        except jsonargparse.ArgumentError as error:
            raise ValueError(f"{error.message}; see mamba-zoo fit --help") from None
        return cli.fit()


class FitCLI(LightningCLI):
    """The trainer, the classifier and its data, from a recipe and flags.

    Args:
        args: Flags, recipes among them.
        resume: Folder of the run to continue, or None.
    """

    def __init__(self, args: Sequence[str], resume: Path | None) -> None:
        self.resume = resume
        self.out = Path()
        super().__init__(
            ImageClassifier,
            ImageData,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, "max_epochs": 30},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "mamba-zoo fit",
                "usage": "mamba-zoo fit [--data.root DATA] [--model.name NAME] [--resume [RUN]] [other flags]",
                "description": _DESCRIPTION,
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
        parser.add_lightning_class_args(ImageData, "data")
        parser.add_lightning_class_args(ImageClassifier, "model")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own flags, and what the data tells the model."""
        parser.add_argument("--out", type=str | None, default=None, help="folder of the run; default runs/MODEL-NUMBER")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            metavar="[RUN]",
            help="continue the run in this folder, or the latest in runs/, exactly where its last epoch ended",
        )
        parser.link_arguments("model.name", "data.model_name")
        for source, target in _TOLD_BY_THE_DATA.items():
            parser.link_arguments(f"data.{source}", f"model.{target}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given flags; the program's own are not looked at."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Choose the folder of the run."""
        self.out = self._folder()
        os.environ[_RUN_VARIABLE] = str(self.out)

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
        callbacks, self.history = run_callbacks(self.out, self.config.seed_everything)
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
        train = self.datamodule.split("train")
        steps = max(1, len(train) // min(self.datamodule.batch_size, len(train)))
        kwargs["log_every_n_steps"] = trainer["log_every_n_steps"] or min(50, steps)
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
            print_summary(self.out, self.history.rows, self.model, self.datamodule)
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


def _take_resume(args: list[str]) -> tuple[list[str], Path | None]:
    """Split `--resume [RUN]` from the other arguments; its folder may be left out."""
    kept: list[str] = []
    folder: Path | None = None
    i = 0
    while i < len(args):
        flag, equals, value = args[i].partition("=")
        if flag != "--resume":
            kept.append(args[i])
        elif equals:
            folder = Path(value)
        elif i + 1 < len(args) and not args[i + 1].startswith("-"):
            i += 1
            folder = Path(args[i])
        else:
            folder = _latest_run()
        i += 1
    if folder is None:
        return kept, None
    if folder.suffix == ".ckpt":
        folder = folder.parent
    if not (folder / "last.ckpt").exists() or not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: last.ckpt or config.yaml is missing")
    return kept, folder


def _latest_run() -> Path:
    runs = sorted(RUNS.glob("*/last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"no run to resume in {RUNS.resolve()}; name its folder: --resume FOLDER")
    return runs[-1].parent


def _recipe(args: Sequence[str], resume: Path | None) -> list[str]:
    """The recipe that comes before the user's flags: that of the resumed run, or the shipped one that fits the data."""
    if resume is not None:
        return ["--config", str(resume / "config.yaml")]
    if any(a in ("-c", "--config") or a.startswith("--config=") for a in args):
        return []
    root = next((_value(args, i) for i, a in enumerate(args) if a.partition("=")[0] == "--data.root"), "digits")
    name = "digits" if root == "digits" else "cifar" if _SMALL.match(root) else "imagefolder"
    return ["--config", str(CONFIGS / f"{name}.yaml")]


def _value(args: Sequence[str], i: int) -> str:
    _, equals, value = args[i].partition("=")
    return value if equals else (args[i + 1] if i + 1 < len(args) else "")


def _named_configs(args: Sequence[str]) -> list[str]:
    """`--config digits` means the shipped recipe of that name, unless there is such a file."""
    shipped = {p.stem: str(p) for p in CONFIGS.glob("*.yaml")}
    out = list(args)
    for i, arg in enumerate(out):
        flag, equals, value = arg.partition("=")
        if flag not in ("-c", "--config"):
            continue
        name = value if equals else (out[i + 1] if i + 1 < len(out) else "")
        if not Path(name).is_file():
            if name not in shipped:
                raise FileNotFoundError(f"no recipe {name}; give a YAML file, or one of {', '.join(sorted(shipped))}")
            out[i if equals else i + 1] = f"{flag}={shipped[name]}" if equals else shipped[name]
    return out


_DESCRIPTION = """Train or fine-tune a model. With no arguments: vmamba_mini on handwritten digits, about a minute.

A recipe is a YAML file that flags override: --config digits | imagefolder | cifar | FILE.yaml. Without --config it
follows from --data.root. --print_config shows every setting.

Results: runs/MODEL-NUMBER with best.ckpt, last.ckpt, history.csv, curves.png, config.yaml and TensorBoard events.

  mamba-zoo fit
  mamba-zoo fit --data.root photos --model.name vmamba_tiny --model.pretrained true
  mamba-zoo fit --model.scan hilbert --trainer.max_epochs 50
  mamba-zoo fit --config cifar --trainer.precision bf16-mixed
  mamba-zoo fit --resume"""

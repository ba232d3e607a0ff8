"""The command line: `mamba-zoo COMMAND ...`, each command in a module that is imported only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# name -> (module, function taking the remaining arguments and returning an exit code or None, what it does)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "list": ("mamba_zoo.tasks.listing", "list_main", "the models, by name pattern and modality"),
    "info": ("mamba_zoo.tasks.listing", "info_main", "one model: size, cost, licence, paper, published score"),
    "doctor": ("mamba_zoo.doctor", "main", "what runs on this machine, and why the rest does not"),
    "bench": ("mamba_zoo.tasks.bench", "main", "speed and memory of one model on this machine"),
    "export": ("mamba_zoo.tasks.export", "main", "write a model as a torch.export program, checked against eager"),
    "fit": ("mamba_zoo.tasks.fit", "main", "train or fine-tune; with no arguments, on handwritten digits"),
    "test": ("mamba_zoo.tasks.evaluate", "test_main", "score a checkpoint on labelled data"),
    "predict": ("mamba_zoo.tasks.evaluate", "predict_main", "classify a folder of images into a CSV"),
    "compare": ("mamba_zoo.tasks.compare", "main", "the same model under several scan orders: one table"),
    "look": ("mamba_zoo.analysis.look", "main", "receptive fields and what each direction sees, as pictures"),
}

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
BAD_INPUT = 2


class CommandError(Exception):
    """An error of the user's, already phrased as one line."""


def usage() -> str:
    """The text of `mamba-zoo --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mamba-zoo COMMAND [arguments] [--traceback]",
            "",
            "Mamba models for images, video, audio, time series, graphs and point clouds.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --help       this text; `mamba-zoo COMMAND --help` explains a command",
            "  --version    the installed version",
            "  --traceback  on an error, show where it happened (also: MAMBA_ZOO_TRACEBACK=1)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0, 2 for an error of the user's, 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in args or os.environ.get("MAMBA_ZOO_TRACEBACK", "") not in ("", "0")
    args = [a for a in args if a != "--traceback"]
    if not args or args[0] in ("-h", "--help", "help"):
        _write(sys.stdout, usage())
        return 0 if args else BAD_INPUT
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        _write(sys.stdout, f"mamba_zoo {version('mamba_zoo')}")
        return 0
    if args[0] not in COMMANDS:
        return _unknown(args[0])
    module, function, _ = COMMANDS[args[0]]
    try:
        return int(getattr(importlib.import_module(module), function)(args[1:]) or 0)
    except KeyboardInterrupt:
        _write(sys.stderr, "\ninterrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has all it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if show:
            raise
        _write(sys.stderr, f"error: {one_line(error)}")
        return BAD_INPUT


def one_line(error: BaseException) -> str:
    """The message of an error on one line; of one that crossed a data worker, the original message."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or type(error).__name__


def _unknown(name: str) -> int:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see mamba-zoo --help"
    _write(sys.stderr, f"error: no command named {name!r}; {hint}")
    return BAD_INPUT


def _write(stream, text: str) -> None:
    stream.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints that a full disk or Ctrl-C cannot destroy, loaded without running a pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ..backbones._checkpoint_file import read_checkpoint as read_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, force it to disk, then rename: the old file stands until the new one is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Save, or leave the previous file as it was.

        Raises:
            OSError: the file cannot be written, for example because the disk is full.
        """
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Load tensors and plain values only."""
        return read_checkpoint(Path(path))


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a new file that takes the place of `path` once it is on disk.

    Raises:
        OSError: naming `path`; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a failed write as a RuntimeError
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it") from error
        kept = "; the previous file is unharmed" if path.exists() else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk may be full"
        raise OSError(f"cannot write {path}: {reason}{kept}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a checkpoint written by `mamba-zoo fit`, on the CPU, or of the best one in the folder of a run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than tensors and plain values.
    """
    path = Path(path).expanduser()
    return read_file(path / "best.ckpt" if path.is_dir() else path)

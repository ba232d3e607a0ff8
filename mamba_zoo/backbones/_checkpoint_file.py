"""Checkpoint files, read without running what is in them."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class _Opaque:
    """Stands in for an object of a published file that holds no weights: it remembers nothing and runs nothing."""

    def __init__(self, *args: object) -> None:
        del args

    def __setstate__(self, state: object) -> None:
        del state


class _Mapping:
    """Stands in for a dict-like class; what it makes is an `OrderedDict`, which torch's unpickler may fill."""

    def __new__(cls, *args: object) -> OrderedDict:
        del args
        return OrderedDict()


# What published training checkpoints keep beside their weights. None of these classes is imported, let alone called.
_MAPPINGS = (
    "addict.addict.Dict",
    "argparse.Namespace",
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "openpoints.utils.config.EasyConfig",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "types.SimpleNamespace",
    "yacs.config.CfgNode",
)
_OPAQUE = (
    *("builtins.bool", "builtins.bytes", "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.getattr"),
    *("builtins.int", "builtins.list", "builtins.object", "builtins.range", "builtins.slice", "builtins.str"),
    *("builtins.tuple", "datetime.datetime", "datetime.timedelta", "mmengine.logging.history_buffer.HistoryBuffer"),
    *("numpy.bool_", "numpy.dtype", "numpy.float16", "numpy.float32", "numpy.float64", "numpy.int16", "numpy.int32"),
    *("numpy.int64", "numpy.int8", "numpy.ndarray", "numpy.uint8"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64", "Str")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
)
_STAND_INS: list[Any] = [*((_Mapping, name) for name in _MAPPINGS), *((_Opaque, name) for name in _OPAQUE)]
# torch keeps its allow-list in one global set, and leaving the context takes our entries out for every thread.
_allow_list = threading.Lock()


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds, on the CPU, read without executing anything in it.

    The format is told from the first bytes, not from the name: files of `torch.save` (both formats) and safetensors.
    Objects that published files keep beside their weights (`argparse.Namespace`, yacs configurations, NumPy scalars)
    come back as inert stand-ins.

    Args:
        path: The file, or the folder of a run of `mamba-zoo fit` for its best one.

    Returns: The object that was saved; a flat dict of tensors for safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, damaged, not a checkpoint, or it asks for a class that is not known to be
            harmless.
    """
    path = Path(path).expanduser()
    if (path / "best.ckpt").exists():
        path /= "best.ckpt"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder without best.ckpt; give the checkpoint file in it")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights themselves; fetch the file with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a checkpoint; save the file that the page links to")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is not a checkpoint: neither a file of torch.save nor safetensors")
    return _read_torch(path, mmap=head.startswith(b"PK"))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); download it again") from error


def _read_torch(path: Path, mmap: bool) -> Any:
    """`torch.load` with stand-ins. A mapped file costs memory only for what is used: not for optimiser states."""
    try:
        # What torch warns about here (old pickle protocols, old storages) either works or ends in the errors below.
        with _allow_list, _only_stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.<>]+)", str(error)):
            raise ValueError(
                f"{path} asks for {found[1]}, which is not among the classes that published checkpoints need. "
                "Checkpoints never execute code here; if you trust the file, save its weights alone elsewhere "
                "(torch.save(model.state_dict(), ...)) and load those"
            ) from error
        raise ValueError(
            f"{path} is not a checkpoint that can be read without executing code ({_first(error)})"
        ) from error
    except Exception as error:  # a damaged file can fail in any way at all
        raise ValueError(f"{path} is cut short, damaged or not a checkpoint ({_first(error)}); get it again") from error


@contextlib.contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Allow our stand-ins, and what others have allowed under other names.

    Of two entries of one name (PyG allows the real defaultdict, which torch then cannot fill), chance would decide.
    """
    taken = {name for _, name in _STAND_INS}
    before = torch.serialization.get_safe_globals()
    others = [entry for entry in before if _allowed_name(entry) not in taken]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, *_STAND_INS])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _allowed_name(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _first(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]

"""Nothing in a checkpoint file is executed, and a failed save damages none."""

import argparse
import collections
import os
import pickle
import sys
import types
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from mamba_zoo.backbones._checkpoint import load_checkpoint, read_checkpoint

from .toy import assert_holds, create


class CfgNode(dict):
    """Pickles as yacs' class does: a dict with attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__["__immutable__"] = True


def foreign(cls, module, monkeypatch):
    """`cls` under the name that a published file would ask for, importable only while the file is written."""
    monkeypatch.setitem(sys.modules, module.partition(".")[0], types.ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    cls.__module__ = module
    setattr(sys.modules[module], cls.__name__, cls)


def test_training_state_of_published_files_is_read_without_its_classes(weights, tmp_path, monkeypatch):
    foreign(CfgNode, "yacs.config", monkeypatch)
    allowed = set(torch.serialization.get_safe_globals())
    extras = {
        "config": CfgNode(MODEL=CfgNode(NAME="vssm"), EPOCHS=300),
        "args": argparse.Namespace(lr=1e-3, opt="adamw"),
        "max_accuracy": np.float64(82.6),
        "history": np.arange(3.0),
        "defaults": collections.defaultdict(list, {"a": [1]}),
    }
    torch.save({"model": weights, **extras}, tmp_path / "train.pth")
    monkeypatch.undo()
    assert_holds(create("toy_small", tmp_path / "train.pth"), weights)
    assert "yacs.config" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == allowed, "the allow-list must not outlive the call"


def test_an_allow_list_of_the_user_survives(weights, tmp_path):
    torch.save({"model": weights, "args": argparse.Namespace()}, tmp_path / "w.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(tmp_path / "w.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


class Payload:
    def __init__(self, run):
        self.run = run

    def __reduce__(self):
        return self.run


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, ("touch ran",)), "system"),
        ((eval, ("open('ran', 'w')",)), "eval"),
        ((partial, (print,)), "partial"),
    ],
    ids=["system", "eval", "partial"],
)
def test_code_in_a_pickle_never_runs(call, named, zipped, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights, "x": Payload(call)}, "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"bad\.pth asks for \S*{named}.*never execute code"):
        create("toy_small", tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def lfs(path, weights):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def page(path, weights):
    path.write_bytes(b"\n<!DOCTYPE html><html><title>Sign in</title></html>")


def text(path, weights):
    path.write_bytes(b"epoch,accuracy\n1,0.2\n")


def plain_pickle(path, weights):
    path.write_bytes(pickle.dumps({"a": 1}))


def truncated(path, weights):
    torch.save({"model": weights}, path)
    path.write_bytes(path.read_bytes()[:-200])


def truncated_legacy(path, weights):
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])


def truncated_safetensors(path, weights):
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-50])


def no_weights(path, weights):
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, path)


def a_list(path, weights):
    torch.save([1, 2], path)


DAMAGED = {
    "Git LFS pointer": lfs,
    "web page": page,
    "is not a checkpoint": text,
    "cannot be read|not a checkpoint": plain_pickle,
    "cut short, damaged": truncated,
    "cut short, damaged|cannot be read": truncated_legacy,
    "is cut short or damaged": truncated_safetensors,
    "no weights under a known name: its entries are epoch, args": no_weights,
    "holds a list": a_list,
    "is empty": lambda path, weights: path.touch(),
    "is a folder without best.ckpt": lambda path, weights: path.mkdir(),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_file_that_is_no_checkpoint_gives_one_error(message, weights, tmp_path):
    path = tmp_path / "file.pth"
    DAMAGED[message](path, weights)
    model = timm.create_model("toy_small")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert_holds(model, before)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        create("toy_small", tmp_path / "none.pth")


def test_what_others_allow_under_our_names_does_not_matter(weights, tmp_path):
    torch.save({"model": weights, "defaults": collections.defaultdict(list, {"a": [1]})}, tmp_path / "w.pth")
    with torch.serialization.safe_globals([collections.defaultdict, argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(tmp_path / "w.pth")["defaults"]["a"] == [1]
        assert set(torch.serialization.get_safe_globals()) == before

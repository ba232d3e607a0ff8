"""Files written by the tasks: a failed write leaves the old one whole."""

import errno
import os

import pytest
import torch

from mamba_zoo.tasks.checkpoints import AtomicCheckpointIO, read_checkpoint

save = AtomicCheckpointIO().save_checkpoint


def test_saving_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "w.ckpt"
    for value in (1, 2):
        save({"w": torch.full((2,), value)}, path)
        assert read_checkpoint(path)["w"].tolist() == [value, value]
    assert os.listdir(path.parent) == ["w.ckpt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(step, failure, tmp_path, monkeypatch):
    path = tmp_path / "w.ckpt"
    save({"w": torch.ones(2)}, path)

    def fail(obj, file=None):
        if file is not None and step == "save":
            file.write(b"half")
        raise failure

    monkeypatch.setattr(*{"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[step], fail)
    with pytest.raises(type(failure)):
        save({"w": torch.zeros(2)}, path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["w.ckpt"]
    assert read_checkpoint(path)["w"].tolist() == [1, 1]


def test_a_folder_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt"):
        read_checkpoint(tmp_path)
    save({"w": torch.ones(1)}, tmp_path / "best.ckpt")
    assert read_checkpoint(tmp_path)["w"].tolist() == [1]

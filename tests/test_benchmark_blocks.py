"""Blocks as functions beside their layers: what is timed, and that nothing is timed that differs."""

import csv

import pytest
import torch

from benchmarks import blocks
from mamba_zoo.backbones import _map_nodes

SMALL = ["--model", "vmamba_mini", "--batch", "2", "--size", "16", "--rounds", "1", "--device", "cpu"]


def test_both_ways_are_timed_in_turn(tmp_path, monkeypatch):
    seen, before = [], _map_nodes.DEVICES
    real = blocks.several
    monkeypatch.setattr(blocks, "several", lambda *args: seen.append(_map_nodes.DEVICES) or real(*args))
    blocks.main([*SMALL, "--out", str(tmp_path / "blocks.csv")])
    head, *lines = (tmp_path / "blocks.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert head.startswith("# CPU; torch")
    assert {(row["blocks"], row["what"]) for row in rows} == {
        (way, what) for way in ("layers", "functions") for what in ("infer", "train")
    }
    assert all(0 < float(row["fastest"]) <= float(row["ms"]) <= float(row["slowest"]) for row in rows)
    assert set(seen) == {(), ("cuda",)}
    assert before == _map_nodes.DEVICES


def test_nothing_is_timed_that_differs(monkeypatch):
    real = blocks.train

    def wrong(model: torch.nn.Module, call, x: torch.Tensor) -> torch.Tensor:
        return real(model, call, x) + (0.0 if _map_nodes.DEVICES else 1.0)

    monkeypatch.setattr(blocks, "train", wrong)
    with pytest.raises(SystemExit, match="layers and functions differ"):
        blocks.main(SMALL)

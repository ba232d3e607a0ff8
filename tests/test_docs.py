"""The generated page of models says what the cards say, and what is counted."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def make_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_models_page_is_up_to_date(make_models):
    assert PAGE.startswith(make_models.head()), "run `make docs`"
    assert PAGE.endswith(make_models.cards()), "run `make docs`"


@pytest.mark.parametrize("name", ["vmamba_small_v0", "local_vim_tiny", "videomamba_tiny_video", "timemachine"])
def test_counted_operations_are_up_to_date(make_models, name):
    # A few of them: counting all takes half a minute.
    assert make_models.table([], [make_models.operations(name)]).splitlines()[-1] in PAGE.splitlines()


def test_models_without_one_input_are_not_counted(make_models):
    assert make_models.operations("mamba") is None
    assert "| `mamba` |" not in PAGE.partition("## Cards")[0]

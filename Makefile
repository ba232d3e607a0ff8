# Every target sets up what it needs in .venv; `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1

.PHONY: help demo test test-gpu lint type check fmt bench docs clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[audio,cuda,detection,dev,graph]'
	touch $@

demo: $(VENV)/ready  ## fine-tune a small VMamba on digits with several scan orders, print the ranking, write a report
	$(BIN)/mamba-zoo compare --scans cross,bidirectional,snake,hilbert,spiral --seeds 3 --epochs 12 --lr 0.004 --out runs/demo

test: $(VENV)/ready  ## all tests for a CPU, Triton's kernels under its interpreter among them
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-gpu: $(VENV)/ready  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/ready  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/ready  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint type test  ## what CI runs

fmt: $(VENV)/ready  ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready  ## scan and model speed on this machine, against the step-by-step recurrence and timm
	$(BIN)/python -m benchmarks.kernels_cpu
	$(BIN)/python -m benchmarks.models --device cpu

docs: $(VENV)/ready  ## pictures of the scans and the table of models
	$(BIN)/python docs/make_scans.py
	$(BIN)/python docs/make_models.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# Two commands: `make train` trains the default to its end, `make test` runs the tests.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: train test soak check clean

train: .venv/installed
	$(BIN)/torchrun --nproc_per_node=1 launch/train.py

test: .venv/installed-test
	$(BIN)/python -m pytest

soak: .venv/installed-test
	$(BIN)/python -m pytest -m soak

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info

# `make demo` trains a model on this machine; `make test` runs the whole suite. Both make .venv when it is stale.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench
demo: .venv/run
	$(BIN)/python -m runner

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/run
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/sweep.py

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

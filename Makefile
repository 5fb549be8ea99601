PYTHON ?= python3.12
BIN := .venv/bin
STAMP := .venv/.installed
# Tests and the demo must give the same numbers on a machine that happens to have an accelerator.
CPU := JAX_PLATFORMS=cpu

.PHONY: help venv demo test test-all check lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

venv: $(STAMP)  ## create .venv and install everything that requirements.lock pins

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.12, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: venv  ## train a small model on real images, score it, convert it and ask it a question
	$(CPU) $(BIN)/python demo.py

test: venv  ## run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadscope --max-worker-restart=0 -m "not slow"

test-all: venv  ## run every test, slow ones included
	$(BIN)/python -m pytest

check: venv lint  ## run lint, type checks and quick tests, for use while you work (< 90 s)
	$(BIN)/python -m pytest -q -m "not slow" tests/test_rows.py tests/test_config.py tests/models tests/images tests/text

lint: venv  ## run ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## apply the fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## pin the newest versions of all dependencies (needs uv)
	uv pip compile --quiet --universal --upgrade --python-version 3.12 --no-annotate --no-header --no-emit-index-url \
		--extra dev --extra demo --extra hub pyproject.toml -o requirements.lock

clean:  ## remove everything that make created, data and runs included
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache data runs

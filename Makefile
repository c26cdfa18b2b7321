# The targets set up .venv themselves; the first run takes a few minutes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
# uv installs in parallel, in a fifth of pip's time. It does not read pip's settings: where they name
# the only index that can be reached, pip itself installs.
INSTALL = $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable $(1) \
	|| $(PIP) --editable $(1)
# Every test of a run on Ray starts processes that import torch: keep the compiled modules, whatever
# the environment says (an empty value switches the variable off).
export PYTHONDONTWRITEBYTECODE :=
# one process per core; the tests of a file share fixtures
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: help demo test test-all test-gpu check docs clean

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: .venv/user  ## CE, KD, DIST and PLD on handwritten digits: table and figures
	$(BIN)/pld-ray run demo

test: .venv/dev  ## the tests, but for the slow ones: whole runs on Ray
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: .venv/dev  ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-gpu: .venv/dev  ## the tests that need a GPU
	PLD_RAY_TEST_GPU=1 $(BIN)/python -m pytest tests/test_cuda.py

check: .venv/dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev  ## the documentation as a web site, in site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/user: pyproject.toml
	$(PYTHON) -m venv .venv
	$(call INSTALL,.)
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(call INSTALL,".[dev]")
	touch .venv/user $@

clean:  ## remove everything that make or a run made
	rm -rf .venv results site

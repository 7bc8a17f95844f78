# make demo   set up, then train a sparse model, export it and let it answer (default: SmolLM2-135M-Instruct)
# make test   set up, then lint, types, native tests with sanitizers, Python tests
# Both create the environment in $(VENV) on the first run and re-use it afterwards.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
RUN    ?= runs/smollm2-135m-demo

BIN     := $(abspath $(VENV))/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
NATIVE  := $(shell find native CMakeLists.txt -type f -not -path '*/tests/*' 2>/dev/null)

export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)
export PROSPARSE_RUNS = $(dir $(RUN))

.PHONY: demo test lint test-native test-python format setup setup-test clean

demo: $(RUN)/gguf/.exported
	@echo "== the model in $(RUN)"
	@sed -n '/^| on /,/^$$/p' $(RUN)/README.md
	@echo "== the sparse backend beside stock llama.cpp, same file, same threads"
	$(BIN)/prosparse-pipe bench $(RUN) -p 0 -n 64 -r 5
	@echo "== an answer of the sparse model"
	$(BIN)/prosparse-pipe chat $(RUN) -p "What do you like to do at the weekend?" -n 64 --temp 0 --verbose

$(RUN)/prosparse.json: | setup
	$(BIN)/prosparse-pipe train --config recipes/smollm2-135m-demo.yaml --out $(RUN) --resume

$(RUN)/predictors.safetensors: $(RUN)/prosparse.json
	$(BIN)/prosparse-pipe profile $(RUN) --data chitchat --tokens 16384
	$(BIN)/prosparse-pipe predictor $(RUN) --data chitchat --tokens 16384 --ranks 64

$(RUN)/gguf/.exported: $(RUN)/predictors.safetensors
	$(BIN)/prosparse-pipe export --gguf $(RUN) --type Q8_0
	@touch $@

test: lint test-native test-python

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find native -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

test-native: setup-test
	$(BIN)/cmake -S native -B build/native-tests -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DPython_EXECUTABLE=$(BIN)/python \
	    -DPROSPARSE_BUILD_TESTS=ON -DPROSPARSE_SANITIZE=ON
	$(BIN)/cmake --build build/native-tests
	$(BIN)/ctest --test-dir build/native-tests --output-on-failure

test-python: setup-test
	$(BIN)/python -m pytest

format: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find native -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

setup: $(VENV)/.demo
setup-test: $(VENV)/.test

# llama-cpp-python compiles llama.cpp here (minutes, once: pip keeps the wheel); our backend is built against its ggml.
# GCC before 14 miscompiles the AMX tile set-up of ggml (GCC bug 114098): quantized models crash on Xeons that have AMX.
# pip's wheel cache does not know compiler flags, so the cache is left alone there.
GCC_MAJOR := $(shell $${CXX:-g++} -dumpversion 2>/dev/null | cut -d. -f1)
AMX := $(shell grep -qm1 amx_tile /proc/cpuinfo 2>/dev/null && echo yes)
ifeq ($(AMX)$(shell test $(or $(GCC_MAJOR),99) -lt 14 && echo yes),yesyes)
  LLAMA_BUILD := CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"
  LLAMA_CACHE := --no-cache-dir
endif

$(VENV)/.llama-cpp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("prosparse-pipe needs Python 3.10 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== llama-cpp-python: compiles for some minutes if pip has no wheel of it yet"
	$(INSTALL) scikit-build-core cmake ninja
	$(LLAMA_BUILD) $(INSTALL) $(LLAMA_CACHE) llama-cpp-python
	@touch $@

$(VENV)/.demo: $(VENV)/.llama-cpp pyproject.toml $(NATIVE)
	$(INSTALL) --no-build-isolation --editable '.[train,demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --no-build-isolation --editable '.[train,demo,dev]'
	@touch $@

clean:
	rm -rf build $(VENV)

# `make test` and `make demo` need nothing prepared: they set up .venv and build first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BUILD_TYPE ?= Release
# Compute capabilities for `make build` (what a wheel carries is the default of CMakeLists.txt).
CUDA ?= AUTO
CUDA_ARCHS ?= fast
WERROR ?= $(if $(CI),ON,OFF)
DEMO_ARGS ?=
PYTEST_ARGS ?=
CTEST_ARGS ?=
CHAOS_ARGS ?=
SOAK_ARGS ?=
BENCH_ARGS ?=
HYPOTHESIS_PROFILE ?= ci

VENV := .venv
BIN := $(VENV)/bin
RELEASE := build/release

export PYTHON HYPOTHESIS_PROFILE
# Compilations are found in the cache again in another clone of the repository.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
export CCACHE_SLOPPINESS := pch_defines,time_macros
CCACHE := $(shell command -v ccache 2>/dev/null)
LAUNCHER := $(if $(CCACHE),-DCMAKE_CXX_COMPILER_LAUNCHER=$(CCACHE))

CONFIGURE = $(BIN)/cmake -S . -G Ninja --log-level=WARNING \
  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPIPELIVE_WERROR=$(WERROR) $(LAUNCHER)
COMPILE = $(BIN)/cmake --build
# One after another: the tests of transport and memory are threaded themselves.
CTEST = $(BIN)/ctest --output-on-failure --no-tests=error --timeout 300 $(CTEST_ARGS)

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard \
  '*.hpp' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)
SHELL_FILES = $(shell git ls-files --cached --others --exclude-standard '*.sh' .ci/run 2>/dev/null)

.PHONY: help setup build test test-cpp test-py test-vllm demo demo-vllm bench figures figures-vllm lint format tsan asan asan-py tsan-py fuzz cuda chaos soak mutants wheel-check clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv with pinned packages, and install system packages where run as root
	@scripts/setup.sh

build: setup  ## Compile the extension and the C++ tests (build/release)
	@$(CONFIGURE) -B $(RELEASE) -DCMAKE_BUILD_TYPE=$(BUILD_TYPE) -DPIPELIVE_INPLACE=ON \
	  -DPIPELIVE_BUILD_TESTS=ON -DPIPELIVE_CUDA=$(CUDA) -DPIPELIVE_CUDA_ARCHS='$(CUDA_ARCHS)' \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	@$(COMPILE) $(RELEASE) -j $(JOBS)

test: test-cpp test-py  ## Run all tests

test-cpp: build  ## Run the C++ tests; CTEST_ARGS="-R name" chooses
	@$(CTEST) --test-dir $(RELEASE)

test-py: build  ## Run the Python tests; PYTEST_ARGS="-k name" chooses
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 2 $(PYTEST_ARGS)

test-vllm: build  ## Run the tests inside vLLM, in an environment of their own (3.2 GB)
	@scripts/vllm_env.sh python -m pytest tests/vllm $(PYTEST_ARGS)

demo: build  ## Run the demo; DEMO_ARGS passes arguments
	@$(BIN)/pipelive-kv demo $(DEMO_ARGS)

# Found, or made, with .venv, which has the packages that it is made of; vLLM's environment has not.
MODEL = model=$$($(BIN)/python -c 'from pipelive_kv.models.smollm import smollm2; print(smollm2())')

demo-vllm: build  ## Show vLLM's own server change its split; DEMO_ARGS passes arguments
	@$(MODEL); scripts/vllm_env.sh python examples/vllm_live_reconfiguration.py \
	  --model "$$model" $(DEMO_ARGS)

bench: setup  ## Run the C++ microbenchmarks; JSON in build/bench
	@$(CONFIGURE) -B build/bench -DCMAKE_BUILD_TYPE=Release -DPIPELIVE_BUILD_PYTHON=OFF \
	  -DPIPELIVE_BUILD_BENCH=ON -DPIPELIVE_CUDA=OFF
	@$(COMPILE) build/bench -j $(JOBS)
	@scripts/bench.sh build/bench $(BENCH_ARGS)

figures: build  ## Measure what docs/benchmarks holds; wants a quiet machine and ten minutes
	@$(BIN)/python benchmarks/run_all.py --full --out docs/benchmarks

figures-vllm: build  ## Measure vLLM with and without the plugin; BENCH_ARGS passes arguments
	@$(MODEL); scripts/vllm_env.sh python benchmarks/vllm_serving.py --model "$$model" \
	  --pairs 5 --moved 3 --out docs/benchmarks/cpu/vllm_serving.json $(BENCH_ARGS)

lint: setup  ## Check style and types: ruff, mypy, clang-format, layers, shell syntax
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/python scripts/check_layers.py
	@$(BIN)/python scripts/check_bindings.py
	@for file in $(SHELL_FILES); do bash -n "$$file"; done
	@echo "lint: all checks passed"

format: setup  ## Reformat Python and C++ in place
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(CXX_FILES)

# Thread sanitizer cannot place its shadow memory under high address randomisation. Sessions over
# shared memory are left out: it does not see that what is ordered through one mapping of a memory
# file is ordered through the other, and both ends lie in one process there.
tsan: setup  ## Run the C++ tests under ThreadSanitizer (build/tsan)
	@$(CONFIGURE) -B build/tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPIPELIVE_BUILD_PYTHON=OFF \
	  -DPIPELIVE_BUILD_TESTS=ON -DPIPELIVE_CUDA=OFF -DPIPELIVE_SANITIZE=thread
	@setarch -R $(COMPILE) build/tsan -j $(JOBS)
	@TSAN_OPTIONS="halt_on_error=1 suppressions=$(CURDIR)/cpp/tests/tsan.supp" setarch -R $(CTEST) --test-dir build/tsan -E 'Session.*/(shm|p2p)'

asan: setup  ## Run the C++ tests under address and undefined-behaviour sanitizers (build/asan)
	@$(CONFIGURE) -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPIPELIVE_BUILD_PYTHON=OFF \
	  -DPIPELIVE_BUILD_TESTS=ON -DPIPELIVE_CUDA=OFF -DPIPELIVE_SANITIZE=address,undefined
	@$(COMPILE) build/asan -j $(JOBS)
	@UBSAN_OPTIONS=print_stacktrace=1 $(CTEST) --test-dir build/asan

# What Python calls, under the same sanitizers: the binding and the threads behind it.
PY_SANITIZED ?= tests/memory tests/kv tests/tracker tests/blocks tests/migration tests/transport tests/slots tests/security
asan-py: setup  ## Run Python tests with the extension under address and undefined-behaviour sanitizers
	@scripts/sanitized_python.sh address,undefined build/asan-py $(PY_SANITIZED)

tsan-py: setup  ## Run Python tests with the extension under ThreadSanitizer
	@scripts/sanitized_python.sh thread build/tsan-py $(PY_SANITIZED)

fuzz: setup  ## Run the libFuzzer targets, FUZZ_SECONDS=60 each (needs clang; build/fuzz)
	@command -v clang++ >/dev/null || { echo "fuzz: clang++ is missing; install clang and its runtime \
	(Debian: apt-get install clang libclang-rt-14-dev)" >&2; exit 1; }
	@$(CONFIGURE) -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DPIPELIVE_BUILD_PYTHON=OFF -DPIPELIVE_CUDA=OFF -DPIPELIVE_FUZZ=ON \
	  -DPIPELIVE_SANITIZE=fuzzer-no-link,address,undefined
	@$(COMPILE) build/fuzz -j $(JOBS) --target wire_fuzz receiver_fuzz sender_fuzz tcp_channel_fuzz \
	  shm_channel_fuzz peer_channel_fuzz nccl_channel_fuzz
	@scripts/fuzz.sh build/fuzz

# The tests whose result the architectures may change; `make test` runs all of them for one.
cuda: setup  ## Compile the CUDA kernels for all architectures and test them (needs nvcc; build/cuda)
	@$(CONFIGURE) -B build/cuda -DCMAKE_BUILD_TYPE=Release -DPIPELIVE_BUILD_PYTHON=OFF \
	  -DPIPELIVE_BUILD_TESTS=ON -DPIPELIVE_CUDA=ON
	@$(COMPILE) build/cuda -j $(JOBS) --target cuda_image_tests
	@$(CTEST) --test-dir build/cuda/cuda -E 'NOT_BUILT|^Fuzz'

# Outside of CI: the whole table of faults (N=0), or N trials drawn at random.
N ?= 0
chaos: build  ## Faults in every phase against stage processes under load; N=500 draws so many
	@$(BIN)/python -m tests.chaos.run --trials $(N) --json build/chaos.json $(CHAOS_ARGS)

soak: build  ## A thousand reconfigurations back and forth under load; what is held stays flat
	@$(BIN)/python -m tests.chaos.soak --json build/soak.json $(SOAK_ARGS)

mutants: setup  ## Break one rule at a time and see a test fail; MUTANTS_ARGS="gate record" chooses
	@$(BIN)/python scripts/mutants.py $(MUTANTS_ARGS)

wheel-check:  ## Install the package into a fresh environment, as a user would, and use it there
	@scripts/wheel_check.sh

clean:  ## Remove what was built (not .venv)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache src/pipelive_kv/_core.*.so

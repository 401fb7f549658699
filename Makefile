# Every target sets up what it needs (tools/setup.sh) and does again only what has changed. `make help` lists them.
PYTHON ?= python3
JOBS ?= $(shell nproc)
export PYTHON JOBS

VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps
SOURCES := $(shell find include src bindings python cmake -type f -not -path '*/__pycache__/*') CMakeLists.txt \
           pyproject.toml README.md $(wildcard licenses/*.txt) tools/sbom.py $(wildcard tests/cpp/CMakeLists.txt examples/cpp/CMakeLists.txt)
CXX_FILES := $(shell find include src bindings tests examples benchmarks \
               -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' 2> /dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-15s %s\n", $$1, $$2}'

# ---- Setup ---------------------------------------------------------------------------------------------------------
$(STAMPS)/packages: tools/setup.sh
	@tools/setup.sh packages
	@mkdir -p $(@D) && touch $@

$(STAMPS)/packages-aarch64: $(STAMPS)/packages
	@tools/setup.sh packages g++-aarch64-linux-gnu qemu-user
	@touch $@

# Where the sanitizers' runtime is a package of its own, it is wanted too.
$(STAMPS)/packages-clang: $(STAMPS)/packages
	@tools/setup.sh packages clang $$(apt-cache show libclang-rt-dev > /dev/null 2>&1 && echo libclang-rt-dev)
	@touch $@

$(VENV)/.requirements: requirements-build.txt requirements-dev.txt $(STAMPS)/packages
	@tools/setup.sh venv
	@touch $@

$(VENV)/.wheel: $(SOURCES) $(VENV)/.requirements
	@tools/setup.sh build
	@touch $@

# vLLM pins much of what it needs, so it has an environment of its own.
VLLM_BIN := .venv-vllm/bin
.venv-vllm/.requirements: requirements-vllm.txt $(STAMPS)/packages
	@tools/setup.sh vllm
	@touch $@

.venv-vllm/.wheel: $(VENV)/.wheel .venv-vllm/.requirements
	@$(VLLM_BIN)/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall build/dist/*.whl
	@touch $@

.PHONY: setup build
setup: $(VENV)/.requirements ## Install the system packages and the Python environment (.venv)
build: $(VENV)/.wheel ## Build the wheel (build/dist) and install it into .venv

.PHONY: wheel
wheel: build ## The wheel as it is released (build/dist): checked, with an SBOM, run in an empty environment
	@$(BIN)/python tools/check_wheel.py build/dist/*.whl
	@tools/test_wheel.sh --selftest build/dist/*.whl $(PYTHON)

# ---- The demo ------------------------------------------------------------------------------------------------------
.PHONY: demo bench-cpu bench-cuda bench-vllm
demo: build ## Serve eight prompts through four adapters in one batch, on the CPU
	@$(BIN)/python examples/demo.py

bench-cpu: build ## Measure the CPU backend beside its rivals (benchmarks/results)
	@$(BIN)/python benchmarks/bench_cpu.py

bench-cuda: build ## Measure the CUDA backend beside its floors and torch (needs a GPU, and torch built for it)
	@$(BIN)/python benchmarks/bench_cuda.py

bench-vllm: .venv-vllm/.wheel ## Measure LoRA in vLLM on the CPU: our wrapper and its own, side by side
	@$(VLLM_BIN)/python benchmarks/bench_vllm.py

# ---- Tests ---------------------------------------------------------------------------------------------------------
.PHONY: test test-cpp test-python test-peft test-vllm test-cuda-sanitize test-sanitize test-tsan test-aarch64
test: test-cpp test-python ## C++ tests for every instruction set, the C++ example, Python tests

test-cpp: build ## C++ tests and example
	@cmake --build build/release -j $(JOBS) --target punica_tests decode_step
	@ctest --test-dir build/release --output-on-failure

test-python: build ## Python tests, against the installed wheel
	@$(BIN)/python -m pytest tests/python -q

test-peft: build ## PEFT's own tests of mixed batches, with every model accelerated
	@tools/test_peft.sh $(BIN)/python

test-vllm: .venv-vllm/.wheel ## vLLM serving with the plugin: against its own LoRA, two workers, the OpenAI client
	@$(VLLM_BIN)/python -m pytest tests/vllm -q -o pythonpath="tests/vllm tests/python"

test-cuda-sanitize: build ## The CUDA kernels under compute-sanitizer (needs a GPU)
	@cmake --build build/release -j $(JOBS) --target punica_tests
	@$(BIN)/python tests/cpp/cuda/sanitize.py build/release/tests/cpp/cuda

# Clang, because GCC 12 takes many minutes a file for sanitized kernels; and it is a second compiler's opinion.
SANITIZE_CONFIGURE = cmake -S . -B $(1) -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=None \
                     -DCMAKE_CXX_FLAGS=-O1 -DPUNICA_CUDA=OFF '-DPUNICA_SANITIZE=$(2)' --log-level=WARNING

test-sanitize: $(STAMPS)/packages-clang ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(call SANITIZE_CONFIGURE,build/sanitize,address;undefined)
	@cmake --build build/sanitize -j $(JOBS)
	@ASAN_OPTIONS=detect_stack_use_after_return=1 ctest --test-dir build/sanitize --output-on-failure

test-tsan: $(STAMPS)/packages-clang ## C++ tests of the thread pool under ThreadSanitizer
	@$(call SANITIZE_CONFIGURE,build/tsan,thread)
	@cmake --build build/tsan -j $(JOBS) --target punica_tests
	@TSAN_OPTIONS=die_after_fork=0 build/tsan/tests/cpp/punica_tests --gtest_filter='*Thread*'

test-aarch64: $(STAMPS)/packages-aarch64 ## C++ tests compiled for 64-bit Arm, under an emulator
	@cmake -S . -B build/aarch64 -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake -DPUNICA_CUDA=OFF \
	  --log-level=WARNING
	@cmake --build build/aarch64 -j $(JOBS)
	@ctest --test-dir build/aarch64 --output-on-failure

# ---- Style ---------------------------------------------------------------------------------------------------------
.PHONY: format lint
format: $(VENV)/.requirements ## Format C++ and Python
	@$(BIN)/clang-format -i $(CXX_FILES)
	@$(BIN)/ruff check --fix -q
	@$(BIN)/ruff format -q

lint: build ## clang-format, clang-tidy, ruff, mypy
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy
	@tools/clang_tidy.sh $(JOBS)

.PHONY: clean
clean: ## Remove what was built, and .venv
	rm -rf build dist $(VENV) .venv-vllm

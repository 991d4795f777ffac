# demo, test, lint, gpu-test, bench: each makes .venv itself when it is missing or older than the pins.
# PYTHON=python3.12 chooses the interpreter, JOBS the number of test processes, GPU_JOBS of those that share a GPU.

PYTHON ?= python3
JOBS ?= 2
GPU_JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OS := $(shell uname -s)
GPU := $(wildcard /dev/nvidia0 /dev/nvidiactl /usr/lib/wsl/lib/nvidia-smi)$(shell nvidia-smi -L 2>/dev/null)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint gpu-test bench

help:
	@echo "make demo      train a small model on text that every Python has, and show that it learnt (minutes)"
	@echo "make test      all tests that need no GPU"
	@echo "make lint      ruff and mypy"
	@echo "make gpu-test  the tests that need an NVIDIA GPU"
	@echo "make bench     the benchmarks; each prints the machine it ran on"

venv: $(STAMP)

# Where there is no GPU, torch==X+cpu is asked for by that name, so that an index that lacks it is an error and CUDA packages
# are never the answer. A wheel of it in pip's own configuration will do as well. macOS builds are CPU builds and have no suffix.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys' 2>/dev/null || { echo "error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install it: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, most of them for torch"
ifeq ($(GPU)$(filter-out Linux,$(OS)),)
	@$(PIP) install --quiet --retries 2 --no-deps \
	  --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu"
endif
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The policy is what the command line sets: threads that wait do not spin.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ifeq ($(GPU),)
gpu-test:
	@echo "error: no NVIDIA GPU here, so nothing was tested; run make gpu-test on a machine that has one" >&2; exit 1
else
gpu-test: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "error: torch does not see the GPU; run $(BIN)/chronicals doctor" >&2; exit 1; }
	$(BIN)/python -m pytest -n $(GPU_JOBS) --dist worksteal -m "not large" tests/gpu
	$(BIN)/python -m pytest -m large tests/gpu
endif

bench: $(STAMP)
	$(BIN)/python -m benchmarks.packing
ifneq ($(GPU),)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/chronicals bench kernels
endif

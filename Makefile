# The verbs of the project; CI calls `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu-test lint format type bench lock clean

help: ## Show the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## Make .venv with everything the tests need

demo: $(VENV)/.engine ## Serve tiny-oss on this machine, no GPU needed
	@# With job control the server has the terminal to itself: Ctrl-C drains it, and make sees its exit status.
	@set -m 2>/dev/null; $(BIN)/hlaunch up tiny-oss; exit $$?

test: $(VENV)/.dev ## Lint, types, architecture and tier A; ends with one line of passed and failed
	@$(BIN)/python tools/check.py

gpu-test: ## On a machine with Hopper GPUs and torch for CUDA: kernels and engine against their references
	@$(PYTHON) -m pytest -q -m "gpu or multi_gpu" tests/gpu

lint: $(VENV)/.dev ## Only lint and architecture
	@$(BIN)/python tools/check.py lint format imports

format: $(VENV)/.dev ## Format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

type: $(VENV)/.dev ## Only types
	@$(BIN)/python tools/check.py types

bench: $(VENV)/.bench ## CPU benchmarks: scheduler, and decode side by side with transformers
	@$(BIN)/python bench/scheduler.py
	@$(BIN)/python bench/cpu_vs_transformers.py

lock: ## Write constraints.txt anew from the newest versions that the ranges allow
	@$(PYTHON) tools/lock.py

clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: hlaunch needs Python 3.11 or newer, found " + sys.version.split()[0] + "\nhint: make PYTHON=python3.12 …")'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.engine: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing hlaunch and its engine (once; torch is the large one)"
	@$(PIP) --editable '.[engine,bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	@echo "installing what the tests need (once)"
	@$(PIP) --editable '.[engine,ray,bench,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@touch $@

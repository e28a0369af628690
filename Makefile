PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint kernels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the package with its development tools

# Skipped while the stamp is newer than both files. The second install has no build
# isolation (setuptools is there already) and is held to requirements.txt, so that it
# neither fetches a build environment nor moves torch.
$(STAMP): requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (takes some minutes the first time)"
	@$(PIP) install "setuptools>=77" -r requirements.txt
	@$(PIP) install --no-build-isolation -c requirements.txt -e ".[dev]"
	@touch $@

demo: setup ## run the demonstration
	@$(BIN)/cachequant demo

test: setup ## run the tests
	@$(BIN)/python -m pytest

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The first line makes what the CPU runs now instead of at its first use. CUTLASS's headers come without what their Python part
# needs; without nvcc the GPU's kernels are left out, with the reason. No GPU is needed.
kernels: setup ## build the C++ operators and, with nvcc, the GPU's int8 kernels
	@$(BIN)/python -c "from cachequant.kernels.native import load_native; print(load_native() or 'the C++ operators are built')"
	@$(PIP) install --no-deps "nvidia-cutlass==4.2.0.0"
	@$(BIN)/python -m cachequant.kernels.cuda.build || echo "the GPU's kernels were left out"

clean: ## remove caches and build products (keeps .venv, runs and plans)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := $(VENV)/.installed
EVAL := .venv-eval
KERNELS := .venv-kernels
CUTLASS := nvidia-cutlass==4.2.0.0
# torchvision 0.28 belongs to torch 2.13: change both together.
EVAL_PACKAGES := torchvision==0.28.0 torch-fidelity==0.4.0 open_clip_torch==3.3.0 timm==1.0.31 ftfy==6.3.1 wcwidth

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-eval test-kernels lint kernels clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: setup ## run the tests, on two processes
	@$(BIN)/python -m pytest -n 2

# The eval extra lies beside the environment, not in it: a torchvision from the package index is built for CUDA, and beside
# a CPU torch nothing that looks for it would import any more. The tests define what it lacks (tests/conftest.py).
test-eval: setup ## run the tests that need the eval extra
	@test -f $(EVAL)/.installed || { $(PIP) install --no-deps --target $(EVAL) $(EVAL_PACKAGES) && touch $(EVAL)/.installed; }
	@PYTHONPATH=$(EVAL) $(BIN)/python -m pytest tests/evaluation/test_inception.py tests/evaluation/test_perceptual.py

# Triton lies beside the environment too, since a CPU torch comes without it. No GPU is needed, nvcc is: here nothing is skipped.
test-kernels: setup ## compile a GPU kernel of each kind, run Triton's kernels in its interpreter
	@test -f $(KERNELS)/.installed || \
		{ $(PIP) install --no-deps --target $(KERNELS) $(CUTLASS) triton==3.8.0 && touch $(KERNELS)/.installed; }
	@CACHEQUANT_TEST_KERNELS=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest -n 2 tests/kernels/cuda/test_build.py \
		tests/kernels/cuda/test_triton.py tests/kernels/cuda/test_gpu_checks.py

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The first line makes what the CPU runs now instead of at its first use. CUTLASS's headers come without what their Python part
# needs; without nvcc the GPU's kernels are left out, with the reason. No GPU is needed.
kernels: setup ## build the C++ operators and, with nvcc, the GPU's int8 kernels
	@$(BIN)/python -c "from cachequant.kernels.native import load_native; print(load_native() or 'the C++ operators are built')"
	@$(PIP) install --no-deps $(CUTLASS)
	@$(BIN)/python -m cachequant.kernels.cuda.build || echo "the GPU's kernels were left out"

clean: ## remove caches and build products (keeps environments, runs and plans)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . \( -path ./$(VENV) -o -path ./$(EVAL) -o -path ./$(KERNELS) \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

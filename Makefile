# What a person does daily. Every target installs what it needs into .venv first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS ?= train,ocr,dev
PYTEST_WORKERS ?= 2
ARGS ?=

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS)

.DEFAULT_GOAL := help
.PHONY: help venv demo dry-run test test-all lint types format validate clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14
	@echo
	@echo 'ARGS is passed on: key=value to the demo and the dry run, any argument to pytest.'

venv: $(STAMP) ## create .venv with everything that training and the tests need

# torch comes first: DeepSpeed's build looks for it. Without a GPU it comes from PyTorch's index of CPU
# builds, as the default index's Linux build brings gigabytes of CUDA libraries along.
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing $(TORCH) and rtdmd$(EXTRAS:%=[%]) into .venv'
	@$(PIP) install 'setuptools>=77.0.3' wheel
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) install '$(TORCH)'; \
	else \
	  $(PIP) --retries 1 --timeout 10 install --no-deps --index-url '$(TORCH_CPU_INDEX)' '$(TORCH)' \
	    || { echo 'no CPU build from $(TORCH_CPU_INDEX): installing $(TORCH) as pip is set up'; \
	         $(PIP) install '$(TORCH)'; }; \
	fi
	@DS_BUILD_OPS=0 $(PIP) install --no-build-isolation --editable '.$(EXTRAS:%=[%])'
	@touch $@

demo: $(STAMP) ## a trained teacher becomes a 4-step generator on two CPU cores: pictures, curves, table
	@export PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1; start=$$SECONDS; \
	  deepspeed --num_gpus 2 train_ds.py recipes/demo.yaml $(ARGS) \
	  && OMP_NUM_THREADS=2 python -m benchmarks.shapes.report runs/$(or $(patsubst name=%,%,$(filter name=%,$(ARGS))),demo) \
	  && echo "the demo took $$((SECONDS - start)) s, installation apart"

dry-run: $(STAMP) ## both stages on tiny random weights: the machinery alone, ZeRO-3 on two CPU ranks
	@$(BIN)/python -m rtdmd.models.tiny build/tiny
	@export PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1; \
	  deepspeed --num_gpus 2 train_ds.py recipes/dry_run.yaml $(ARGS)

test: $(STAMP) ## run the tests, without the slow ones and those that need a GPU
	@$(PYTEST) -m 'not gpu and not slow' $(ARGS)

test-all: $(STAMP) ## run all tests, the slow ones too (a GPU's are skipped without one)
	@$(PYTEST) $(ARGS)

lint: $(STAMP) ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## check types
	@$(BIN)/mypy rtdmd benchmarks train_ds.py

format: $(STAMP) ## format, and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

validate: $(STAMP) ## check every recipe without loading weights
	@test -d build/tiny || $(BIN)/python -m rtdmd.models.tiny build/tiny
	@$(BIN)/rtdmd validate recipes/*.yaml

clean: ## remove build outputs and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

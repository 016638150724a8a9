# make demo    see inside the packaged model          make test    everything a change must pass
# Each makes its environment on the first run (minutes: torch) and starts at once on the next.

PYTHON ?= python3
PYTHONS ?= 3.10 3.11 3.12 3.13

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

# Tests at once; torch has one thread in each.
JOBS ?= 2
PYTEST := -m pytest --numprocesses=$(JOBS) --dist=worksteal

PAGE_TESTS := $(wildcard tests/page/test_*.py)
NOTEBOOKS := $(wildcard tutorials/*.ipynb)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test suite lint format coverage notebooks bench compare clean
.PHONY: test-pythons test-page test-lowest test-quantised

help:
	@sed -n 's/^## //p' Makefile

## make demo          what the packaged model thinks, layer by layer
demo: $(VENV)/.stamp
	@$(BIN)/tracekit demo

## make test          lint, types and the whole test suite: make lint suite
test: lint suite

## make suite         the test suite only
suite: $(VENV)/.stamp
	$(BIN)/python $(PYTEST) --durations=10

## make lint          ruff and pyright only
lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

## make format        put the code in order
format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## make coverage      the suite with branch coverage
coverage: $(VENV)/.stamp
	$(BIN)/python -m pytest --cov --cov-report=term

## make test-pythons  capture on every Python found (PYTHONS="3.10 3.12"), without torch
test-pythons:
	@tools/test_pythons.sh $(PYTHONS)

# What has to be right in every generation, whichever way transformers goes.
GENERATION := $(addprefix tests/models/test_,generation_matrix.py planted_faults.py prefix.py \
	prefix_models.py kv_cache.py return_cache.py stream.py) \
	$(addprefix tests/tracing/test_,at.py sequence.py verify.py)
# Modules have other paths there.
NAMES := $(addprefix tests/architectures/test_,named_values.py decoders.py encoders.py)

## make test-page     the documented pages under transformers 4.57.6 and the newest; generation and names under 4.57.6
ifeq ($(PAGE_TESTS),)
test-page:
	@echo "no tests in tests/page"
else
test-page: $(VENV)/.stamp .venv-page/.stamp
	.venv-page/bin/python $(PYTEST) tests/page $(GENERATION) $(NAMES)
	$(BIN)/python $(PYTEST) tests/page
endif

# What is left out reads GPT-2's blocks as transformers 5 returns them, or asks for what 4 has not.
LOWEST := tests/capture tests/core tests/interleave tests/page tests/test_*.py \
	$(addprefix tests/models/test_,language.py tiny.py) \
	$(addprefix tests/tracing/test_,cache_matrix.py guards.py nesting.py order.py) \
	$(addprefix tests/tracing/test_,overwritten.py torch_state.py)

## make test-lowest   what does not depend on transformers 5, on the lowest dependencies promised
test-lowest: .venv-lowest/.stamp
	.venv-lowest/bin/python $(PYTEST) -m "not slow" $(LOWEST)

# torchao lies beside the environment, not in it: wherever it is found, transformers imports it.
QUANTISED := $(VENV)/quantised

## make test-quantised  models quantised by torchao
test-quantised: $(VENV)/.stamp $(QUANTISED)/.stamp
	PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest tests/tracing/test_quantised.py

## make notebooks     run every tutorial
notebooks: $(VENV)/.stamp
	@$(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

## make bench         tracekit beside its rivals (BENCH_ARGS="--model 64", GENERATION_ARGS=--cpu)
bench: .venv-bench/.stamp .venv-sae/.stamp
	.venv-bench/bin/python benchmarks/overhead.py $(BENCH_ARGS)
	.venv-bench/bin/python benchmarks/generation.py $(GENERATION_ARGS)
	.venv-bench/bin/python benchmarks/prefix.py $(PREFIX_ARGS)
	.venv-bench/bin/python benchmarks/names.py $(NAMES_ARGS)
	.venv-bench/bin/python benchmarks/sweep.py $(SWEEP_ARGS)
	.venv-sae/bin/python benchmarks/harvest.py $(HARVEST_ARGS)

## make compare       numbers beside TransformerLens' (COMPARE_ARGS="gpt2 llama")
compare: .venv-bench/.stamp
	.venv-bench/bin/python benchmarks/against_transformer_lens.py $(COMPARE_ARGS)

## make clean         remove the environments and all that was built
clean:
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made anew only if it is missing, and brought up to date when what it was made
# from is newer than its stamp. pip comes first: --group needs 25.1, and Python 3.11 brings 23.
# $(1) folder, $(2) constraints, $(3) what to install beside tracekit itself.
define install
@echo "installing $(1) with $(2) ..."
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install -qq --upgrade "pip>=25.1"
@$(1)/bin/python -m pip install -qq -c $(2) torch
@$(1)/bin/python -m pip install -qq -c $(2) --editable . $(3)
@touch $(1)/.stamp
endef

.venv/.stamp: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,--group test --group notebooks)

$(QUANTISED)/.stamp: pyproject.toml constraints.txt | $(VENV)/.stamp
	@echo "installing $(QUANTISED) ..."
	@$(BIN)/python -m pip install -qq --no-deps --upgrade --target $(QUANTISED) \
		-c constraints.txt --group quantised
	@touch $@

.venv-page/.stamp: pyproject.toml constraints-page.txt
	$(call install,.venv-page,constraints-page.txt,--group capture)

.venv-lowest/.stamp: pyproject.toml constraints-lowest.txt
	$(call install,.venv-lowest,constraints-lowest.txt,--group capture)

.venv-bench/.stamp: pyproject.toml constraints.txt
	$(call install,.venv-bench,constraints.txt,--group benchmarks)

.venv-sae/.stamp: pyproject.toml constraints.txt
	@mkdir -p build && grep -v '^transformer-lens=' constraints.txt > build/constraints-sae.txt
	$(call install,.venv-sae,build/constraints-sae.txt,--group sae)

# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests wait most of their time, so there may be more of them at once than a small machine has cores.
WORKERS ?= 3
STAMP := $(VENV)/.installed
SEED ?= 1
MINUTES ?= 30

# Tests start hundreds of interpreters: without bytecode each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "slurm-rollout needs Python 3.11 or newer; say: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $(STAMP)

setup: $(STAMP) ## the virtual environment in .venv

demo: $(STAMP) ## the main job on this machine: a small fleet, one member killed, one hung, both recovered
	@$(BIN)/slurm-rollout demo

lint: $(STAMP) ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) lint ## everything: lint, unit tests, local backend, fake Slurm, and real Slurm where it is installed
	$(BIN)/pytest --numprocesses=$(WORKERS) --no-loadscope-reorder $(PYTEST_ARGS)

test-thorough: ## the same, with the cases that CI leaves out
	@ROLLOUT_THOROUGH=1 $(MAKE) test

test-slurm-versions: $(STAMP) ## the tests on real Slurm 20.11, 24.11 and 26.05, from chroots that it builds (Debian, as root)
	.ci/slurm-versions

chaos: $(STAMP) ## faults at random on a real Slurm cluster of this machine (as root), and a judge: SEED=1 MINUTES=30
	$(BIN)/python -m tests.chaos --seed $(SEED) --minutes $(MINUTES) $(CHAOS_ARGS)

soak: $(STAMP) ## simulate seed after seed until stopped
	$(BIN)/python -m slurm_rollout.simulation.soak

dist: $(STAMP) ## wheel and sdist into dist/
	$(BIN)/python -m build --outdir dist .

clean: ## remove what make made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help setup demo lint test test-thorough test-slurm-versions chaos soak dist clean

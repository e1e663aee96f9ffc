# Everything a new clone needs is Python 3.11: `make demo` installs and runs, `make test` installs and tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Waiting threads that spin steal time from working ones, and a stage gets its share of the cores explicitly.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-slow lint serve clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Install the pinned environment (CPU) into .venv

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## The whole workflow on the bundled tiny reasoning model: ladder and report
	$(BIN)/reasoning-qat run demo

serve: install  ## Prefect server, work pool, deployments and worker on loopback, until Ctrl-C
	$(BIN)/reasoning-qat serve

lint: install  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Style, types and every test that is neither slow nor needs a GPU
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: install  ## The slow tests
	$(BIN)/python -m pytest -q -m "slow and not gpu"

clean:  ## Remove the environment; the artifact store stays
	rm -rf $(VENV)

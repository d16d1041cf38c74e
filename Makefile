# One verb a job. Each sets itself up from nothing but Python 3.11 or newer, make and a package index.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first one that runs and is new enough: a name may be on PATH and lead nowhere.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && break; done)

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --only-binary :all: \
	--constraint constraints.txt --build-constraint constraints.txt

PYTEST := $(BIN)/python -m pytest
TESTS ?= tests/unit tests/integration tests/compat

SOURCES := pyproject.toml constraints.txt

.PHONY: help demo test faults lint format typecheck compat bench package all constraints clean

help:  ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run  ## See it work: an embedded Valkey, a stock worker, a small shop
	@$(BIN)/python examples/quickstart/demo.py

test: $(VENV)/.test  ## Run the tests
	$(PYTEST) -n auto $(TESTS) $(ARGS)

faults: $(VENV)/.test  ## Kill workers and brokers, and look for what is lost
	$(PYTEST) -n 2 tests/faults $(ARGS)

lint: $(VENV)/.lint  ## Check style, and that imports point one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.lint  ## Write the style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

typecheck: $(VENV)/.lint $(VENV)/.test  ## Check types: the package, and what users write
	$(BIN)/mypy
	$(BIN)/python tests/typing/check.py

compat: $(VENV)/.compat  ## Run Celery's own integration tests on stock Celery and on celerykit
	$(BIN)/python -m tests.compat.run

bench: $(VENV)/.test  ## Measure against stock Celery, in the same run
	$(BIN)/python -m tests.benchmarks $(ARGS)

package: $(VENV)/.made  ## Build the wheel, and use it in an environment of its own
	$(BIN)/python tests/wheel.py

all: lint typecheck test demo  ## What CI checks on every change, but for compat

constraints:  ## Pin what resolves today
	$(PYTHON) tests/constraints.py

clean:  ## Remove what the others made
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "celerykit needs Python 3.11 or newer, and found none on PATH. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install python3-venv (apt-get install python3-venv)." >&2; exit 2; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --upgrade pip
	@touch $@

$(VENV)/.run: $(VENV)/.made $(SOURCES)
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.test: $(VENV)/.run $(SOURCES)
	@$(PIP) --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.run $(SOURCES)
	@$(PIP) --group lint
	@touch $@

$(VENV)/.compat: $(VENV)/.test $(SOURCES)
	@$(PIP) --group compat
	@touch $@

# Everything happens in .venv, made on first use. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow check format docs bench clean

demo: $(VENV)/.installed ## raw text to an evaluated BERT, in minutes
	$(BIN)/largebatch demo

test: $(VENV)/.installed-dev ## the tests that CI runs
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev ## the long ones as well
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.installed-dev ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: ## the API pages, from the docstrings
	$(PYTHON) docs/build_api.py

bench: $(VENV)/.installed-dev ## optimizer step, data pipeline, BERT step
	$(BIN)/python -m benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "largebatch needs Python 3.11 or newer; run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The package's own build compiles the CPU kernels, so that what they are made of makes it install again.
KERNEL := setup.py $(wildcard src/largebatch/*/native/*.[ch])

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNEL) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch setuptools
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps timm torch-optimizer lightning
	@touch $@

clean:
	rm -rf $(VENV) build src/largebatch/*/native/*.so *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

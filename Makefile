# `make` alone lists what there is. Everything happens in .venv, which is made when first needed;
# `make test PYTHON=python` uses another environment as it is.

BASE_PYTHON ?= python3
ifneq ($(origin PYTHON),command line)
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/installed
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types check wheel

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(ENVIRONMENT) ## install, then train the small model on the probe task; figures land in runs/
	$(PYTHON) train.py

test: $(ENVIRONMENT) ## run every test
	$(PYTHON) -m pytest -n 2 --dist loadfile

lint: $(ENVIRONMENT) ## ruff: style, docstrings, format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(ENVIRONMENT) ## mypy on the library
	$(PYTHON) -m mypy lightning_crosslmm

check: lint types test ## all of the above three; what .ci/run runs

wheel: $(ENVIRONMENT) ## build dist/*.whl and look into it
	rm -rf build dist
	$(PYTHON) -m build --wheel
	$(PYTHON) -m check_wheel_contents dist

.venv/installed: pyproject.toml
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e ".[dev]"
	@touch $@

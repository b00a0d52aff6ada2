# make quickstart   steer a real model, about five minutes on two cores
# make test         the tests          make test-all   with the slow ones
# make lint         ruff and mypy      make format     let ruff rewrite
# PYTHON=python3.12 picks the interpreter (3.11 or newer, with venv).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

# Huge pages for large arrays: about a twentieth of a step's time on CPU, where glibc is the allocator.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Where many programs of tiny models are compiled, they are compiled fast rather than well; the others as users do.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
QUICKLY := tests/train tests/jaxsteer/theory tests/jaxsteer/io tests/jaxsteer/test_continuous.py tests/jaxsteer/test_likelihood.py
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help install quickstart model test test-all lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"jaxsteer needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing jaxsteer and its packages into $(VENV) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	@touch $@

quickstart: install
	@$(RUN) -m train.quickstart

model: install
	@$(RUN) -m train.base_models smollm2-135m-instruct

test: install model
	$(PYTEST) -m "not slow" $(addprefix --ignore ,$(QUICKLY))
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "not slow" $(QUICKLY)

test-all: install model
	$(PYTEST) $(addprefix --ignore ,$(QUICKLY))
	XLA_FLAGS="$(QUICK)" $(PYTEST) $(QUICKLY)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

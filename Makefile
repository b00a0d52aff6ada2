# make quickstart   steer a real model: about three minutes on two cores, eight with the installation
# make test         the tests               make test-all   with the slow ones      make coverage   with coverage
# make lint         ruff and mypy           make format     let ruff rewrite
# make peers        .peers: vLLM, llama.cpp, transformers, ... to verify exports with (6 GB, half an hour)
# make docs         the site, build/site    make docs-serve show it while writing   make constraints  freeze versions
# PYTHON=python3.12 picks the interpreter (3.11 or newer, with venv).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

# Tests that compile many programs of tiny models compile them fast rather than well; the others at XLA's usual level, and
# some slow ones exactly as users do.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
QUICKLY := tests/train tests/jaxsteer/theory tests/jaxsteer/io tests/jaxsteer/test_decoder.py \
	tests/jaxsteer/test_folding.py tests/jaxsteer/test_likelihood.py tests/test_docs_code.py tests/test_docs_formats.py
PYTEST := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help install quickstart model peers test test-all coverage lint format docs docs-serve constraints clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"jaxsteer needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing jaxsteer and its packages into $(VENV) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	@touch $@

# An extra that only some targets need, e.g. $(VENV)/extra-docs.
$(VENV)/extra-%: $(VENV)/installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

quickstart: install
	@$(RUN) -m train quickstart

model: install
	@$(RUN) -m train.base_models smollm2-135m-instruct

# Environments of their own, of which those that are complete are left as they are. PEERS="hf llama" makes only these.
peers: install
	@$(RUN) tests/peers/install.py $(PEERS)

test: install model
	$(PYTEST) -m "not slow" $(addprefix --ignore ,$(QUICKLY))
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "not slow" $(QUICKLY)

test-all: install model $(VENV)/extra-e2e
	$(PYTEST) $(addprefix --ignore ,$(QUICKLY))
	XLA_FLAGS="$(QUICK)" $(PYTEST) $(QUICKLY)

# The tests of `make test`. Fails below tool.coverage.report.fail_under in pyproject.toml, once for both halves together.
COVERED := --cov --cov-report= --cov-fail-under=0
coverage: install model $(VENV)/extra-coverage
	$(PYTEST) -m "not slow" $(COVERED) $(addprefix --ignore ,$(QUICKLY))
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "not slow" $(COVERED) --cov-append $(QUICKLY)
	$(RUN) -m coverage report

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Strict: a broken link fails, and so does a public name without a docstring or without its place in the reference.
docs: $(VENV)/extra-docs
	$(RUN) -m pytest -n 0 -k "reference or docstring or navigation or links" tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

docs-serve: $(VENV)/extra-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

# The versions that figures in docs/ are measured with; see docs/performance.md.
constraints: install
	$(RUN) .ci/constraints.py > constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*

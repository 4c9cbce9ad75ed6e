# `make demo`, `make test` and `make test-all` set up all they need, in .venv, from Python 3.11 or later; a second run starts at once.
# make test                       runs what guards every law; make test-all runs everything, `slow` tests too
# make test ARGS="tests/rules"    runs a part of it
# make test JOBS=0                runs it in one process
# make mutate ARGS="rules/ hub/"  breaks the package on purpose and names what no test notices (all of it without ARGS)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile

# A test process computes in one thread: two of them share the machine, and some start two processes of their own.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg

.PHONY: demo test test-all mutate lint clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile; echo "make demo | test | test-all | mutate | lint | clean"

demo: $(VENV)/.core
	OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/python examples/demo.py $(ARGS)

PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.test
	$(PYTEST) $(ARGS)

mutate: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python tests/mutations/run.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hf_ssam examples tests
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	@echo "setting up $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: name a Python of 3.11 or later, as in make demo PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(MAKE) --no-print-directory .venv-module && $(PYTHON) -m venv $(VENV); }

# Debian keeps the venv module in a package of its own.
.PHONY: .venv-module
.venv-module:
	@test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv \
		|| { echo "$(PYTHON) has no venv module: run apt-get install python3-venv as root, then this again"; exit 1; }

$(VENV)/.core: $(VENV)/bin/python $(INPUTS)
	@echo "installing hf_ssam and what it needs (a few minutes the first time) ..."
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) -e .
	@touch $@

# backpack asks for torchvision, which brings another torch with it: both oracles come without their dependencies.
$(VENV)/.test: $(VENV)/.core
	$(PIP) -e '.[dev]' einops einconv linear_operator opt-einsum
	$(PIP) --no-deps curvlinops-for-pytorch backpack-for-pytorch unfoldNd
	@touch $@

# Two commands do everything on a machine with Python 3.11+, pip, make and git:
#   make demo    the main job, on the checkpoint inside the package
#   make test    linters, type checker, tests
# `make help` lists the rest. Variables: PYTHON (the interpreter to start from), VENV (where to install),
# PYTEST_FLAGS (for example PYTEST_FLAGS="-n 0 -k prune").

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
PYTEST_FLAGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint type format unit bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

demo: $(VENV)/.installed-all  ## generate, resize, prune, convert and save the embedded checkpoint
	$(BIN)/fmodels demo

test: lint type unit  ## linters, type checker, tests

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.installed-dev  ## basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

unit: $(VENV)/.installed-dev  ## tests and doctests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

format: $(VENV)/.installed-dev  ## rewrite the sources as `lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## speed and memory against transformers
	$(BIN)/fmodels bench

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist
	find fmodels interop tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Debian splits ensurepip from python3: there the interpreter's own pip fills the environment.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) install --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed-all

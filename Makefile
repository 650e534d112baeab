# `make demo` and `make test` need nothing but Python and make. They install into .venv, or into the active
# virtual environment where there is one; VENV=path installs there, VENV= into whatever `python` is.
VENV ?= $(if $(VIRTUAL_ENV),,.venv)
PYTHON ?= python3
PY := $(if $(VENV),$(VENV)/bin/python,python)
STAMP := $(if $(VENV),$(VENV),$(shell python -c "import sys; print(sys.prefix)"))/.installed

.PHONY: demo test lint compat clean help

help:  ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMP)-examples  ## train on digits, then classify them pixel by pixel as a recurrence
	$(PY) examples/demo.py

test: $(STAMP)-test  ## the whole test suite
	$(PY) -m pytest -q -n $(or $(WORKERS),auto)

lint: $(STAMP)-dev  ## format, lint and types, as the pre-commit hooks and CI check them
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

compat:  ## the suite on every Python, torch and instruction set, or on some: make compat ROWS="oldest 3.12"
	$(PYTHON) .ci/compat.py $(ROWS)

clean:  ## remove the environment and what was built
	rm -rf .venv build dist *.egg-info

$(STAMP)-%: pyproject.toml | $(if $(VENV),$(VENV)/bin/python)
	$(PY) -m pip install -q -e ".[$*]"
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

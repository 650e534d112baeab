# `make demo` and `make test` need nothing but Python and make. They install into .venv, or into the active
# virtual environment where there is one; VENV=path installs there, VENV= into whatever `python` is.
VENV ?= $(if $(VIRTUAL_ENV),,.venv)
PYTHON ?= python3
PY := $(if $(VENV),$(VENV)/bin/python,python)
STAMP := $(if $(VENV),$(VENV),$(shell python -c "import sys; print(sys.prefix)"))/.installed

.PHONY: help demo test fuzz lint docs notebooks tables docs-serve sanitize gpu gpu-bundle compat release clean

help:  ## what there is to make
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  VENV=path installs there, VENV= uses the python of the path; WORKERS=2 runs so many tests at once"

demo: $(STAMP)-examples  ## train on digits, then classify them pixel by pixel as a recurrence
	$(PY) examples/demo.py

test: $(STAMP)-test  ## the whole test suite
	$(PY) -m pytest -q -n $(or $(WORKERS),auto) --dist worksteal

fuzz: $(STAMP)-test  ## random layers and inputs against scipy, 10,000 of them or CASES=number
	FUZZ=$(or $(CASES),10000) $(PY) -m pytest -q tests/test_fuzz.py

lint: $(STAMP)-dev  ## format, lint and types, as the pre-commit hooks and CI check them
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(STAMP)-docs  ## the documentation site in build/site; runs the code of every page and notebook
	$(PY) -m pytest -q docs/checks -n $(or $(WORKERS),auto) --dist worksteal

notebooks: $(STAMP)-docs  ## execute the notebooks of the site, and keep what they put out
	$(PY) docs/checks/notebooks.py

tables:  ## the tables of results in the pages, from the files of results
	$(PYTHON) benchmarks/tables.py

docs-serve: $(STAMP)-docs  ## the site at 127.0.0.1:8000, while you write
	$(PY) -m mkdocs serve

sanitize: $(STAMP)-test  ## the C++ code under the address, undefined-behaviour and thread sanitizers of g++
	$(PY) .ci/sanitize.py

compat:  ## the suite on every Python, torch and instruction set, or on some: make compat ROWS="oldest 3.12"
	$(PYTHON) .ci/compat.py $(ROWS)

release: $(STAMP)-release  ## sdist and wheel in dist/, built and checked; VERSION=0.2.0 commits and tags it, too
	$(PY) .ci/release.py $(call options,VERSION MACHINE OUT)

gpu:  ## what a GPU has to prove, in six minutes; DEVICE=cpu rehearses, benchmarks/gpu.py --help has the options
	$(PYTHON) benchmarks/gpu.py $(if $(filter-out 0,$(TRAIN)),--train )$(call options,\
		DEVICE RESULTS WHEELS MINUTES PARTS DATA RECIPE PRECISION EPOCHS HANG CRASH)

gpu-bundle:  ## wheels and data that `make gpu` needs where there is no network; benchmarks/gpu_bundle.py --help
	$(PYTHON) benchmarks/gpu_bundle.py $(call options,OUT DATA IMAGE PYTHON_VERSION)

# NAME=value on the command line of make as --name value, the environment left out; $(1) are the names.
given = $(if $(filter command,$(origin $(1))),$($(1)))
options = $(foreach name,$(1),$(if $(call given,$(name)),--$(shell echo $(name) | tr A-Z_ a-z-) "$($(name))"))

clean:  ## remove the environment and what was built
	rm -rf .venv build dist *.egg-info

$(STAMP)-%: pyproject.toml | $(if $(VENV),$(VENV)/bin/python)
	$(PY) -m pip install -q -e ".[$*]"
	@mkdir -p $(@D) && touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

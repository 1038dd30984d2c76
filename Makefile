# The first python3 that is new enough; `make PYTHON=/path/to/python test` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-out
# libgomp's default spinning costs a time slice per parallel region as soon as cores are shared
export OMP_WAIT_POLICY ?= PASSIVE
# else pytest compiles all test modules anew, in each process: ten seconds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint format types pytest slow coverage faults attack fuzz mutants browser clean
.DEFAULT_GOAL := help

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/installed  ## set up, then run everything on drawn scenes with the embedded CLIP, offline
	$(BIN)/wsss demo --out $(DEMO)

test: lint types pytest  ## set up with the development extras, then lint, types and all tests

lint: $(VENV)/installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev  ## mypy, strict, on the package
	$(BIN)/mypy

pytest: $(VENV)/installed-dev  ## all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: $(VENV)/installed-dev  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

coverage: $(VENV)/installed-dev  ## all tests, and which lines and branches they reach
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-report=html

faults: $(VENV)/installed-dev  ## a hundred kills -9 at random moments, over every long command
	$(BIN)/python -m tests.faults.kills --kills 100

attack: $(VENV)/installed-dev  ## ten thousand mutated shards, hostile manifests, checkpoints, archives, neighbours at work
	$(BIN)/python -m tests.hostile.attack

fuzz: $(VENV)/installed-dev  ## a minute of coverage-guided fuzzing for each reader of files
	for target in labels archives manifest known settings prompts; do \
		$(BIN)/python -m tests.fuzz.readers $$target -max_total_time=60 || exit 1; done

mutants: $(VENV)/installed-dev  ## mutation testing of all that makes masks, trains and keeps; takes many hours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'mutmut>=3.8'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

browser:  ## install Chromium for the tests that need it (Debian and Ubuntu, as root)
	apt-get install -y --no-install-recommends chromium

format: $(VENV)/installed-dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and what was built or tried
	rm -rf $(VENV) $(DEMO) build htmlcov mutants .coverage .hypothesis *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer isn't on the PATH; give it: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# pydensecrf2 has no wheels: without a C++ compiler, or on Python 3.13, its tests report themselves as skipped
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,export]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[crf]' \
		|| echo "NOTE: pydensecrf2 did not build here; the tests that compare with it will be skipped" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0' \
		|| echo "NOTE: atheris did not install here; the short rounds of fuzzing will be skipped" >&2
	@command -v chromium >/dev/null \
		|| echo "NOTE: no chromium here; the browser's tests of the pages will be skipped (make browser installs one)" >&2
	@touch $@

# Needs only Python 3.11 or 3.12; makes its own virtual environment once.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= out/demo
CONFIG := configs/mnist.py
# Of `make golden`: a Python with PyTorch, and checkouts of the originals.
TORCH ?= .venv-torch/bin/python
GOLDEN_SOURCES ?= golden-sources
# One process a core, and no oversubscription inside each.
TEST_WORKERS ?= 2

.PHONY: demo docs golden test test-browser test-slow test-notebook lint types format clean help

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' Makefile

$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python {v[0]}.{v[1]} is not supported; run: make PYTHON=python3.12 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt pyproject.toml $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

demo: $(VENV)/.run  ## Calibrates the embedded model and draws the comparison.
	$(RUN) main.py --config $(CONFIG) --mode calibrate --workdir $(WORKDIR)
	$(RUN) main.py --config $(CONFIG) --mode sample --workdir $(WORKDIR) --config.sample.compare=True
	@echo 'Look at $(WORKDIR)/samples/compare.png'

test: $(VENV)/.dev  ## Runs the tests: 2 cores, under 10 minutes.
	$(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile

test-slow: $(VENV)/.dev  ## Runs the tests that take minutes each.
	$(RUN) -m pytest -m slow

test-browser: $(VENV)/.dev  ## Looks at a report in Chromium, which has to be installed.
	$(RUN) -m pip install --quiet --disable-pip-version-check 'playwright>=1.49,<2'
	$(RUN) -m pytest -m browser

test-notebook: $(VENV)/.dev  ## Runs the notebook.
	$(RUN) -m pytest -m slow tests/test_notebook.py

docs: $(VENV)/.docs  ## Builds the pages of out/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo 'Look at out/site/index.html'

golden:  ## Re-makes and compares reference arrays; tests/golden/README.md.
	$(TORCH) tests/golden/remake.py $(GOLDEN_SOURCES)

lint: $(VENV)/.dev  ## Checks style.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev  ## Checks types.
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## Formats the code.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Removes the virtual environment and the demo's output.
	rm -rf $(VENV) out/demo

# The two commands to know are `make quickstart` and `make test`. Both use a virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
# A change in these makes the environment out of date.
PINS := pyproject.toml constraints.txt

.PHONY: help venv quickstart test slow lint docs wheel clean

help:  ## List the targets.
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

venv: $(VENV)/.dev  ## Create .venv with the development dependencies.

quickstart: $(VENV)/.installed  ## Download, finetune, merge and try a small model.
	$(VENV)/bin/lit-lora quickstart

test: $(VENV)/.dev  ## Run the default tests: no GPU, no network, nothing slow.
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

slow: $(VENV)/.dev  ## Run the slow tests, on real weights if available.
	$(RUN) -m pytest -m "slow and not gpu and not network"

lint: $(VENV)/.dev  ## Check style, format and types.
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy lit_lora finetune scripts

docs: $(VENV)/.dev  ## Regenerate the reference pages in docs/.
	$(RUN) scripts/docs.py

wheel: $(VENV)/.dev  ## Build the sdist, and the wheel from it, into dist/.
	rm -rf dist build
	$(RUN) -m build

clean:  ## Remove the environment, builds and caches; keep checkpoints, data and out/.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lit-lora needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(PINS)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.created $(PINS)
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.installed $@

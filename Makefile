# Two commands do everything on a machine with Python 3.11 or later and make:
#   make demo   install into ./.venv, draw the demo images, pretrain on them, show what was learned
#   make test   install, then lint, types and tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := datasets/demo
TYPES := build/types

.PHONY: demo test lint types unit install format record-fashion-mnist clean

demo: $(STAMP)
	$(BIN)/synco-fast data demo $(DEMO)
	$(BIN)/synco-fast pretrain --config demo --data $(DEMO)

test: lint types unit

install: $(STAMP)

$(STAMP): setup.py constraints.txt synco_fast/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: found $$($(PYTHON) --version), expected Python 3.11 or later: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# setup.py maps the folders into one package; a tree of links shows the type checker the same package.
types: $(STAMP)
	@rm -rf $(TYPES) && $(BIN)/python tests/support/layout.py $(TYPES)
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p synco_fast

unit: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

record-fashion-mnist: $(STAMP)
	$(BIN)/python -m synco_fast.bench.experiments.fashion_mnist

clean:
	rm -rf build dist $(VENV) *.egg-info

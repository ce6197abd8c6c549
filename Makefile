# Two commands do everything on a machine with Python 3.11 or later and make:
#   make demo   install into ./.venv, draw the demo images, pretrain on them, show what was learned
#   make test   install, then lint, types and tests
# And the documentation as a website:
#   make docs   install what it needs, then build it into build/docs/site
# All install with uv where it is on the path, else with pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
#: The package and what it runs on, which is all that the demo needs; and with it what tests and single commands need.
RUN := $(VENV)/.installed-run
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
DEMO := datasets/demo
TYPES := build/types
SITE := build/docs

UV := $(shell command -v uv 2>/dev/null)
ifdef UV
  MAKE_VENV = uv venv --quiet --python $(PYTHON) $(VENV)
  INSTALL = uv pip install --quiet --python $(BIN)/python
else
  MAKE_VENV = $(PYTHON) -m venv $(VENV)
  INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action=ignore
endif

.PHONY: demo test docs lint types unit install format clean

demo: $(RUN)
	@echo "[2/3] drawing the demo images into $(DEMO)"
	@$(BIN)/synco-fast data demo $(DEMO)
	@echo "[3/3] pretraining: synco-fast pretrain --config demo --data $(DEMO)"
	@$(BIN)/synco-fast pretrain --config demo --data $(DEMO)

test: lint types unit

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: found $$($(PYTHON) --version), expected Python 3.11 or later: make PYTHON=python3.11"; exit 2; }
	@$(MAKE_VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }

$(RUN): setup.py constraints.txt synco_fast/version.py | $(BIN)/python
	@echo "[1/3] installing PyTorch and what synco-fast runs on into $(VENV), some 6 GB: a minute or two"
	@$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(STAMP): setup.py constraints.txt synco_fast/version.py | $(BIN)/python
	@echo "installing PyTorch, synco-fast and what its tests need into $(VENV), some 7 GB: a few minutes"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $(RUN) $@

$(DOCS_STAMP): setup.py constraints.txt synco_fast/version.py | $(RUN)
	@echo "installing what the website is built with into $(VENV)"
	@$(INSTALL) --constraint constraints.txt --editable '.[docs]'
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

# The pages lie in it as in the checkout, so that links lead to the same place; the theme's notice of its own end is not ours.
docs: $(DOCS_STAMP)
	@rm -rf $(SITE) && $(BIN)/python tests/support/site.py $(SITE)
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "built $(SITE)/site/index.html; its search works where it is served: python -m http.server -d $(SITE)/site"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(VENV) *.egg-info

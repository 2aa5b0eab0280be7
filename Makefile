PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types fuzz bench docs notebooks clean

demo: $(STAMP)
	@$(BIN)/jforge demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed

bench: $(STAMP)
	@$(BIN)/jforge bench

docs: $(STAMP)
	$(BIN)/python docs/build_site.py

notebooks: $(STAMP)
	$(BIN)/python notebooks/build.py

fuzz: $(STAMP)
	$(BIN)/python -m jforge.harness.fuzz --examples 500

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jforge needs Python 3.12 or newer; found %d.%d (set PYTHON=...)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)

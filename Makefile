PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEXT := .venv-hf-next
NEXT_IS = $(NEXT)/bin/python -c 'import transformers; print("tests/hf against transformers", transformers.__version__)'

.PHONY: demo test test-browser test-hf-next lint types fuzz bench docs notebooks clean

demo: $(STAMP)
	@$(BIN)/jforge demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-browser: $(STAMP)
	$(BIN)/python -m pytest -q -m browser tests/browser

# tests/hf alone, against the newest transformers; a package that it wants newer than constraints.txt it gets
test-hf-next:
	$(PYTHON) -m venv $(NEXT)
	grep -viE '^(transformers|huggingface_hub|tokenizers|safetensors)==' constraints.txt > $(NEXT)/constraints.txt
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEXT)/constraints.txt \
		-e '.[torch,hf]' pytest pytest-xdist beartype
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade transformers
	@$(NEXT_IS)
	$(NEXT)/bin/python -m pytest -q -n auto --dist worksteal -m 'not gpu and not pinned' tests/hf; \
		status=$$?; $(NEXT_IS); exit $$status

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
	rm -rf $(VENV) $(NEXT)

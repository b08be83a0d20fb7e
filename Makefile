# Every target makes the virtual environment it needs from a bare Python >= 3.10: `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
# Test processes side by side, one thread each: threads of their own on top would fight over the cores.
WORKERS ?= 2
BIN = $(VENV)/bin
# The oldest supported Transformers is stated in setup.cfg, and only there.
OLDEST = $(shell sed -n 's/^ *transformers>=\([0-9.]*\),.*/\1/p' setup.cfg)

.PHONY: help quickstart test test-slow lint upstream test-oldest test-releases clean

help:
	@echo "make quickstart   train, evaluate, save, reload and sample a tiny PEER model (minutes on 2 cores)"
	@echo "make test         the CPU test suite (ten minutes on 2 cores)"
	@echo "make test-slow    what is slow by its nature: kills, whole studies, groups of processes, compilations"
	@echo "make lint         errors, formatting (ruff), the order of imports (import-linter), spelling (codespell)"
	@echo "make upstream     Transformers' own common model tests, PEER beside Llama"
	@echo "make test-oldest  both on the oldest supported Transformers ($(OLDEST))"
	@echo "make test-releases  a smoke test on every minor release of Transformers from $(OLDEST) on"
	@echo "make clean        remove virtual environments and what the targets built"

quickstart: $(VENV)/installed
	$(BIN)/python scripts/quickstart.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

upstream: $(VENV)/installed
	$(BIN)/python tests/upstream/run.py

test-oldest: constraints-oldest.txt
	$(MAKE) test test-slow VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-releases: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/releases/run.py

constraints-oldest.txt: constraints.txt setup.cfg
	sed -E '/^(transformers|tokenizers|huggingface_hub)==/d' constraints.txt > $@
	echo "transformers==$(OLDEST).*" >> $@

CONSTRAINTS ?= constraints.txt
$(VENV)/installed: setup.cfg $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "modeling_peer needs Python 3.10 or newer, $(PYTHON) is `$(PYTHON) --version 2>&1`: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[train,test,lint]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-releases build runs/quickstart constraints-oldest.txt *.egg-info

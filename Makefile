# Needs make and Python 3.10 or newer, nothing else: the environment is made in .venv.
#
#   make demo     export the bundled checkpoint to ONNX, to T4 engines and to Core ML, as far as the machine has wheels
#                 of their tools; verify every file; end with one table and one report
#   make test     every check and every test
#   make lint     the checks alone
#   make bench    the benchmarks; those that need a GPU say so where there is none
#   make clean    remove caches and build outputs; .venv and exports stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
PYTEST ?= $(BIN)/pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	$(BIN)/nextvit-export all

test: lint
	OMP_NUM_THREADS=1 $(PYTEST)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED_DEV)
	@for script in $$(grep -l __main__ benchmarks/*.py); do \
		module=benchmarks.$$(basename "$$script" .py); \
		echo "== $$module"; $(BIN)/python -m "$$module" || [ $$? -eq 4 ] || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks exporters models nextvit_deploy tests -name __pycache__ -prune -exec rm -rf {} +

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'Python 3.10 or newer is needed and $(PYTHON) is not; name one: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install 'pip>=22' # editable installs without a setup.py
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt $(MADE)
	$(PIP) --editable '.[coreml,trt-rtx,report]'
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt $(MADE)
	$(PIP) --editable '.[dev]'
	@touch $(INSTALLED) $@

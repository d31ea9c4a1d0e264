# `make demo` and `make test` install what they need into .venv first; Python >= 3.11 is all they ask for.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-all lint clean

# Bytecode is made here: a job starts dozens of processes, and each would otherwise compile what it imports.
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	UV_FIND_LINKS="$${UV_FIND_LINKS-$${PIP_FIND_LINKS-}}" $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --constraint constraints-dev.txt -e '.[demo,dev]'
	@touch $@

demo: install
	$(BIN)/ccsr demo

# Two lanes side by side, one with Ray.
LANE := $(BIN)/python -m pytest -m "not slow"
test: install
	@log=$$(mktemp); $(LANE) tests/integration tests/fault tests/golden --ignore tests/integration/test_training.py > $$log 2>&1 & lane=$$!; \
	$(LANE) tests/unit tests/integration/test_training.py; others=$$?; \
	wait $$lane; ray=$$?; cat $$log; rm $$log; exit $$((others | ray))

test-all: install
	set -o pipefail; $(BIN)/python -m pytest --durations=25 2>&1 | tee benchmarks/test-all-$$(date -u +%Y-%m-%d).log

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv runs build *.egg-info

test-all: SHELL := /bin/bash

# make demo         from nothing: install, compress the bundled model by 25 % and 30 %, verify, compare, print the table
# make test         from nothing: install, lint, type-check, run every test but those that serve
# make serve-check  set up vLLM in an environment of its own and serve the bundled model, original and pruned
# make bench        peak memory of observing 4 and 16 layers; fails if it grows with the depth
# make clean        remove what the above left

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint serve-check bench clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --out out

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2

serve-check: $(INSTALLED)
	PYTHON=$(PYTHON) tests/serve/setup.sh .venv-vllm
	REAPKIT_REQUIRE_SERVE=1 $(BIN)/python -m pytest -m serve tests/serve

bench: $(INSTALLED)
	$(BIN)/python benchmarks/observe_memory.py

clean:
	rm -rf $(VENV) .venv-vllm out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# make demo         from nothing: install, compress the bundled model by 25 % and 30 %, verify, compare, print the table
# make test         from nothing: install, lint, type-check, run every test but those that serve
# make serve-check  set up vLLM in an environment of its own and serve the bundled model, original and pruned
# make bench        peak memory of observing 4 and 16 layers, which must not grow with the depth; time and memory of inspect, plan and
#                   prune --dry-run on checkpoints of 96,103 and 138,721 tensors
# make quantize-check  set up llm-compressor in an environment of its own and quantise a pruned, dequantised model afresh
# make study        every criterion and merger on the bundled model, made for a GPU; writes docs/study.md and its plots
# make docs         run every family's checks and write docs/architectures.md from the results
# make torture      kill compress 200 times at random moments (make test: 20 times); 100,000 strangers' files through every reader
# make clean        remove what the above left

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint serve-check quantize-check docs torture bench study clean

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

quantize-check: $(INSTALLED)
	test -x .venv-quantize/bin/python || $(PYTHON) -m venv .venv-quantize
	.venv-quantize/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-quantize/bin/python -m pip install --quiet --disable-pip-version-check llmcompressor==0.14.0.1
	REAPKIT_REQUIRE_QUANTIZE=1 $(BIN)/python -m pytest -m quantize tests/test_requantize.py

docs: $(INSTALLED)
	mkdir -p out
	$(BIN)/python -m pytest -n 2 tests/test_families.py --junitxml=out/families.xml
	$(BIN)/python tests/architectures_page.py out/families.xml

torture: $(INSTALLED)
	REAPKIT_KILLS=200 $(BIN)/python -m pytest -s tests/test_kills.py
	nice $(BIN)/python benchmarks/fuzz.py header index config plan statistics manifest rows rows-parquet -o benchmarks/fuzz.json
	nice $(BIN)/python benchmarks/fuzz.py tokenizer tokenizer-config chat-template --cases 20000 -o benchmarks/fuzz.json

bench: $(INSTALLED)
	$(BIN)/python benchmarks/observe_memory.py
	$(BIN)/python benchmarks/inventories.py

study: $(INSTALLED)
	$(BIN)/python benchmarks/study.py run --out out/study
	$(BIN)/python benchmarks/study.py render --out out/study

clean:
	rm -rf $(VENV) .venv-vllm .venv-quantize out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
